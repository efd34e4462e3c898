"""Checkpoints that are damaged, missing or cannot be written: named, skipped, never half there, never lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.frame_store import FrameStore
from tests.conftest import train_config
from tests.faults.training import SMALL, command, finish, launch, metrics, weights
from train import train
from vla import saving
from vla.errors import UserError
from vla.run_identity import run_dir
from vla.saving import MANIFEST, STATE, About, aside, damage, drop_older, newest_whole, saved, seal


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    """A run of six steps with the checkpoints of steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("trained")
    return train(config(store, root)).parent


def config(store: FrameStore, root: Path, *overrides: str):
    return train_config(store.path, root, *SMALL, "max_steps=6", "trainer.keep_checkpoints=-1", *overrides)


def damaged_copy(trained: Path, store: FrameStore, root: Path):
    """(configuration, run folder) of a copy of `trained` that died before its export."""
    cfg = config(store, root)
    shutil.copytree(trained, run_dir(cfg))
    shutil.rmtree(run_dir(cfg) / "policy")
    return cfg, run_dir(cfg)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


FAULTS = {
    "truncate": truncate,
    "flip": flip,
    "zero": zero,
    "empty": lambda path: path.write_bytes(b""),
    "delete": os.remove,
}


@pytest.mark.parametrize("name", [STATE, MANIFEST])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_named_skipped_and_kept(fault, name, trained, store, tmp_path, capsys):
    cfg, run = damaged_copy(trained, store, tmp_path)
    FAULTS[fault](run / "checkpoints" / "step=6" / name)
    left = {path.name: path.read_bytes() for path in (run / "checkpoints" / "step=6").iterdir()}
    with pytest.raises(UserError, match="resume=auto"):
        train(cfg)
    newest, wrong = saving.newest_checkpoint("auto", run)
    assert newest.name == "step=4" and wrong == {"step=6"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{run / 'checkpoints' / 'step=6'} is damaged: {name} " in said[0]
    assert {path.name: path.read_bytes() for path in (run / "checkpoints" / "step=6").iterdir()} == left


def test_a_run_goes_on_from_the_one_before_and_sets_the_damaged_one_aside(trained, store, tmp_path):
    cfg, run = damaged_copy(trained, store, tmp_path)
    for name in ("step=6", "step=4"):
        flip(run / "checkpoints" / name / STATE)
    bad = (run / "checkpoints" / "step=4" / STATE).read_bytes()
    policy = train(replace(cfg, resume="auto", trainer=replace(cfg.trainer, keep_checkpoints=1)))
    assert weights(policy) == weights(trained / "policy") and metrics(run) == metrics(trained)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step=4.damaged1",
        "step=6",
        "step=6.damaged1",
    ]
    assert (run / "checkpoints" / "step=4.damaged1" / STATE).read_bytes() == bad
    assert damage(run / "checkpoints" / "step=6") is None


def test_none_whole_is_refused(trained, store, tmp_path):
    cfg, run = damaged_copy(trained, store, tmp_path)
    for folder in saved(run):
        flip(folder / STATE)
    with pytest.raises(UserError, match=r"none of the 3 checkpoints is whole; resume=never"):
        train(replace(cfg, resume="auto"))
    assert len(saved(run)) == 3


def test_checkpoints_of_an_older_version_are_named(store, tmp_path):
    cfg = config(store, tmp_path)
    (run_dir(cfg) / "checkpoints").mkdir(parents=True)
    (run_dir(cfg) / "checkpoints" / "step=500.ckpt").touch()
    with pytest.raises(UserError, match=r"step=500\.ckpt is of an older version; resume=never"):
        train(replace(cfg, resume="auto"))


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(trained, store, tmp_path):
    _, run = damaged_copy(trained, store, tmp_path)
    shutil.copytree(run / "checkpoints" / "step=6", run / "checkpoints" / ".step=8.partial")
    assert saving.newest_checkpoint("auto", run)[0].name == "step=6"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step=2", "step=4", "step=6"]


def test_killed_after_the_last_checkpoint_the_average_is_exported(trained, store, tmp_path):
    """Lightning takes no step then, and does not put the average in place of the weights."""
    cfg, _ = damaged_copy(trained, store, tmp_path)
    assert weights(train(replace(cfg, resume="auto"))) == weights(trained / "policy")
    assert weights(train(config(store, tmp_path / "plain", "optim.ema=0"))) != weights(trained / "policy")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(data, tmp_path_factory):
    """In any file of a checkpoint, those of a sharded one too, and in the manifest."""
    checkpoints = tmp_path_factory.mktemp("flipped")
    partial = aside(checkpoints, 3)
    for name in (f"{STATE}/.metadata", f"{STATE}/__0_0.distcp", f"{STATE}/meta.pt"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(data.draw(st.binary(min_size=1, max_size=50)))
    folder = seal(partial, About(3, 2, 8))
    assert damage(folder) is None
    victim = data.draw(st.sampled_from(saving.files_of(folder)))
    content = bytearray(victim.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    victim.write_bytes(content)
    assert victim.relative_to(folder).as_posix() in damage(folder)


def test_manifest_against_sha256sum(trained):
    """By another program."""
    folder = trained / "checkpoints" / "step=6"
    content = json.loads((folder / MANIFEST).read_text())
    assert {key: content[key] for key in ("step", "world_size", "batch_size")} == dict(
        step=6, world_size=1, batch_size=2
    )
    sums = subprocess.run(["sha256sum", STATE], cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    assert content["files"] == {STATE: {"bytes": (folder / STATE).stat().st_size, "sha256": sums[0]}}


def test_only_the_newest_are_kept_and_damaged_ones_are_not_counted(tmp_path):
    for step in range(1, 6):
        partial = aside(tmp_path / "checkpoints", step)
        (partial / STATE).write_bytes(b"x")
        seal(partial, About(step, 1, 1))
    drop_older(tmp_path, 2, {"step=4", "step=1"})
    assert [path.name for path in saved(tmp_path)] == ["step=1", "step=3", "step=4", "step=5"]
    assert newest_whole(tmp_path)[0].name == "step=5"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB: three checkpoints of 1.6 MB and no fourth."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_the_run_with_one_line_and_costs_no_checkpoint(asynchronous, small_disk, store, tmp_path):
    options = (f"trainer.async_checkpoints={asynchronous}", "max_steps=40")
    cfg = config(store, small_disk, *options)
    process = launch(cfg, tmp_path / "log")
    process.join(60)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    checkpoints = run_dir(cfg) / "checkpoints"
    assert process.exitcode == 2
    assert last == (
        f"error: the checkpoint at step 8 cannot be written to {checkpoints} (No space left on device); free space or "
        "mend its permissions, then resume=auto goes on from the one before"
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=2", "step=4", "step=6"]
    assert newest_whole(run_dir(cfg)) == (checkpoints / "step=6", {})
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert weights(finish(cfg, tmp_path / "log")) == weights(
        finish(config(store, tmp_path, *options), tmp_path / "log")
    )


def test_a_read_only_folder_stops_the_run_with_one_line(small_disk, store, tmp_path):
    """A PermissionError or its like is never taken for a save (Lightning #21800)."""
    cfg = config(store, small_disk, "max_steps=6", "trainer.keep_checkpoints=1")
    finish(cfg, tmp_path / "log")
    shutil.rmtree(run_dir(cfg) / "policy")
    shutil.rmtree(run_dir(cfg) / "checkpoints" / "step=6")
    checkpoints = run_dir(cfg) / "checkpoints"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", checkpoints], check=True)
    try:
        process = launch(cfg, tmp_path / "log")
        process.join(60)
    finally:
        subprocess.run(["umount", checkpoints], check=True)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 2 and f"cannot be written to {checkpoints} (Read-only file system)" in last
    assert not (run_dir(cfg) / "policy").exists()


def test_checkpoints_run_no_code(trained, store, tmp_path):
    """What pickle would execute is refused, here with a manifest that fits it."""
    cfg, run = damaged_copy(trained, store, tmp_path)
    canary = tmp_path / "canary"
    folder = run / "checkpoints" / "step=6"
    shutil.rmtree(folder)

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    partial = aside(run / "checkpoints", 6)
    torch.save({"state_dict": Payload()}, partial / STATE)
    seal(partial, About(6, 1, 2))
    torch.load(folder / STATE, weights_only=False)
    assert canary.exists()
    canary.rmdir()
    with pytest.raises(Exception, match="weights_only"):
        train(replace(cfg, resume="auto"))
    assert not canary.exists()


@pytest.mark.slow
def test_the_command_line_names_a_damaged_checkpoint(trained, store, tmp_path):
    cfg, run = damaged_copy(trained, store, tmp_path)
    for folder in saved(run):
        flip(folder / STATE)
    small = ("batch_size=4", "max_steps=6", "optim.warmup_steps=2", "trainer.log_every=1", "trainer.precision=32-true")
    words = (*small, *SMALL, "max_steps=6", "trainer.keep_checkpoints=-1", "resume=auto")
    process = command(f"data.path={store.path}", f"run_root={cfg.run_root}", *words)
    _, said = process.communicate(timeout=120)
    lines = said.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 4
    assert all(f"step={step} is damaged" in line for step, line in zip((6, 4, 2), lines, strict=False))
    assert lines[-1].startswith("error:") and "resume=never" in lines[-1]
