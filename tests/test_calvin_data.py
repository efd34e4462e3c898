"""The reader of CALVIN's official layout, on folders written here as the fact sheet (calvin §5) describes them."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.calvin import CalvinSplit, load_objects
from data.frame_store import FrameStore
from data.sampler import PairDataset
from data.source import open_source
from data.store_writer import convert
from vla.cli import compose_config
from vla.errors import UserError

SEGMENTS = [(100, 159), (160, 219), (400, 440)]
WINDOWS = [
    (105, 125, "open_drawer", "open the drawer"),
    (120, 150, "push_red_block_left", "push it left"),
    (150, 159, "turn_on_led", "press the button"),  # up to the very end of its segment
    (170, 190, "close_drawer", "close the drawer"),
    (405, 425, "open_drawer", "pull the handle"),
]


def frame(index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    motion = rng.uniform(-1, 1, 7)
    motion[6] = 1.0 if index % 3 else -1.0
    return {
        "rel_actions": motion,
        "actions": rng.uniform(-1, 1, 7),
        "robot_obs": rng.normal(size=15),
        "scene_obs": rng.normal(size=24),
        "rgb_static": rng.integers(0, 256, (20, 20, 3), np.uint8),
        "rgb_gripper": rng.integers(0, 256, (8, 8, 3), np.uint8),
    }


def write_split(path: Path, segments=SEGMENTS, windows=WINDOWS, dtype=np.float32, extra: bool = False) -> Path:
    (path / "lang_annotations").mkdir(parents=True)
    np.save(path / "ep_start_end_ids.npy", np.array(segments))
    for first, last in segments:
        for index in range(first, last + 1):
            arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in frame(index).items()}
            if extra:
                arrays["depth_static"] = np.zeros((20, 20), np.float32)
                arrays["rgb_tactile"] = np.zeros((16, 12, 6), np.uint8)
            np.savez_compressed(path / f"episode_{index:07d}.npz", **arrays)
    content = {
        "language": {
            "ann": [w[3] for w in windows],
            "task": [w[2] for w in windows],
            "emb": np.zeros((len(windows), 1, 384), np.float32),
        },
        "info": {"episodes": [], "indx": [(np.int64(w[0]), np.int64(w[1])) for w in windows]},
    }
    np.save(path / "lang_annotations" / "auto_lang_ann.npy", content)
    return path


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("calvin") / "training")


def store_of(split: Path, out: Path, cameras=("static", "wrist"), margin: int = 10, **options) -> FrameStore:
    convert(CalvinSplit(split).parts(cameras, margin), out, {}, **options)
    return FrameStore(out)


def test_samples_equal_the_files(split, tmp_path):
    """Every (window, step, pair) against the npz files themselves, horizon 10."""
    store = store_of(split, tmp_path / "store")
    dataset = PairDataset(store, 10, ["static", "wrist"], "separate")
    batch = dataset.__getitems__(np.arange(len(dataset)))
    row = 0
    for first, last, _, sentence in WINDOWS:
        segment_end = next(b for a, b in SEGMENTS if a <= first <= b)
        for t in range(first, last + 1):
            now = frame(t)
            assert batch["instruction"][row] == sentence
            for camera, key in (("static", "rgb_static"), ("wrist", "rgb_gripper")):
                assert (batch["images"][camera][row].permute(1, 2, 0).numpy() == now[key]).all()
            np.testing.assert_array_equal(batch["state"][row], now["robot_obs"].astype(np.float32))
            for h in range(10):
                assert batch["action_valid"][row, h] == (t + h <= last)
                expected = frame(min(t + h, last))["rel_actions"].astype(np.float32)
                expected[6] = expected[6] > 0
                np.testing.assert_array_equal(batch["actions"][row, h], expected)
            # Across the window's end, never across the play segment's.
            assert batch["future_valid"][row] == (t + 10 <= segment_end)
            if t + 10 <= segment_end:
                future = batch["future_images"]["static"][row].permute(1, 2, 0).numpy()
                assert (future == frame(t + 10)["rgb_static"]).all()
            row += 1
    assert row == len(dataset)
    whole = PairDataset(store, 10, ["static"], None, "whole")
    assert len(whole) == sum(last + 1 - 10 - first + 1 for first, last, _, _ in WINDOWS)


def test_frames_that_windows_share_are_stored_once_and_others_not_at_all(split, tmp_path):
    store = store_of(split, tmp_path / "store", cameras=("static",), margin=4)
    kept = {t for first, last, _, _ in WINDOWS for t in range(first, min(last + 4, 159 if first < 160 else 440) + 1)}
    assert len(store) == len(kept) and list(store.meta.cameras) == ["static"]


@pytest.mark.parametrize(("dtype", "extra"), [(np.float64, False), (np.float32, True), (np.float64, True)])
def test_precision_and_other_modalities_make_no_difference(split, tmp_path, dtype, extra):
    other = write_split(tmp_path / "other", dtype=dtype, extra=extra)
    a, b = store_of(split, tmp_path / "a"), store_of(other, tmp_path / "b")
    np.testing.assert_array_equal(a.actions, b.actions)
    np.testing.assert_array_equal(a.states, b.states)
    assert a.meta.content_hash == b.meta.content_hash


def test_conversion_is_the_same_cut_otherwise_and_on_two_processes(split, tmp_path, monkeypatch):
    whole = store_of(split, tmp_path / "whole")
    monkeypatch.setattr("data.calvin.PART_FRAMES", 20)
    assert len(CalvinSplit(split).parts(("static",), 10)) > 2
    parts = store_of(split, tmp_path / "parts", workers=2)
    np.testing.assert_array_equal(whole.actions, parts.actions)
    assert whole.windows == parts.windows and whole.episodes == parts.episodes
    steps = np.arange(len(whole))
    np.testing.assert_array_equal(whole.frames("wrist", steps), parts.frames("wrist", steps))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    windows=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), min_size=1, max_size=8),
    margin=st.integers(0, 12),
)
@settings(max_examples=60)
def test_parts_cover_what_is_asked_for(lengths, windows, margin):
    """Against sets: every window whole and inside one stretch, each frame in one, none of another segment."""
    starts = np.cumsum([50, *lengths])
    segments = [(int(a), int(b) - 1) for a, b in itertools.pairwise(starts)]
    inside = []
    for start, length in windows:
        first = 50 + start % (starts[-1] - 50)
        end = next(b for a, b in segments if a <= first <= b)
        inside.append((int(first), int(min(first + length, end)), "task", "do it"))
    split = CalvinSplit.__new__(CalvinSplit)
    split.path = Path("nowhere")
    split.__dict__.update(segments=np.array(segments), template=("episode_", 7))
    from data.calvin import Annotation

    split.__dict__["annotations"] = sorted(
        (Annotation(w[3], w[2], w[0], w[1]) for w in inside), key=lambda a: (a.start, a.end, a.task)
    )
    stretches = [s for part in split.parts(("static",), margin) for s in part.stretches]
    frames = [t for first, last, _ in stretches for t in range(first, last + 1)]
    expected = set()
    for first, last, _, _ in inside:
        end = next(b for a, b in segments if a <= first <= b)
        expected |= set(range(first, min(last + margin, end) + 1))
    assert len(frames) == len(set(frames)) and set(frames) >= expected
    assert all(first <= w.start and w.end <= last for first, last, found in stretches for w in found)
    assert sum(len(found) for _, _, found in stretches) == len(inside)
    for first, last, _ in stretches:
        assert any(a <= first and last <= b for a, b in segments)


def broken(split: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(split, copy)
    return copy


BAD = "episode_0000130.npz"
DAMAGE = {
    f"{BAD} is missing": lambda file: file.unlink(),
    f"{BAD} cannot be read": lambda file: file.write_bytes(b"PK\x03\x04 nonsense"),
    f"{BAD} cannot": lambda file: file.write_bytes(file.read_bytes()[:700]),
    f"{BAD} has no array": lambda file: np.savez(file, a=np.zeros(1)),
    f"{BAD}: rel_actions": lambda file: np.savez(file, **frame(130) | {"rel_actions": np.full(7, np.nan)}),
    f"{BAD}: rgb_static": lambda file: np.savez(file, **frame(130) | {"rgb_static": np.zeros((20, 20))}),
}


@pytest.mark.parametrize("named", DAMAGE)
def test_bad_frames_are_named_or_skipped_and_counted(split, tmp_path, named):
    copy = broken(split, tmp_path)
    DAMAGE[named](copy / BAD)
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        store_of(copy, tmp_path / "store")
    store = store_of(copy, tmp_path / "skipped", skip=True)
    assert len(store.meta.skipped) == 1 and "1 windows left out" in store.meta.skipped[0]
    assert sorted(w["instruction"] for w in store.windows) == sorted(w[3] for w in WINDOWS if w[3] != "push it left")
    everything = PairDataset(store, 10, ["static"], "separate")
    batch = everything.__getitems__(np.arange(len(everything)))
    for row, sentence in enumerate(batch["instruction"]):
        if sentence == "open the drawer":  # its pairs end where the bad frame is
            assert batch["future_valid"][row] == (105 + row + 10 < 130)


def test_bad_folders_and_annotations_are_named(split, tmp_path):
    with pytest.raises(UserError, match=r"did you mean .*training"):
        CalvinSplit(split.parent)
    with pytest.raises(UserError, match=r"ep_start_end_ids\.npy"):
        CalvinSplit(tmp_path)
    copy = broken(split, tmp_path)
    (copy / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(UserError, match=r"auto_lang_ann\.npy is missing"):
        CalvinSplit(copy).annotations  # noqa: B018
    for windows in ([(430, 450, "t", "s")], [(300, 310, "t", "s")], [(150, 165, "t", "s")], [(120, 110, "t", "s")]):
        shutil.rmtree(copy)
        write_split(copy, segments=SEGMENTS[2:] if windows[0][0] > 200 else SEGMENTS, windows=windows)
        with pytest.raises(UserError, match=f"window {windows[0][0]}-{windows[0][1]}"):
            CalvinSplit(copy).annotations  # noqa: B018


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_annotations_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    file = tmp_path / "auto_lang_ann.npy"
    np.save(file, {"language": {"ann": [Payload(canary)]}, "info": {}})
    with pytest.raises(UserError, match=r"auto_lang_ann\.npy cannot be read.*system"):
        load_objects(file)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload must be one that does run where it may"
    np.save(file, np.arange(3))
    with pytest.raises(UserError, match="no annotations"):
        load_objects(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_objects(file)


def test_train_opens_the_split_of_a_data_set(split, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path))
    cfg = compose_config("train", "benchmark=calvin_abc_d", f"data.path={split.parent}", "data.margin=10")
    store = open_source(cfg.benchmark, cfg.data, cameras=["static"])
    assert len(store.windows) == len(WINDOWS) and list(store.meta.cameras) == ["static"]
    again = open_source(cfg.benchmark, cfg.data, cameras=["static"])
    assert again.path == store.path
    other = open_source(cfg.benchmark, cfg.data, cameras=["static", "wrist"])
    assert other.path != store.path and open_source(cfg.benchmark, cfg.data, cameras=["wrist"]).path == other.path
