"""A step whose loss is not finite: stopped or skipped as configured, written down, replayed, and never saved.

The fault is a real one: one action of the data is NaN, so that every sample whose chunk holds it gives a NaN loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.frame_store import FrameStore
from data.sampler import sample_at
from data.store_writer import write_store
from scripts.replay_nan import replay
from tests.conftest import make_episodes, train_config
from tests.faults.training import SMALL, metrics, weights
from train import train
from vla.cli import CONF
from vla.errors import UserError
from vla.module import VLAModule
from vla.run_identity import run_dir
from vla.saving import STATE, saved, step_of

STEPS, CHUNK, BAD = 16, 8, 12


@pytest.fixture(scope="module")
def bad_store(tmp_path_factory) -> FrameStore:
    """The usual episodes; the first number of action BAD became NaN after the store was made."""
    path = tmp_path_factory.mktemp("bad") / "store"
    write_store(make_episodes(), path, reader={"image_rotation": "rotate180"})
    row = FrameStore(path).actions[BAD]
    (shard,) = path.glob("shard-*.arrow")
    content = shard.read_bytes()
    assert content.count(row.tobytes()) == 1
    shard.write_bytes(content.replace(row.tobytes(), np.array([np.nan, *row[1:]], np.float32).tobytes()))
    return FrameStore(path)


def faulty_steps(store: FrameStore) -> list[int]:
    """By the sampler's definition: one pair a step (batch_size=2, data.pairs=shared), frames 8 steps apart."""
    found = []
    for step in range(STEPS):
        sample = store.samples[sample_at(np.array([step]), len(store.samples), seed=0)[0]]
        later = store.last_frame[min(sample + CHUNK, store.last_step[sample])]
        spans = [range(t, min(t + CHUNK, store.last_step[t] + 1)) for t in (sample, later)]
        found += [step] if any(BAD in span for span in spans) else []
    return found


def config(store: FrameStore, root: Path, *overrides: str):
    return train_config(store.path, root, *SMALL, f"max_steps={STEPS}", "trainer.keep_checkpoints=-1", *overrides)


def state(folder: Path) -> dict:
    return torch.load(folder / STATE, weights_only=True)


def test_stop_saves_nothing_after_the_last_checkpoint_and_can_be_replayed(bad_store, tmp_path):
    first = faulty_steps(bad_store)[0]
    cfg = config(bad_store, tmp_path)
    with pytest.raises(
        UserError, match=rf"the loss is nan at step {first}, .* scripts/replay_nan.py (.*/nan/step={first}) "
    ):
        train(cfg)
    run = run_dir(cfg)
    assert [step_of(path) for path in saved(run)] == list(range(2, first + 1, 2)) and not (run / "policy").exists()
    recorded = json.loads((run / "nan" / f"step={first}" / "rank=0.json").read_text())
    assert recorded["losses"][0]["total"] == "nan" and recorded["gradient_norm"] == "nan"
    assert recorded["batches"] == [sample_at(np.array([first]), len(bad_store.samples), seed=0).tolist()]
    assert recorded["checkpoint"] == saved(run)[-1].name and recorded["key"] == f"0/{first}/0"

    before = sorted(run.rglob("*"))
    then, now = replay(run / "nan" / f"step={first}")
    assert then == recorded and all(now[key] == then[key] for key in then if key != "checkpoint")
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
def test_the_replay_command(bad_store, tmp_path):
    """The third of the faulty steps, after two that were skipped; then from data without the fault."""
    cfg = config(bad_store, tmp_path, "trainer.on_nan=skip", "trainer.max_skipped=2")
    with pytest.raises(UserError, match=r"scripts/replay_nan\.py"):
        train(cfg)
    folder = run_dir(cfg) / "nan" / f"step={faulty_steps(bad_store)[2]}"
    recorded = json.loads((folder / "rank=0.json").read_text())
    command = [sys.executable, str(CONF.parent / "scripts" / "replay_nan.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(recorded["losses"])) == 2 and "repeated: it is the data" in done.stdout
    (shard,) = bad_store.path.glob("shard-*.arrow")
    content, clean = shard.read_bytes(), np.nan_to_num(bad_store.actions[BAD]).tobytes()
    try:
        shard.write_bytes(content.replace(bad_store.actions[BAD].tobytes(), clean))
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        shard.write_bytes(content)
    assert done.returncode == 1 and "not repeated" in done.stdout and "without a fault" in done.stdout
    done = subprocess.run([*command[:2], str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1


def test_skip_leaves_everything_as_it_was_but_the_schedule_and_the_data(bad_store, tmp_path):
    faulty = faulty_steps(bad_store)
    assert len(faulty) == 3 and faulty[2] == faulty[1] + 1, "two of them in a row"
    cfg = config(bad_store, tmp_path, "trainer.on_nan=skip", "trainer.checkpoint_every=1", "optim.weight_decay=0.1")
    policy = train(cfg)
    run, rows = run_dir(cfg), metrics(run_dir(cfg))
    assert [int(row["step"]) for row in rows if row["total"] == "nan"] == faulty
    assert [float(row["skipped"]) for row in rows] == [sum(f <= step for f in faulty) for step in range(STEPS)]
    assert json.loads((policy / "config.json").read_text())["about"]["skipped_steps"] == len(faulty)
    for step in (step for step in faulty if step):
        old, new = state(run / "checkpoints" / f"step={step}"), state(run / "checkpoints" / f"step={step + 1}")
        for name in ("state_dict", "current_model_state"):  # the average, the weights
            assert all(torch.equal(value, new[name][key]) for key, value in old[name].items())
        for a, b in zip(*(s["optimizer_states"][0]["state"].values() for s in (old, new)), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        assert new["averaging_state"] == old["averaging_state"]
        assert new["lr_schedulers"][0]["last_epoch"] == old["lr_schedulers"][0]["last_epoch"] + 1
    for folder in saved(run):
        assert all(value.isfinite().all() for value in state(folder)["current_model_state"].values())


def test_a_resumed_run_counts_what_was_skipped_before(bad_store, tmp_path):
    """At most max_skipped in all, not in each start; and the resumed run is the uninterrupted one."""
    faulty = faulty_steps(bad_store)
    options = ("trainer.on_nan=skip", "trainer.checkpoint_every=1")
    whole = train(config(bad_store, tmp_path / "whole", *options))
    cfg = config(bad_store, tmp_path / "halves", *options)
    strict = replace(cfg.trainer, max_skipped=len(faulty) - 1)
    with pytest.raises(UserError, match=rf"at step {faulty[-1]}, .*max_skipped={len(faulty) - 1} "):
        train(replace(cfg, trainer=strict))
    with pytest.raises(UserError, match=rf"at step {faulty[-1]}, "):
        train(replace(cfg, trainer=strict, resume="auto"))
    resumed = train(replace(cfg, resume="auto"))
    assert weights(resumed) == weights(whole) and metrics(resumed.parent) == metrics(whole.parent)


def test_a_gradient_that_is_not_finite_counts_the_same(store, tmp_path, monkeypatch):
    """sqrt(0)'s derivative is infinite, and 0 · inf is NaN: the loss stays finite."""
    real = VLAModule.losses

    def losses(self, batch):
        found, weight = real(self, batch), next(self.policy.parameters())
        if self.global_step == 3:
            found["total"] = found["total"] + (weight.sum() * 0).abs().sqrt()
        return found

    monkeypatch.setattr(VLAModule, "losses", losses)
    cfg = config(store, tmp_path)
    with pytest.raises(UserError, match=r"the loss is 0\.\d+ at step 3, the norm of its gradient nan"):
        train(cfg)
    assert [step_of(path) for path in saved(run_dir(cfg))] == [2]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(store, tmp_path, monkeypatch):
    """An update that overflows, or a memory fault: loss and gradient of the step were finite."""
    real = VLAModule.optimizer_step

    def optimizer_step(self, *arguments):
        real(self, *arguments)
        if self.global_step == 1:
            with torch.no_grad():
                next(self.policy.parameters()).view(-1)[0] = torch.inf

    monkeypatch.setattr(VLAModule, "optimizer_step", optimizer_step)
    cfg = config(store, tmp_path / "a", "trainer.checkpoint_every=1")
    with pytest.raises(UserError, match="weights are not finite after step 2; nothing was saved"):
        train(cfg)
    assert [path.name for path in (run_dir(cfg) / "checkpoints").iterdir()] == ["step=1"]
    cfg = config(store, tmp_path / "b", "trainer.checkpoint_every=100", "max_steps=2")
    with pytest.raises(UserError, match="weights are not finite after step 2; nothing was exported"):
        train(cfg)
    assert not (run_dir(cfg) / "policy").exists()


def test_an_unknown_choice_is_named(store, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.on_nan=ignore is not known; choose stop or skip"):
        train(config(store, tmp_path, "trainer.on_nan=ignore"))
