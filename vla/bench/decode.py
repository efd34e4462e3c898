"""Milliseconds of saying one 7-D action as text beside those of saying it as seven tokens, with the same model.

Four ways of going on from the same pictures and prompts, each a round, one after the other, in one process:
    7 tokens, plain      one pass of transformers' model per token, as OpenVLA says its bins in the public code
    7 tokens, static     one pass of vla/fast_decode.py per token: as this project's OpenVLA says them
    text, plain          one pass of transformers' model per choice (vla/action_tokens/constrained.py, decode_plain)
    text, fast           what a policy of string actions does (decode)

Random weights, but the rows of 1 and of the comma in the language head are that of 0, so that every number begins with
0 and has four decimals: random weights say mostly ±1.0, which leaves no choices. A ratio is the median over the rounds
of the ratios within each. "Action" is the whole of predict: pictures, prompt and text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.table import Table

from data.normalization import ActionStatistics
from vla.action_tokens.constrained import decode, decode_plain
from vla.action_tokens.strings import ALPHABET, DIMS, FORMS, Grammar
from vla.bench.latency import STATE, describe, observation
from vla.build import build_policy
from vla.cli import compose_config
from vla.fast_decode import likeliest_tokens, plain_tokens, supports
from vla.generation import Prefix, TextModel
from vla.string_policy import StringPolicy, speaker
from vla.training import policy_arguments

LIMIT = 1.25
"""Times the seven tokens' time, at most."""
REFERENCES = ("7 tokens, plain", "7 tokens, static")


def measure(baseline: str, size: str, batches: list[int], device: str, repeats: int) -> dict:
    """
    Args:
        repeats: rounds that count, after two that do not.
    """
    policy, resolution = string_policy(baseline, size)
    policy = policy.eval().to(device)
    rows = [row for batch in batches for row in _rows(policy, _batch_of(policy, resolution, batch, device), repeats)]
    about = {"bench": "decode", "baseline": baseline, "size": size, "device": describe(device), "repeats": repeats}
    return about | {"limit": LIMIT, "rows": rows}


def string_policy(baseline: str, size: str) -> tuple[StringPolicy, int]:
    """Random weights, and the side of the frames."""
    strings = ("policy.actions=string", "normalization=q99", "chunk=1")
    cfg = compose_config("train", f"baseline={baseline}", f"size={size}", *strings)
    unit = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    state = {name: [value] * STATE for name, value in unit.items()}
    statistics = ActionStatistics(**{name: [value] * DIMS for name, value in unit.items()}, count=1, state=state)
    torch.manual_seed(0)
    policy = build_policy(baseline, statistics, cfg.normalization, policy_arguments(cfg))
    with torch.no_grad():
        head = speaker(policy)[0].head
        for character in "1,":
            head[policy.characters[ALPHABET.index(character)]] = head[policy.characters[ALPHABET.index("0")]]
    return policy, cfg.benchmark.resolution


def _batch_of(policy: StringPolicy, resolution: int, rows: int, device: str) -> dict:
    one = observation(policy.cameras, resolution, device)
    images = {camera: frames.expand(rows, -1, -1, -1) for camera, frames in one["images"].items()}
    return {"images": images, "instruction": one["instruction"] * rows}


def _ways(policy: StringPolicy, model: TextModel) -> dict[str, Callable[[Prefix], list]]:
    def tokens(say: Callable, prefix: Prefix) -> list[list[int]]:
        return say(
            model.model, model.logits, prefix.hidden, prefix.cache, prefix.seen, prefix.position, count=DIMS
        ).tolist()

    ways = {REFERENCES[0]: partial(tokens, plain_tokens)}
    if supports(model.model):
        ways[REFERENCES[1]] = partial(tokens, likeliest_tokens)
    for name, say in (("plain", decode_plain), ("fast", decode)):
        for form in FORMS:
            arguments = dict(grammar=Grammar(form), characters=policy.characters, steps=1)
            ways[f"text ({form}), {name}"] = partial(say, model, **arguments)
    return ways


@torch.inference_mode()
def _rows(policy: StringPolicy, batch: dict, repeats: int) -> list[dict]:
    model, prompts = policy.prompts(batch["instruction"])
    ways = _ways(policy, model)
    said = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    passes = {name: 0 for name in ways}
    for _ in range(repeats + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            prefix = model.read_ids(policy.seen_by(policy.encode_images(policy.prepare(batch["images"]))), prompts)
            prefix.hidden.sum().item()  # until here, on a GPU too
            counter = model.model.layers[0].mlp.act_fn.register_forward_hook(partial(_count, passes, name))
            read = time.perf_counter()
            said[name] = way(prefix)
            seconds[name].append((time.perf_counter() - read, time.perf_counter() - start))
            counter.remove()
    rows = []
    for name, times in seconds.items():
        row = {"batch": len(prompts), "way": name, "passes": passes[name] // (repeats + 2)}
        row["same"] = said[name] == said[name.replace("fast", "plain").replace("static", "plain")]
        for column, part in (("decode", 0), ("action", 1)):
            values = [1000 * pair[part] for pair in times[2:]]
            row[column] = {"median": statistics.median(values), "quartiles": statistics.quantiles(values, n=4)[::2]}
            for reference in REFERENCES[: 2 if REFERENCES[1] in ways else 1]:
                pairs = zip(times[2:], seconds[reference][2:], strict=True)
                row[column][reference] = statistics.median(a[part] / b[part] for a, b in pairs)
        rows.append(row)
    return rows


def _count(passes: dict[str, int], name: str, *_) -> None:
    passes[name] += 1


def show(result: dict) -> Table:
    title = "{baseline} {size}, random weights, one action; {device}; {repeats} rounds, medians (quartiles)"
    table = Table(title=title.format(**result), title_justify="left", caption=verdict(result), caption_justify="left")
    table.add_column("batch")
    table.add_column("way")
    for column in ("passes", "decode ms", "÷ plain", "÷ static", "action ms", "÷ plain", "÷ static"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = [str(row["batch"]), row["way"] + ("" if row["same"] else " (differs)"), str(row["passes"])]
        for column in ("decode", "action"):
            low, high = row[column]["quartiles"]
            cells.append(f"{row[column]['median']:.1f} ({low:.1f}–{high:.1f})")
            cells += [f"{row[column][r]:.2f}" if r in row[column] else "" for r in REFERENCES]
        table.add_row(*cells)
    return table


def verdict(result: dict) -> str:
    """Which of the fast texts' ratios are within the limit."""
    lines = [f"÷ plain, ÷ static: over seven tokens said either way. Limit of text, fast: {result['limit']}."]
    for row in result["rows"]:
        if not row["way"].endswith("fast"):
            continue
        marks = [
            f"{column} {row[column][reference]:.2f} of {reference}: "
            + ("met" if row[column][reference] <= result["limit"] else "not met")
            for column in ("decode", "action")
            for reference in REFERENCES
            if reference in row[column]
        ]
        lines.append(f"batch {row['batch']}, {row['way']}: " + "; ".join(marks))
    return "\n".join(lines)
