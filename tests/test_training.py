"""train.py as a user meets it: deterministic, resumable, exporting what evaluate.py loads."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data.frame_store import FrameStore
from data.store_writer import write_store
from tests.conftest import make_episodes, train_config
from train import train
from vla.checkpoint import checkpoint_hash, load_policy
from vla.cli import CONF
from vla.errors import UserError
from vla.run_identity import run_dir
from vla.saving import MANIFEST, STATE, About, seal
from vla.training import initial, policy_arguments


def metrics(run: Path) -> list[dict]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("samples_per_s", "data_wait", "mfu")} for row in rows]


@pytest.mark.parametrize("arm", ["vanilla", "ptr"])
def test_two_runs_with_one_seed_are_bit_equal_and_another_seed_is_not(arm, store, tmp_path):
    a, b = (train(train_config(store.path, tmp_path / n, f"ablation={arm}", "max_steps=3")) for n in "ab")
    other = train(train_config(store.path, tmp_path / "c", f"ablation={arm}", "max_steps=3", "seed=1"))
    assert checkpoint_hash(a) == checkpoint_hash(b) != checkpoint_hash(other)
    assert metrics(a.parent) == metrics(b.parent)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_equal_to_an_uninterrupted_run(workers, store, tmp_path):
    """Killed after the checkpoint at step 4 of 6, resumed with another worker count: same weights, same metrics."""
    options = ("ablation=ptr", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=5", "optim.ema=0.9")
    whole = train(train_config(store.path, tmp_path / "whole", *options))
    cfg = train_config(store.path, tmp_path / "halves", *options)
    run = run_dir(cfg)
    shutil.copytree(whole.parent, run)  # the state of a run that died at step 5
    shutil.rmtree(run / "policy")
    shutil.rmtree(run / "checkpoints" / "step=6")
    with pytest.raises(UserError, match="resume=auto"):
        train(cfg)
    resumed = train(replace(cfg, resume="auto", trainer=replace(cfg.trainer, num_workers=workers)))
    assert checkpoint_hash(resumed) == checkpoint_hash(whole)
    assert metrics(run) == metrics(whole.parent)
    assert [int(row["step"]) for row in metrics(run)] == list(range(6))


def test_starting_over_forgets_the_old_checkpoints(store, tmp_path):
    cfg = train_config(store.path, tmp_path, "trainer.checkpoint_every=2", "max_steps=3")
    shutil.rmtree(train(cfg))
    (run_dir(cfg) / "checkpoints" / "step=99").mkdir(parents=True)
    train(replace(cfg, resume="never"))
    assert [path.name for path in (run_dir(cfg) / "checkpoints").iterdir()] == ["step=2"]


def test_a_finished_run_is_not_run_again(store, tmp_path, capsys):
    cfg = train_config(store.path, tmp_path, "max_steps=1")
    policy = train(cfg)
    before = (policy / "config.json").stat().st_mtime_ns
    assert train(cfg) == policy and "already trained" in capsys.readouterr().out
    assert (policy / "config.json").stat().st_mtime_ns == before


def test_export_holds_the_policy_and_its_statistics_and_no_head(store, tmp_path):
    policy = train(train_config(store.path, tmp_path, "ablation=ptr", "max_steps=2"))
    weights = safetensors.torch.load_file(policy / "model.safetensors")
    assert weights and not any("inverse" in name for name in weights)
    statistics = json.loads((policy / "statistics.json").read_text())
    assert statistics["scheme"] == "q99" and statistics["q01"] == store.meta.statistics["q01"]
    loaded, config = load_policy(policy)
    assert config["about"]["arm"] == "ptr" and config["about"]["data_hash"] == store.meta.content_hash
    observation = {
        "images": {"static": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
        "state": None,
        "instruction": ["open it"],
    }
    assert loaded.predict(observation).shape == (1, 8, 7)


def test_checkpoint_of_other_data_is_refused(store, tmp_path):
    cfg = train_config(store.path, tmp_path, "trainer.checkpoint_every=1", "max_steps=2")
    policy = train(cfg)
    shutil.rmtree(policy)
    folder = run_dir(cfg) / "checkpoints" / "step=2"
    content = torch.load(folder / STATE, weights_only=True)
    content["statistics"]["q01"] = [0.0] * 7
    torch.save(content, folder / STATE)
    (folder / MANIFEST).unlink()
    shutil.copytree(folder, folder.with_name(".step=2.partial"))
    shutil.rmtree(folder)
    seal(folder.with_name(".step=2.partial"), About(2, 1, cfg.batch_size))
    with pytest.raises(UserError, match="other action statistics"):
        train(replace(cfg, resume="auto"))


@pytest.mark.parametrize(
    "damage", ["no statistics.json", "no config.json", "truncated weights", "wrong shapes", "no tokenizer", "nothing"]
)
def test_bad_policy_directories_are_named(damage, store, tmp_path):
    policy = train(train_config(store.path, tmp_path, "max_steps=1"))
    weights = policy / "model.safetensors"
    if damage.startswith("no "):
        victim = policy / damage.removeprefix("no ")
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "wrong shapes":
        config = json.loads((policy / "config.json").read_text())
        config["arguments"]["head_width"] = 128
        (policy / "config.json").write_text(json.dumps(config))
    else:
        shutil.rmtree(policy)
    with pytest.raises(UserError, match=str(policy)):
        load_policy(policy)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [(["chunk=24"], "chunk=24"), (["batch_size=0"], "batch_size=0"), (["resume=maybe"], "resume=maybe")],
)
def test_bad_numbers_are_named_and_nothing_is_written(overrides, named, store, tmp_path):
    with pytest.raises(UserError, match=named):
        train(train_config(store.path, tmp_path / "runs", *overrides))
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_one_line_and_nothing_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, CONF.parent / "train.py", f"data.path={tmp_path / 'none'}", f"run_root={tmp_path / 'runs'}"],
        capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", "VLA_DATA": str(tmp_path / "data")},
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "scripts/collect.py" in done.stderr and list(tmp_path.iterdir()) == []


def test_nan_loss_stops_with_one_line(store, tmp_path):
    with pytest.raises(UserError, match="the loss is"):
        train(train_config(store.path, tmp_path, "optim.lr=1e30", "optim.clip=0.0", "max_steps=20"))


def test_init_from_takes_the_weights_and_keeps_the_data_s_statistics(store, tmp_path):
    first = train(train_config(store.path, tmp_path, "max_steps=2", "policy.head_width=64"))
    other = tmp_path / "other"
    write_store(make_episodes(seed=7), other, reader={"image_rotation": "rotate180"})
    cfg = train_config(other, tmp_path, f"init_from={first}", "inverse_dynamics.tap=pre_projector")
    policy = initial(cfg, FrameStore(other), policy_arguments(cfg))
    weights = safetensors.torch.load_file(first / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in policy.state_dict().items())
    assert (
        policy.normalizer.statistics.mean == FrameStore(other).meta.statistics["mean"] != store.meta.statistics["mean"]
    )
    assert policy.tap == "pre_projector"
    assert train(cfg).exists()


def test_init_from_another_baseline_or_nothing_is_one_line(store, tmp_path):
    first = train(train_config(store.path, tmp_path, "max_steps=1"))
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | {"baseline": "flower"}))
    with pytest.raises(UserError, match=r"holds flower, not vlm4vla; set baseline=flower"):
        train(train_config(store.path, tmp_path, f"init_from={first}"))
    with pytest.raises(UserError, match="nowhere"):
        train(train_config(store.path, tmp_path, "init_from=nowhere"))
