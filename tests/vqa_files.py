"""Small annotation files in the five benchmarks' own formats, with pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SETS = ("textvqa", "pope", "gqa", "vizwiz", "vsr")


def picture(path: Path, seed: int, size: tuple[int, int] = (48, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_sets(root: Path) -> dict[str, tuple[Path, Path]]:
    """Set → (annotations, images)."""
    places = {
        "textvqa": (root / "textvqa.json", root / "textvqa"),
        "pope": (root / "pope", root / "coco"),
        "gqa": (root / "gqa.json", root / "gqa"),
        "vizwiz": (root / "val.json", root / "vizwiz"),
        "vsr": (root / "test.jsonl", root / "vsr"),
    }
    data = [
        {"question_id": 34602 + i, "image_id": f"pic{i}", "question": "what brand?", "answers": ["Nokia"] * 9 + ["nok"]}
        for i in range(3)
    ]
    places["textvqa"][0].write_text(json.dumps({"data": data, "dataset_type": "val"}))
    for i in range(3):
        picture(root / "textvqa" / f"pic{i}.jpg", i)

    (root / "pope").mkdir()
    for split, count in (("random", 2), ("popular", 4), ("adversarial", 4)):
        lines = [
            {"question_id": i + 1, "image": f"COCO_val2014_{i // 2:012d}.jpg", "text": "Is there a dog in the image?"}
            | {"label": ("yes", "no")[i % 2]}
            for i in range(count)
        ]
        text = "\n".join(json.dumps(line) for line in lines) + "\n"
        (root / "pope" / f"coco_pope_{split}.json").write_text(text)
    for i in range(2):
        picture(root / "coco" / f"COCO_val2014_{i:012d}.jpg", 10 + i, (64, 40))

    questions = {f"2013{i}": {"imageId": f"n{i // 2}", "question": "Is it red?", "answer": "yes"} for i in range(4)}
    places["gqa"][0].write_text(json.dumps(questions))
    for i in range(2):
        picture(root / "gqa" / f"n{i}.jpg", 20 + i)

    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    entries = [
        {"image": f"VizWiz_val_{i:08d}.jpg", "question": "What is this?", "answers": answers}
        | {"answer_type": ("unanswerable", "other")[i % 2], "answerable": i % 2}
        for i in range(3)
    ]
    places["vizwiz"][0].write_text(json.dumps(entries))
    for i in range(3):
        picture(root / "vizwiz" / f"VizWiz_val_{i:08d}.jpg", 30 + i, (30, 50))

    lines = [
        {"image": f"{i:012d}.jpg", "caption": "The cat is on the bed.", "label": i % 2, "relation": "on"}
        for i in range(3)
    ]
    places["vsr"][0].write_text("\n".join(json.dumps(line) for line in lines))
    for i in range(3):
        picture(root / "vsr" / f"{i:012d}.jpg", 40 + i)
    return places


def overrides(places: dict[str, tuple[Path, Path]]) -> list[str]:
    """For evaluate.py evaluation=vqa."""
    found = ["evaluation=vqa"]
    for name, (file, images) in places.items():
        found += [
            f"evaluation.vqa.sets.{name}.annotations={file}",
            f"evaluation.vqa.sets.{name}.images={images}",
        ]
    return found
