"""Visual question answering with a policy's own language model (GenVLA §IV, Fig. 5): ask, record, score, sum up.

Each benchmark gets a results folder of its own (vla/analysis/vqa_records.py). Run again, only questions without an
answer are asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from data.vqa import READERS, Question, annotations_hash, read_image, read_questions, some
from vla.analysis.vqa_metrics import SCORES
from vla.analysis.vqa_records import SUMMARY, Answers, summarise
from vla.errors import UserError
from vla.evaluation_configs import VQAConfig
from vla.files import write_atomic
from vla.generation import TextModel, generate, text_model
from vla.policy import Policy


def vqa_probe(
    cfg: VQAConfig, policy: Policy, identity: dict[str, Any], place: Callable[[dict], Path], device: str
) -> dict[str, dict]:
    """Every selected benchmark, one after the other.

    Args:
        identity: which policy this is, the beginning of every header.
        place: a header's results folder.

    Returns:
        benchmark → the content of its vqa_probe.json and its "folder".

    Raises:
        UserError: as `text_model` and `read_questions`; all questions are read before the first is asked.
    """
    model = text_model(policy, cfg.template, cfg.head)
    wanted = {}
    for name in cfg.select or READERS:
        if name not in READERS:
            raise UserError(f"evaluation.vqa.select={name} is not known; choose among {', '.join(READERS)}")
        of = getattr(cfg.sets, name)
        if of.prompt.count("{question}") != 1:
            raise UserError(f"evaluation.vqa.sets.{name}.prompt must hold {{question}} once; it is {of.prompt!r}")
        wanted[name] = read_questions(name, Path(of.annotations), Path(of.images))
    results = {}
    for name, questions in wanted.items():
        of = getattr(cfg.sets, name)
        header = identity | {"evaluation": "vqa", "set": name, "annotations": annotations_hash(Path(of.annotations))}
        header |= {"prompt": of.prompt, "template": model.template, "lower_case": cfg.lower_case, "head": cfg.head}
        header |= {"max_new_tokens": cfg.max_new_tokens}
        out = place(header)
        with Answers(out, header) as answers:
            ask(model, name, some(questions, cfg.limit), of.prompt, answers, cfg, device)
            results[name] = header | summarise(name, list(answers.rows.values()), questions)
            write_atomic(out / SUMMARY, json.dumps(results[name], indent=2))
        results[name]["folder"] = out
    return results


def ask(
    model: TextModel,
    name: str,
    questions: list[Question],
    prompt: str,
    answers: Answers,
    cfg: VQAConfig,
    device: str,
) -> None:
    """Ask what has no answer yet, `cfg.batch_size` at a time.

    Args:
        prompt: with `{question}`.
    """
    pending = [question for question in questions if question.id not in answers.rows]
    starts = range(0, len(pending), cfg.batch_size)
    for start in track(starts, description=f"asking {name}", transient=True, disable=not pending):
        batch = pending[start : start + cfg.batch_size]
        prompts = [prompt.replace("{question}", question.text) for question in batch]
        if cfg.lower_case:
            prompts = [text.lower() for text in prompts]
        frames = torch.cat([prepared(model.policy, question.image, device) for question in batch])
        said = generate(model, frames, prompts, cfg.max_new_tokens)
        answers.append([row_of(name, question, text) for question, text in zip(batch, said, strict=True)])


def prepared(policy: Policy, image: Path, device: str) -> torch.Tensor:
    """uint8 (1, 3, image_size, image_size): a picture on the policy's own image path."""
    camera = policy.cameras[0]
    frames = torch.from_numpy(read_image(image).copy()).permute(2, 0, 1)[None].to(device)
    return policy.prepare({camera: frames})[camera]


def row_of(name: str, question: Question, said: str) -> dict[str, Any]:
    score = float(SCORES[name](said, question.answers))
    return {"id": question.id, "image": question.image.name, "group": question.group, "said": said, "score": score}
