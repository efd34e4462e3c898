"""Milliseconds of a policy directory: `predict` alone, and the same observation through its server, one client.

`evaluation=latency` writes the result as latency.json. The difference of the two is what the socket, the coding of the
images and the batching cost; the client runs in the same process, on a thread of its own.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from vla.bench.latency import describe, observation, time_predict
from vla.config import EvaluateConfig
from vla.policy import Policy

PERCENTILES = (50, 90, 99)


def latency_of(policy: Policy, about: dict[str, Any], cfg: EvaluateConfig) -> dict[str, Any]:
    """{"predict": times, "server": times} of `evaluation.repeats` calls each, and what they were taken with."""
    sample = observation(policy.cameras, cfg.benchmark.resolution, cfg.device)
    if state := policy.normalizer.statistics.state:
        sample["state"] = torch.tensor([state["mean"]], device=cfg.device)
    repeats = cfg.evaluation.repeats
    facts = {"device": describe(cfg.device), "chunk": policy.chunk, "cameras": len(policy.cameras), "repeats": repeats}
    return facts | {
        "resolution": cfg.benchmark.resolution,
        "predict": times(time_predict(policy, sample, repeats), policy.chunk),
        "server": times(time_served(policy, about, sample, repeats, cfg.device), policy.chunk),
    }


def time_served(
    policy: Policy, about: dict[str, Any], sample: dict[str, Any], repeats: int, device: str
) -> list[float]:
    """Seconds from an observation in numpy to its actions in numpy; two calls before do not count."""
    from vla.cli import compose_config
    from vla.serving.client import PolicyClient
    from vla.serving.server import serve

    cfg = compose_config("serve", "policy=none", "port=0", f"device={device}")
    seconds = []
    with serve(policy, cfg, about) as port, PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=600) as client:
        keys = client.metadata
        images = {keys["cameras"][camera]: frames[0].permute(1, 2, 0) for camera, frames in sample["images"].items()}
        message = {key: np.ascontiguousarray(frame.cpu().numpy()) for key, frame in images.items()}
        message |= {keys["state"]: sample["state"][0].cpu().numpy(), keys["prompt"]: sample["instruction"][0]}
        for _ in range(repeats + 2):
            start = time.perf_counter()
            client.infer(message)
            seconds.append(time.perf_counter() - start)
    return seconds[2:]


def times(seconds: list[float], chunk: int) -> dict[str, float]:
    """Percentiles of ms per chunk (one call), and of ms per action with the whole chunk executed."""
    found = {f"p{q}": float(np.percentile(seconds, q) * 1000) for q in PERCENTILES}
    return {f"{p}_ms": ms for p, ms in found.items()} | {f"{p}_ms_per_action": ms / chunk for p, ms in found.items()}


def tell(result: dict[str, Any]) -> list[str]:
    """A line for each way."""
    lines = []
    for way in ("predict", "server"):
        per_action = " / ".join(f"{result[way][f'p{q}_ms_per_action']:.1f}" for q in PERCENTILES)
        per_chunk = " / ".join(f"{result[way][f'p{q}_ms']:.1f}" for q in PERCENTILES)
        chunk, calls = result["chunk"], result["repeats"]
        lines.append(
            f"{way}: {per_action} ms per action (p50 / p90 / p99), {per_chunk} per chunk of {chunk}, n = {calls}"
        )
    return lines
