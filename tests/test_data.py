"""Normalisation, the frame store, the sampler and augmentation."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import random_brightness, random_shift
from data.episode import Episode, Window
from data.frame_store import FrameStore
from data.normalization import SCHEMES, ActionNormalizer, ActionStatistics
from data.sampler import PairDataset, Share, StatelessBatches, sample_at, training_loader
from data.store_writer import convert, write_store
from tests.conftest import make_episodes
from vla.errors import UserError

# Released statistics of the Bridge data (fact sheet §1.1): not symmetric around zero.
BRIDGE_Q01 = [-0.0287273, -0.0417035, -0.0260939, -0.0809211, -0.0928870, -0.2071828, 0.0]
BRIDGE_Q99 = [0.0283097, 0.0408553, 0.0401616, 0.0819205, 0.0779285, 0.2038257, 1.0]


def bridge(scheme: str) -> ActionNormalizer:
    statistics = ActionStatistics(BRIDGE_Q01, BRIDGE_Q99, [0.01] * 7, [0.5] * 7, [-1] * 7, [1] * 7, 10)
    return ActionNormalizer(statistics, scheme)


def test_q99_is_the_fact_sheets_formula():
    a = np.random.default_rng(0).uniform(-0.05, 0.05, (50, 7)).astype(np.float32)
    q01, q99 = np.array(BRIDGE_Q01, np.float32), np.array(BRIDGE_Q99, np.float32)
    expected = np.clip(2 * (a - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)
    expected[:, 6] = a[:, 6]
    np.testing.assert_allclose(bridge("q99").normalize(torch.from_numpy(a)).numpy(), expected, atol=1e-6)


def test_clip065_is_the_references_formula():
    a = torch.linspace(-1.5, 1.5, 31)[:, None].expand(31, 7)
    expected = 2 * (a[:, :6].clamp(-0.65, 0.65) + 0.65) / 1.3 - 1  # §3.6
    torch.testing.assert_close(bridge("clip065").normalize(a)[:, :6], expected)
    inverse = 0.5 * (expected + 1) * 1.3 - 0.65  # §3.7
    torch.testing.assert_close(bridge("clip065").unnormalize(bridge("clip065").normalize(a))[:, :6], inverse)


@given(st.sampled_from(SCHEMES), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_round_trip_inside_the_bounds(scheme, seed):
    normalizer = bridge(scheme)
    low, high = np.array(BRIDGE_Q01), np.array(BRIDGE_Q99)
    if scheme.endswith("clip065"):  # keep clear of the clip, in whichever space it acts
        middle, half = (low + high) / 2, (high - low) / 2
        low, high = (middle - 0.6 * half, middle + 0.6 * half) if scheme.startswith("q99") else (-0.6, 0.6)
    a = torch.from_numpy(np.random.default_rng(seed).uniform(low, high, (20, 7)).astype(np.float32))
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(a)), a, atol=1e-5, rtol=1e-4)


def test_a_dimension_that_never_moves_is_zero_and_comes_back():
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
    actions[:, 3] = 0.25
    normalizer = ActionNormalizer(ActionStatistics.of(actions), "q99")
    a = torch.from_numpy(actions[:5].astype(np.float32))
    assert (normalizer.normalize(a)[:, 3] == 0).all()
    assert torch.allclose(normalizer.unnormalize(normalizer.normalize(a))[:, 3], torch.tensor(0.25))


def test_statistics_equal_numpy_and_refuse_nan():
    actions = np.random.default_rng(0).normal(size=(1000, 7))
    statistics = ActionStatistics.of(actions)
    np.testing.assert_allclose(statistics.q99, np.quantile(actions, 0.99, axis=0))
    np.testing.assert_allclose(statistics.std, actions.std(0))
    actions[3, 2] = np.nan
    with pytest.raises(UserError, match="NaN"):
        ActionStatistics.of(actions)
    with pytest.raises(UserError, match="normalization=q98"):
        bridge("q98")


def test_store_returns_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store_writer.SHARD_BYTES", 150_000)  # several shards
    episodes = make_episodes(5, cameras=("static", "wrist"))
    write_store(iter(episodes), tmp_path / "store", reader={})
    store = FrameStore(tmp_path / "store")
    assert len(list((tmp_path / "store").glob("shard-*.arrow"))) > 1
    for camera in ("static", "wrist"):
        everything = np.concatenate([e.frames[camera] for e in episodes])
        order = np.random.default_rng(0).permutation(len(store))
        np.testing.assert_array_equal(store.frames(camera, order), everything[order])
    np.testing.assert_array_equal(store.actions, np.concatenate([e.actions for e in episodes]))
    np.testing.assert_array_equal(store.states, np.concatenate([e.state for e in episodes]))
    for row, window, episode in zip(store.episodes, store.windows, episodes, strict=True):
        assert (window["instruction"], window["task"]) == (episode.instruction, episode.task)
        assert row["source"] == episode.source and (window["start"], window["length"]) == (row["start"], row["length"])
        steps = np.arange(row["start"], row["start"] + row["length"])
        assert (store.last_step[steps] == steps[-1]).all()


def test_steps_without_a_frame_are_never_sampled(tmp_path):
    """Every second frame rendered: samples are the even steps, their pairs even steps of the same episode."""
    episodes = make_episodes(3, length=15)
    valid = [np.arange(len(e.actions)) % 2 == 0 for e in episodes]
    write_store((replace(e, frame_valid=v) for e, v in zip(episodes, valid, strict=True)), tmp_path / "s", reader={})
    store = FrameStore(tmp_path / "s")
    assert store.meta.frames == len(store.samples) == sum(v.sum() for v in valid)
    local = np.concatenate([np.arange(len(v)) for v in valid])
    assert (local[store.samples] % 2 == 0).all()
    dataset = PairDataset(store, 4, ["static"], "shared")
    batch = dataset.__getitems__(np.arange(len(dataset)))
    frames = np.concatenate([e.frames["static"] for e in episodes])
    for row, step in enumerate(store.samples):
        future = step + 4
        inside = future <= store.last_step[step]
        assert batch["future_valid"][row] == inside
        expected = future if inside else store.last_step[step] - local[store.last_step[step]] % 2
        np.testing.assert_array_equal(batch["future_images"]["static"][row].permute(1, 2, 0).numpy(), frames[expected])
    odd = PairDataset(store, 3, ["static"], "separate").__getitems__(np.arange(len(dataset)))
    assert not odd["future_valid"].any()


def test_jpeg_store_is_smaller_and_close(tmp_path):
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (24, 128, 128, 3)).copy()
    episode = replace(make_episodes(1)[0], frames={"static": smooth})
    for encoding in ("raw", "jpeg"):
        write_store([episode], tmp_path / encoding, reader={}, encoding=encoding)
    size = {e: (tmp_path / e / "shard-00000-000.arrow").stat().st_size for e in ("raw", "jpeg")}
    frames = FrameStore(tmp_path / "jpeg").frames("static", np.array([3, 0]))
    assert size["jpeg"] * 5 < size["raw"] and np.abs(frames.astype(int) - smooth[:2]).max() <= 6


def test_content_hash_depends_on_content_alone(tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        hashes.append(write_store(make_episodes(2, seed=seed), tmp_path / name, reader={}).content_hash)
    assert hashes[0] == hashes[1] != hashes[2]


@dataclass(frozen=True)
class MadeUnit:
    """A unit of conversion that logs its reading, and is broken where it is told to be."""

    seed: int
    log: str
    broken: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"unit {self.seed}"

    def read(self, skipped):
        with open(self.log, "a") as file:
            file.write(f"{self.seed}\n")
        yield from make_episodes(2, seed=self.seed)
        if self.seed in self.broken:
            raise UserError(f"{self.name} is damaged")


def units(log, broken=()):
    log.touch()
    return [MadeUnit(seed, str(log), broken) for seed in range(4)]


def test_a_conversion_is_the_same_on_any_number_of_processes(tmp_path):
    log = tmp_path / "log"
    one = convert(units(log), tmp_path / "one", {}, workers=1)
    two = convert(units(log), tmp_path / "two", {}, workers=2)
    assert one == two
    a, b = FrameStore(tmp_path / "one"), FrameStore(tmp_path / "two")
    everything = np.arange(len(a))
    np.testing.assert_array_equal(a.frames("static", everything), b.frames("static", everything))
    np.testing.assert_array_equal(a.actions, b.actions)
    expected = np.concatenate([e.frames["static"] for seed in range(4) for e in make_episodes(2, seed=seed)])
    np.testing.assert_array_equal(a.frames("static", everything), expected)
    assert a.episodes == b.episodes and a.windows == b.windows and len(a.windows) == 8
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_stopped_conversion_goes_on(tmp_path):
    log, out = tmp_path / "log", tmp_path / "store"
    with pytest.raises(UserError, match="unit 2 is damaged"):
        convert(units(log, broken=(2,)), out, {})
    assert not out.exists() and log.read_text().split() == ["0", "1", "2"]
    meta = convert(units(log), out, {})
    assert log.read_text().split() == ["0", "1", "2", "2", "3"], "what was done is not read again"
    assert meta == convert(units(log), tmp_path / "at_once", {})
    with pytest.raises(UserError, match="damaged"):
        convert(units(log, broken=(1,)), tmp_path / "other", {})
    log.write_text("")
    convert(units(log), tmp_path / "other", {"image_rotation": "upright"})
    assert log.read_text().split() == ["0", "1", "2", "3"], "another reading starts from the beginning"


def test_what_cannot_be_read_is_skipped_and_counted_when_asked(tmp_path):
    meta = convert(units(tmp_path / "log", broken=(1, 3)), tmp_path / "store", {}, skip=True)
    assert meta.skipped == ["unit 1 is damaged", "unit 3 is damaged"] and meta.episodes == 4
    expected = np.concatenate([e.actions for seed in (0, 2) for e in make_episodes(2, seed=seed)])
    np.testing.assert_array_equal(FrameStore(tmp_path / "store").actions, expected)
    with pytest.raises(UserError, match=r"no episodes.*4 skipped"):
        convert(units(tmp_path / "log", broken=(0, 1, 2, 3)), tmp_path / "none", {}, skip=True)


def test_a_failing_conversion_leaves_nothing(tmp_path):
    def broken():
        yield make_episodes(1)[0]
        raise UserError("demo_1 is damaged")

    with pytest.raises(UserError, match="demo_1"):
        write_store(broken(), tmp_path / "store", reader={})
    with pytest.raises(UserError, match="no episodes"):
        write_store([], tmp_path / "store", reader={})
    assert list(tmp_path.iterdir()) == []


def test_bad_stores_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no meta\.json"):
        FrameStore(tmp_path)
    write_store(make_episodes(1), tmp_path / "store", reader={})
    shard = tmp_path / "store" / "shard-00000-000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"shard-00000-000\.arrow is damaged"):
        FrameStore(tmp_path / "store")
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        FrameStore(tmp_path / "store")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a frame store"):
        write_store(make_episodes(1), tmp_path / "precious", reader={})
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_episodes_of_other_shapes_are_refused(tmp_path):
    with pytest.raises(UserError, match="convert them apart"):
        write_store([*make_episodes(1), *make_episodes(1, size=16)], tmp_path / "store", reader={})


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 7), st.integers(0, 30))
@settings(max_examples=100)
def test_sampler_is_a_function_of_the_position(length, seed, batch, first_step):
    """Each epoch holds every step once, and a sampler started late gives what one started early gives then."""
    epoch = sample_at(np.arange(3 * length), length, seed).reshape(3, length)
    assert all(sorted(row) == list(range(length)) for row in epoch.tolist())
    early, late = iter(StatelessBatches(length, batch, seed)), iter(StatelessBatches(length, batch, seed, first_step))
    for _ in range(first_step):
        next(early)
    for _ in range(3):
        np.testing.assert_array_equal(next(early), next(late))


def test_ranks_share_the_batch_without_overlap():
    one = next(iter(StatelessBatches(100, 8, 0)))
    ranks = [next(iter(StatelessBatches(100, 8, 0, share=Share(rank=r, world=2)))) for r in range(2)]
    np.testing.assert_array_equal(np.concatenate(ranks), one)


def windowed_episodes() -> list[Episode]:
    """Play data: windows overlap, leave gaps and end before the recording does."""
    first, second = make_episodes(2, length=30)
    windows = (Window("open it", "open", 2, 12), Window("push it", "push", 9, 10), Window("lift it", "lift", 22, 8))
    return [replace(first, windows=windows), replace(second, windows=(Window("go", "go", 20, 11),))]


@pytest.mark.parametrize("kind", ["whole", "windowed"])
@pytest.mark.parametrize("tail", ["pad", "whole"])
def test_samples_against_a_loop_over_windows(kind, tail, tmp_path):
    horizon, episodes = 5, make_episodes(3) if kind == "whole" else windowed_episodes()
    write_store(iter(episodes), tmp_path / "store", reader={})
    dataset = PairDataset(FrameStore(tmp_path / "store"), horizon, ["static"], "separate", tail)
    batch = dataset.__getitems__(np.arange(len(dataset)))
    row = 0
    for episode in episodes:
        for window in episode.described():
            end = window.start + window.length
            for t in range(window.start, end if tail == "pad" else end - horizon + 1):
                assert batch["instruction"][row] == window.instruction
                frame = batch["images"]["static"][row].permute(1, 2, 0).numpy()
                assert (frame == episode.frames["static"][t]).all()
                assert (batch["state"][row].numpy() == episode.state[t]).all()
                for h in range(horizon):
                    assert batch["action_valid"][row, h] == (t + h < end)
                    assert (batch["actions"][row, h].numpy() == episode.actions[min(t + h, end - 1)]).all()
                # The pair may cross the window's end, never the recording's.
                last = len(episode.actions) - 1
                assert batch["future_valid"][row] == (t + horizon <= last)
                future = batch["future_images"]["static"][row].permute(1, 2, 0).numpy()
                assert (future == episode.frames["static"][min(t + horizon, last)]).all()
                row += 1
    assert row == len(dataset)


def test_shared_pairs_are_policy_samples_twice(store):
    steps = np.array([0, 10, int(store.last_step[0]) - 1])
    shared = PairDataset(store, 4, ["static"], "shared").__getitems__(steps)
    future = np.minimum(steps + 4, store.last_step[0])
    expected = PairDataset(store, 4, ["static"], None).__getitems__(np.concatenate([steps, future]))
    images = torch.cat([shared["images"]["static"], shared["future_images"]["static"]])
    assert torch.equal(images, expected["images"]["static"])
    assert shared["future_valid"].tolist() == [True, True, False]
    for name in ("actions", "action_valid", "state"):
        assert torch.equal(shared[name], expected[name])


def test_worker_count_does_not_change_the_data(store):
    def take(workers: int):
        loader = training_loader(
            PairDataset(store, 4, ["static"], None), StatelessBatches(len(store), 6, 0), workers, False
        )
        return [batch["actions"] for batch, _ in zip(loader, range(7), strict=False)]

    for a, b in zip(take(0), take(2), strict=True):
        assert torch.equal(a, b)


def test_shift_is_pad_and_crop_with_one_draw_for_the_pair():
    images = torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8)
    other = images.flip(0)
    torch.manual_seed(0)
    a, b = random_shift([images, other], 3)
    torch.manual_seed(0)
    rows, cols = torch.randint(-3, 4, (2, 6, 1)).squeeze(-1)
    for source, result in ((images, a), (other, b)):
        padded = torch.nn.functional.pad(source.float(), (3, 3, 3, 3), mode="replicate")
        for i in range(6):
            top, left = 3 + rows[i], 3 + cols[i]
            assert torch.equal(padded[i, :, top : top + 20, left : left + 24].to(torch.uint8), result[i])


def test_brightness_scales_both_frames_alike_within_bounds():
    images = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    a, b = random_brightness([images, images * 2], 0.1)
    assert a.dtype == torch.uint8 and a.min() >= 90 and a.max() <= 110 and a.unique().numel() > 5
    assert (b.float() - 2 * a.float()).abs().max() <= 1.5
