"""Behaviour cloning on frozen visual tokens, a head per task: IDL §4.4, A.6, tables 3 and 4.

What is frozen is the vision encoder of an exported policy; a head (vla/analysis/mlp_probe.py) reads the static view's
tokens and predicts a chunk of four actions. Heads lie in <results>/probes/<task>.{json,safetensors} and are not trained
again; the rollouts that follow are those of any policy, with the head chosen by the instruction.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data.libero import instruction_of
from data.sampler import PairDataset
from vla.analysis.features import TaskFeatures
from vla.analysis.mlp_probe import Fit, ProbeHead, ProbeSettings, cloning_loss, fit_probe, split_demonstrations
from vla.errors import UserError
from vla.policy import GRIPPER, Policy


@dataclass(frozen=True)
class CloningSettings(ProbeSettings):
    chunk: int
    gripper_weight: float
    validation: float


@dataclass(frozen=True)
class CloningTask:
    """What one head is trained on; picklable, so that tasks can be spread over processes."""

    name: str
    features: Path
    actions: np.ndarray  # (n, H, 7)
    valid: np.ndarray  # (n, H)
    held_out: np.ndarray  # (n,)


def train_heads(
    features: TaskFeatures, tasks: Iterable[str], out: Path, settings: CloningSettings, workers: int, on_disk: bool
) -> None:
    """A head per task into `out`/probes where it is not there yet, `workers` at a time (one where `on_disk` is off).

    Args:
        on_disk: read tokens from the features' files; otherwise encode every batch, which is slow and takes no disk.
    """
    todo = [task for task in tasks if not (out / "probes" / f"{task}.json").exists()]
    (out / "probes").mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("behaviour cloning probes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task("", total=len(todo))
        if not on_disk or workers < 2 or features.device != "cpu":
            for task in todo:
                job = describe(features, task, settings.chunk, settings.validation, on_disk)
                save(out / "probes", task, train_head(job, settings, features, on_disk), settings)
                features.forget(task)
                bar.advance(shown)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            # Encoded here, one after the other, while heads of the tasks before are trained there.
            futures = {}
            for task in todo:
                job = describe(features, task, settings.chunk, settings.validation, on_disk)
                futures[pool.submit(_in_process, job, settings)] = task
            for future in as_completed(futures):
                save(out / "probes", futures[future], future.result(), settings)
                features.forget(futures[future])
                bar.advance(shown)


def describe(features: TaskFeatures, task: str, chunk: int, share: float, on_disk: bool) -> CloningTask:
    store, samples = features.store, features.samples(task)
    targets = PairDataset(store, chunk, [], None).targets(samples)
    if on_disk:
        features.load(task)
    held_out = split_demonstrations(store.episode_of[store.samples[samples]], share)
    actions, valid = targets["actions"].numpy(), targets["action_valid"].numpy()
    return CloningTask(task, features.path(task), actions, valid, held_out)


def train_head(task: CloningTask, settings: CloningSettings, features: TaskFeatures | None, on_disk: bool) -> Fit:
    device = "cpu" if features is None else features.device
    actions, valid = torch.from_numpy(task.actions).to(device), torch.from_numpy(task.valid).to(device)
    if on_disk:
        stored = np.load(task.features, mmap_mode="r")
        shape = stored.shape[1:]

        def tokens(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(stored[rows])
    else:
        shape, samples = features.shape, features.samples(task.name)

        def tokens(rows: np.ndarray) -> Tensor:
            return features.encode(samples[rows]).clone()  # out of inference mode

    def loss(predicted: Tensor, rows: np.ndarray) -> Tensor:
        return cloning_loss(predicted, actions[rows], valid[rows], settings.gripper_weight)

    train, validation = np.flatnonzero(~task.held_out), np.flatnonzero(task.held_out)
    return fit_probe(tokens, loss, shape, 7 * settings.chunk, train, validation, settings, device)


def _in_process(task: CloningTask, settings: CloningSettings) -> Fit:
    torch.set_num_threads(1)
    return train_head(task, settings, None, on_disk=True)


def save(folder: Path, task: str, fit: Fit, settings: CloningSettings) -> None:
    """The head, and last the JSON that says it is done."""
    from vla.files import write_atomic

    partial = folder / f".{task}.safetensors.partial"
    safetensors.torch.save_file({k: v.cpu() for k, v in fit.head.state_dict().items()}, partial)
    partial.replace(folder / f"{task}.safetensors")
    curve = [round(value, 6) for value in fit.train_curve]
    numbers = {"task": task, "train": fit.train, "validation": fit.validation, "train_curve": curve}
    write_atomic(folder / f"{task}.json", json.dumps(numbers | {"validation_curve": fit.validation_curve}))


def load_losses(out: Path) -> list[dict]:
    """What `save` wrote, by task name."""
    return [json.loads(file.read_text()) for file in sorted((out / "probes").glob("*.json"))]


class ProbedPolicy:
    """A frozen encoder and a head per instruction, as envs.rollout runs policies.

    Args:
        heads: instruction → head.
    """

    def __init__(self, policy: Policy, heads: dict[str, ProbeHead], chunk: int, device: str = "cpu"):
        self.policy, self.heads, self.chunk, self.device = policy, heads, chunk, device
        self.cameras, self.instructions = policy.cameras[:1], set(heads)

    def predict(self, observation: dict) -> Tensor:
        """(B, H, 7) in the data set's units, gripper in {0, 1}."""
        camera = self.cameras[0]
        images = {camera: observation["images"][camera].to(self.device)}
        tokens = self.policy.encode_images(self.policy.prepare(images))[camera].tap.float()
        rows = [self.heads[told](row[None]) for told, row in zip(observation["instruction"], tokens, strict=True)]
        actions = torch.cat(rows).view(-1, self.chunk, 7)
        return torch.cat([actions[..., :GRIPPER], (actions[..., GRIPPER:] > 0).float()], dim=-1)


def probed_policy(policy: Policy, out: Path, settings: CloningSettings, device: str) -> ProbedPolicy:
    """The heads of `out`/probes on the encoder they were trained on."""
    shape, heads = policy.tap_shape(), {}
    for losses in load_losses(out):
        head = ProbeHead(*shape, 7 * settings.chunk, settings.dropout)
        head.load_state_dict(safetensors.torch.load_file(out / "probes" / f"{losses['task']}.safetensors"))
        told = instruction_of(losses["task"])
        if told in heads:
            raise UserError(f"two tasks are told {told!r}, so the head cannot be chosen by it; narrow benchmark.tasks")
        heads[told] = head.eval().to(device)
    return ProbedPolicy(policy, heads, settings.chunk, device)
