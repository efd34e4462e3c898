"""Milliseconds from an observation to an action chunk, for each baseline and size, random weights, batch 1.

Beside it, in turns with it, the same model and weights acting the straightforward way (STRAIGHTFORWARD), which is its
reference's and transformers', and compiled (vla/compiled.py) where that is asked for. Weights do not change the time,
so nothing is downloaded; a model that the device cannot hold is said to be unmeasured.
"""

from __future__ import annotations

import copy
import gc
import os
import platform
import statistics
import time

import torch
from rich.progress import Progress
from rich.table import Table

from data.normalization import ActionStatistics
from vla.build import build_policy
from vla.cli import compose_config
from vla.compiled import compile_policy
from vla.flops import FlopCounter, measured_bandwidth, measured_rate
from vla.policy import Policy
from vla.policy_configs import POLICIES
from vla.training import policy_arguments

STATE = 8  # LIBERO's proprioception
MARGIN = 1.15  # of the weights' size: activations, caches, what building a model needs on top
STRAIGHTFORWARD = {
    "flower": "Euler steps of the whole flow transformer",
    "openvla": "transformers' decoder, token by token",
    "pi0": "the loop of transformers' sample_actions",
}
LIMIT = 0.67
"""Of the straightforward way's time, for the two that sample a flow."""


def measure(
    baselines: list[str], sizes: list[str], device: str, dtype: str, repeats: int, compiled: bool = False
) -> dict:
    """Median, fastest and slowest of `repeats` calls of `predict` after two that do not count.

    Args:
        dtype: float32 or bfloat16, of the weights.
        compiled: measure a compiled policy too.
    """
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(baselines) * len(sizes))
        for baseline in baselines:
            for size in sizes:
                progress.update(task, description=f"{baseline} {size}")
                measured = _row(baseline, size, device, dtype, repeats, compiled)
                rows.append({"baseline": baseline, "size": size} | measured)
                progress.advance(task)
    return {"bench": "latency", "device": describe(device), "dtype": dtype, "repeats": repeats, "rows": rows}


def _row(baseline: str, size: str, device: str, dtype: str, repeats: int, compiled: bool) -> dict:
    with torch.device("meta"):
        sketch, cfg = random_policy(baseline, size)
    parameters = sum(p.numel() for p in sketch.parameters())
    facts = {"parameters": parameters, "chunk": cfg.chunk, "cameras": len(cfg.cameras)}
    needed = MARGIN * parameters * (4 if dtype == "float32" else 2)
    if needed > free_bytes(device):
        return facts | {"unmeasured": f"needs {needed / 2**30:.0f} GB, {free_bytes(device) / 2**30:.0f} are free"}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # built in it, since fp32 first would need twice the memory
    try:
        torch.manual_seed(0)
        policy, _ = random_policy(baseline, size)
    finally:
        torch.set_default_dtype(previous)
    policy = policy.eval().to(device)
    sample, ways = observation(cfg.cameras, cfg.benchmark.resolution, device), {"own": policy}
    if baseline in STRAIGHTFORWARD:
        ways["straightforward"] = copy.copy(policy)
        ways["straightforward"].fast = False
    if compiled:
        ways["compiled"] = compile_policy(copy.copy(policy), device, cfg.benchmark.resolution)
    seconds = time_in_turns(ways, sample, repeats)
    facts["limit_ms"] = 1000 * limit(policy, sample, device, getattr(torch, dtype))
    del policy, ways
    gc.collect()
    own = [1000 * value for value in seconds["own"]]
    facts |= {"ms_per_chunk": statistics.median(own), "fastest": min(own), "slowest": max(own)}
    for way in seconds.keys() - {"own"}:
        facts[f"{way}_ms"] = 1000 * statistics.median(seconds[way])
    return facts | {f"{way}_ratio": ratio for way, ratio in _ratios(seconds).items()}


def limit(policy: Policy, sample: dict, device: str, dtype: torch.dtype) -> float:
    """Seconds below which no call can be here: its FLOPs, or one reading of its weights, at the measured rates."""
    with FlopCounter() as counter, torch.inference_mode():
        policy.predict(sample)
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    return max(counter.total / measured_rate(device, dtype), weights / measured_bandwidth(device))


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the turns of each way's time over the straightforward one's."""
    plain = seconds.get("straightforward")
    return {
        way: statistics.median(a / b for a, b in zip(times, plain, strict=True))
        for way, times in seconds.items()
        if plain and times is not plain
    }


def random_policy(baseline: str, size: str, *overrides: str) -> tuple[Policy, object]:
    """The policy of a configuration with random weights in place of released ones, and the configuration."""
    sources = [name for name in POLICIES[baseline].__dataclass_fields__ if name.startswith("pretrained")]
    released = [f"policy.{name}=null" for name in sources] if size == "full" else []
    cfg = compose_config("train", f"baseline={baseline}", f"size={size}", *released, *overrides)
    unit = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    state = {name: [value] * STATE for name, value in unit.items()}
    statistics = ActionStatistics(**{name: [value] * 7 for name, value in unit.items()}, count=1, state=state)
    return build_policy(baseline, statistics, cfg.normalization, policy_arguments(cfg)), cfg


def observation(cameras: list[str], resolution: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 3, resolution, resolution), dtype=torch.uint8, generator=generator)
    return {
        "images": {camera: frames.to(device) for camera in cameras},
        "state": torch.zeros(1, STATE, device=device),
        "instruction": ["put the wine bottle on top of the cabinet"],
        "seed": torch.zeros(1, dtype=torch.long),
        "step": torch.zeros(1, dtype=torch.long),
    }


def time_predict(policy: Policy, observation: dict, repeats: int) -> list[float]:
    return time_in_turns({"own": policy}, observation, repeats)["own"]


@torch.inference_mode()
def time_in_turns(policies: dict[str, Policy], observation: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, one after the other, so that what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(repeats + 2):
        for name, policy in policies.items():
            start = time.perf_counter()
            policy.predict(observation).cpu()  # to the host: the time includes what is queued on a GPU
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def show(result: dict) -> Table:
    title = f"predict, batch 1, {result['dtype']}, random weights; {result['device']}; {result['repeats']} calls each"
    caption = "\n".join(
        [f"ratio: time over the straightforward way's, in turns; at most {LIMIT} for flower and pi0"]
        + ["limit: ms that its FLOPs, or one reading of its weights, take at the rates measured on this device"]
        + [f"{baseline}: {way}" for baseline, way in STRAIGHTFORWARD.items()]
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("baseline", "size"):
        table.add_column(column)
    columns = ("parameters", "cameras", "chunk", "ms per chunk (median)", "range", "ms per action")
    columns += ("straightforward", "ratio", "compiled", "ratio", "limit")
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["rows"]:
        start = (row["baseline"], row["size"], _count(row["parameters"]), str(row["cameras"]), str(row["chunk"]))
        if reason := row.get("unmeasured"):
            table.add_row(*start, "unmeasured", reason)
            continue

        def told(name: str, digits: int, row=row) -> str:
            return f"{row[name]:.{digits}f}" if name in row else "–"

        median = row["ms_per_chunk"]
        table.add_row(
            *start,
            f"{median:.1f}",
            f"{row['fastest']:.1f}–{row['slowest']:.1f}",
            f"{median / row['chunk']:.1f}",
            told("straightforward_ms", 1),
            told("own_ratio", 2),
            told("compiled_ms", 1),
            told("compiled_ratio", 2),
            told("limit_ms", 1),
        )
    return table


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
