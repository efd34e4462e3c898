"""Two real processes (gloo, CPU, fp32), started by train.py as a user starts it, against one.

One process with trainer.accumulate=2 has the same parts of every batch, and so the same random draws: augmentation,
reversal, flow noise and times, dropout are all on. Its losses are theirs to 1e-5 relative, step by step, and its
weights to 2e-5 after six steps. (Adam makes up to its rate, 2e-3, of a gradient that is zero up to rounding, as that of
a key's bias is.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import train_config
from tests.test_parallel import assert_same_run, losses_of
from train import train
from vla.checkpoint import checkpoint_hash
from vla.cli import CONF
from vla.run_identity import run_dir

ROOT = CONF.parent
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0", "trainer.threads=1")
SMALL = ("batch_size=8", "max_steps=6", "optim.warmup_steps=2", "trainer.log_every=1", "trainer.precision=32-true")


def environment() -> dict[str, str]:
    """Without what a launcher around the tests may have set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "LOCAL_RANK", "WORLD_SIZE"))}


def launch(
    store, root: Path, *overrides: str, code: int = 0, runner: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    words = (f"data.path={store.path}", f"run_root={root}", *SMALL, *overrides)
    command = [*(runner or (sys.executable,)), str(ROOT / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=900)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def policy_in(root: Path) -> Path:
    (found,) = root.glob("*/policy")
    return found


@pytest.mark.slow
def test_two_processes_are_one_with_two_passes(store, tmp_path):
    """The fast tier's share: DDP, three steps."""
    one = train(train_config(store.path, tmp_path / "one", *SMALL, "max_steps=3", "trainer.accumulate=2"))
    done = launch(store, tmp_path / "two", "max_steps=3", "trainer=ddp", *TWO)
    assert_same_run(one, policy_in(tmp_path / "two"), atol=2e-5)
    assert done.stdout.count("policy in") == 1, "the first process alone prints"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("arm", ["vanilla", "ptr"])
@pytest.mark.parametrize("baseline", ["vlm4vla", "flower"])
def test_losses_and_weights_are_those_of_one_process(baseline, arm, trainer, store, tmp_path):
    options = (f"baseline={baseline}", f"ablation={arm}")
    one = train(train_config(store.path, tmp_path / "one", *SMALL, *options, "trainer.accumulate=2"))
    launch(store, tmp_path / "two", *options, f"trainer={trainer}", *TWO)
    assert len(losses_of(one)["step"]) == 6
    assert_same_run(one, policy_in(tmp_path / "two"), atol=2e-5)


@pytest.mark.slow
def test_a_mean_over_tokens_is_that_of_the_whole_batch(store, tmp_path):
    """SpatialVLA's chunks that run past the episode leave each process another number of tokens; nothing is random."""
    options = ("baseline=spatialvla", "ablation=vanilla", "augment.shift.static=0", "augment.brightness=0.0")
    options += ("augment.crop.static=1.0",)
    one = train(train_config(store.path, tmp_path / "one", *SMALL, *options))
    launch(store, tmp_path / "two", *options, "trainer=ddp", *TWO)
    assert_same_run(one, policy_in(tmp_path / "two"), atol=2e-5, leave_out=("token_accuracy",))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_resumed_they_go_on_bit_equal(trainer, store, tmp_path):
    """With the average of the weights and recomputed blocks: the state of a run that died at step 5 of 6."""
    options = (f"trainer={trainer}", *TWO, "ablation=ptr", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=5")
    options += ("trainer.activation_checkpointing=true", "optim.ema=0.9")
    launch(store, tmp_path / "whole", *options)
    whole = policy_in(tmp_path / "whole")
    run = tmp_path / "halves" / whole.parent.name
    shutil.copytree(whole.parent, run)
    shutil.rmtree(run / "policy")
    shutil.rmtree(run / "checkpoints" / "step=6")
    launch(store, tmp_path / "halves", *options, "resume=auto")
    assert checkpoint_hash(run / "policy") == checkpoint_hash(whole)
    assert losses_of(run / "policy") == losses_of(whole)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(store, tmp_path):
    """DDP's checkpoints are whole: step 4 to 6 in one process, with as many parts."""
    launch(store, tmp_path / "two", "trainer=ddp", *TWO, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=5")
    two = policy_in(tmp_path / "two")
    cfg = train_config(store.path, tmp_path / "one", *SMALL, "trainer.accumulate=2", "trainer.checkpoint_every=2")
    cfg = replace(cfg, resume="auto")
    shutil.copytree(two.parent, run_dir(cfg))
    shutil.rmtree(run_dir(cfg) / "policy")
    shutil.rmtree(run_dir(cfg) / "checkpoints" / "step=6")
    assert_same_run(two, train(cfg), atol=2e-5)


@pytest.mark.slow
def test_torchrun_starts_them_too(store, tmp_path):
    runner = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    launch(store, tmp_path / "torchrun", "max_steps=2", "trainer=fsdp", *TWO, runner=runner)
    launch(store, tmp_path / "own", "max_steps=2", "trainer=fsdp", *TWO)
    assert checkpoint_hash(policy_in(tmp_path / "torchrun")) == checkpoint_hash(policy_in(tmp_path / "own"))


@pytest.mark.slow
def test_a_sweep_does_not_start_processes_of_its_own_command_line(store, tmp_path):
    done = launch(store, tmp_path / "runs", "seed=0,1", "trainer=ddp", *TWO, "-m", code=2)
    assert "trainer.devices=2 in a sweep: start each run by a command of its own" in done.stderr
