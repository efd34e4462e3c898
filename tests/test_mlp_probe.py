"""The frozen-encoder probes (IDL A.6, A.7) against naive formulas; cached, resumed and spread over processes alike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.frame_store import FrameStore
from data.store_writer import write_store
from evaluate import evaluate
from tests.conftest import make_episodes, train_config
from train import train
from vla.analysis.bc_probe import ProbedPolicy
from vla.analysis.features import TaskFeatures
from vla.analysis.mlp_probe import ProbeHead, ProbeSettings, cloning_loss, fit_probe, split_demonstrations
from vla.checkpoint import checkpoint_hash, load_policy
from vla.cli import compose_config
from vla.errors import UserError


def test_head_has_the_papers_widths():
    """Table 11 on VLM4VLA-8B's merged tokens, 196 × 4096: projection 256, hidden 2·512 and 512, 4 × 7 out."""
    with torch.device("meta"):
        head = ProbeHead(196, 4096, 28)
    layers = [(4096, 256), (196 * 256, 1024), (1024, 512), (512, 28)]
    assert sum(p.numel() for p in head.parameters()) == sum(i * o + o for i, o in layers)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=30)
def test_cloning_loss_is_the_formula(seed, batch, chunk):
    rng = np.random.default_rng(seed)
    predicted, actions = rng.normal(size=(batch, chunk, 7)), rng.normal(size=(batch, chunk, 7))
    actions[..., 6] = rng.integers(0, 2, (batch, chunk))
    valid = rng.integers(0, 2, (batch, chunk)).astype(bool)
    valid[0, 0] = True
    total, count = 0.0, 0
    for b in range(batch):
        for h in range(chunk):
            if valid[b, h]:
                l1 = sum(abs(predicted[b, h, d] - actions[b, h, d]) for d in range(6)) / 6
                p = 1 / (1 + math.exp(-predicted[b, h, 6]))
                bce = -math.log(p if actions[b, h, 6] else 1 - p)
                total, count = total + l1 + 0.01 * bce, count + 1
    tensors = [torch.from_numpy(x) for x in (predicted.reshape(batch, -1), actions, valid)]
    assert float(cloning_loss(*tensors, 0.01)) == pytest.approx(total / count, rel=1e-6)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.floats(0.01, 0.9))
@settings(max_examples=50)
def test_whole_demonstrations_are_held_out(lengths, share):
    episodes = np.repeat(np.arange(len(lengths)) + 3, lengths)
    held_out = split_demonstrations(episodes, share)
    validation, training = set(episodes[held_out]), set(episodes[~held_out])
    assert not validation & training and validation and training
    assert abs(len(validation) - share * len(lengths)) <= 1 and min(validation) > max(training)


def test_fit_learns_and_reports_the_means_it_says():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 3, 4)).astype(np.float32))
    y = x.sum((1, 2))[:, None]

    def loss(predicted: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return (predicted - y[rows]).abs().mean()

    chosen = ProbeSettings(steps=120, batch_size=32, lr=2e-3, validate_every=50, dropout=0.0, seed=0)
    fit = fit_probe(lambda rows: x[rows], loss, (3, 4), 1, np.arange(150), np.arange(150, 200), chosen)
    assert [step for step, _ in fit.validation_curve] == [50, 100] and len(fit.train_curve) == 120
    assert fit.train == pytest.approx(np.mean(fit.train_curve))
    assert fit.validation == pytest.approx(np.mean([value for _, value in fit.validation_curve]))
    assert np.mean(fit.train_curve[-20:]) < 0.25 * np.mean(fit.train_curve[:4])
    again = fit_probe(lambda rows: x[rows], loss, (3, 4), 1, np.arange(150), np.arange(150, 200), chosen)
    assert again.train_curve == fit.train_curve


@pytest.fixture(scope="module")
def encoder(store, tmp_path_factory) -> Path:
    return train(train_config(store.path, tmp_path_factory.mktemp("runs"), "ablation=untouched"))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> FrameStore:
    place = tmp_path_factory.mktemp("demos") / "store"
    write_store(make_episodes(8, length=20), place, reader={"image_rotation": "rotate180"})
    return FrameStore(place)


def test_untouched_is_exported_as_built(encoder, store, tmp_path):
    trained = train(train_config(store.path, tmp_path, "ablation=vanilla", "max_steps=1"))
    about = json.loads((encoder / "config.json").read_text())["about"]
    assert (about["arm"], about["steps"]) == ("untouched", 0)
    assert checkpoint_hash(encoder) != checkpoint_hash(trained)
    assert checkpoint_hash(encoder) == checkpoint_hash(train(train_config(store.path, tmp_path, "ablation=untouched")))


def test_features_are_encoded_once_and_equal_the_encoder(encoder, demonstrations, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path))
    policy, _ = load_policy(encoder)
    features = TaskFeatures(policy, checkpoint_hash(encoder), demonstrations, "static")
    stored = features.load("task1")
    samples = features.samples("task1")
    assert stored.shape == (len(samples), *policy.tap_shape()) and stored.dtype == np.float32
    assert {demonstrations.windows[demonstrations.sample_window[s]]["task"] for s in samples} == {"task1"}
    np.testing.assert_allclose(stored[5:9], features.encode(samples[5:9]), atol=1e-5)
    monkeypatch.setattr(policy, "encode_images", lambda images: pytest.fail("encoded again"))
    np.testing.assert_array_equal(features.load("task1"), stored)
    features.keep = False
    features.forget("task1")
    assert not features.path("task1").exists()
    with pytest.raises(UserError, match="no demonstration of make_coffee"):
        features.load("make_coffee")


def test_a_full_disk_is_told_before_anything_is_encoded(encoder, demonstrations, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path))
    policy, _ = load_policy(encoder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"features of task0 take .* evaluation\.features=drop or off"):
        TaskFeatures(policy, "w" * 64, demonstrations, "static").load("task0")
    assert not list(tmp_path.rglob("*.npy"))


def probe(name: str, encoder: Path, demonstrations: FrameStore, root: str, *overrides: str) -> dict:
    short = ("evaluation.probe.batch_size=8", "evaluation.probe.validate_every=5", "episodes=0")
    where = (f"policy={encoder}", f"data.path={demonstrations.path}", f"results_root={root}", f"evaluation={name}")
    return evaluate(compose_config("evaluate", *where, *short, *overrides))


@pytest.mark.slow
def test_cloning_probe_is_the_same_cached_or_not_and_on_two_processes(encoder, demonstrations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = "evaluation.probe.steps=12"
    cached = probe("bc_probe", encoder, demonstrations, "a", steps, "evaluation.workers=1")
    spread = probe("bc_probe", encoder, demonstrations, "b", steps, "evaluation.workers=2")
    live = probe("bc_probe", encoder, demonstrations, "c", steps, "evaluation.features=off")
    assert [task["task"] for task in cached["tasks"]] == ["task0", "task1"]
    assert cached["tasks"] == spread["tasks"]
    for name in ("train", "validation"):
        assert cached[name]["value"] == pytest.approx(live[name]["value"], rel=1e-4)
        assert cached[name]["value"] == pytest.approx(np.mean([task[name] for task in cached["tasks"]]))


def test_cloning_probe_goes_on_where_it_was_stopped(encoder, demonstrations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("evaluation.probe.steps=12", "evaluation.workers=1")
    whole = probe("bc_probe", encoder, demonstrations, "a", *short)
    (folder,) = Path("a").rglob("probes")
    (folder / "task1.json").unlink()
    kept = (folder / "task0.json").stat().st_mtime_ns
    again = probe("bc_probe", encoder, demonstrations, "a", *short)
    assert again["tasks"] == whole["tasks"] and (folder / "task0.json").stat().st_mtime_ns == kept


def test_heads_act_by_instruction(encoder):
    policy, _ = load_policy(encoder)
    heads = {}
    for number, told in enumerate(("open it", "close it")):
        heads[told] = ProbeHead(*policy.tap_shape(), 28).eval()
        torch.nn.init.zeros_(heads[told].mlp[-1].weight)
        heads[told].mlp[-1].bias.data = torch.tensor([0.1 * (number + 1)] * 6 + [1.0 - 2 * number]).repeat(4)
    probed = ProbedPolicy(policy, heads, chunk=4)
    frames = {"static": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    with torch.inference_mode():
        actions = probed.predict({"images": frames, "instruction": ["close it", "open it"]})
    assert actions.shape == (2, 4, 7)
    torch.testing.assert_close(actions[:, :, 0], torch.tensor([0.2, 0.1])[:, None].expand(2, 4))
    assert actions[:, :, 6].tolist() == [[0.0] * 4, [1.0] * 4]


def test_state_probe_is_one_epoch_and_read_back(encoder, demonstrations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = probe("state_probe", encoder, demonstrations, "a")
    training = sum(w["length"] for w in demonstrations.windows[:6])  # the last of each task's four is held out
    assert len(first["train_curve"]) == round(training / 8)
    assert first["train"] == pytest.approx(np.mean(first["train_curve"]), abs=1e-5)
    (file,) = Path("a").rglob("state_probe.json")
    written = file.stat().st_mtime_ns
    again = probe("state_probe", encoder, demonstrations, "a")
    assert again["train"] == first["train"] and file.stat().st_mtime_ns == written
    live = probe("state_probe", encoder, demonstrations, "b", "evaluation.features=off")
    assert live["validation"] == pytest.approx(first["validation"], rel=1e-4)
