"""Damaged data of every format: named with file and place, left out where that is allowed, and found by check_data.

Each reader's own damages, a dozen of each: tests/test_{calvin_data,libero_data,lerobot_damage,rlds,tfrecord,video}.py.
"""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import make_episodes
from evaluating import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_files import hub_like
from rlds_files import BRIDGE, made_steps, write_rlds
from test_calvin_data import write_split
from test_libero_data import write_demos

from data.audit import Audit, audit_source, audit_store
from data.frame_store import FrameStore
from data.source import open_source, source_of
from data.store_writer import write_store
from vla.cli import compose_config
from vla.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "vla_data"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def libero(folder: Path) -> None:
    folder.mkdir()
    write_demos(folder / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", lengths=(9, 7, 8))
    write_demos(folder / "put_the_bowl_on_the_plate_demo.hdf5", lengths=(6,))


def bad_frame(folder: Path) -> None:
    file = folder / "open_the_middle_drawer_of_the_cabinet_demo.hdf5"
    with h5py.File(file) as opened:
        place = opened["data/demo_1/obs/agentview_rgb"].id.get_chunk_info(2).byte_offset
    content = bytearray(file.read_bytes())
    content[place : place + 20] = bytes(20)
    file.write_bytes(content)


def bridge(folder: Path) -> None:
    rng = np.random.default_rng(0)
    episodes = [made_steps(BRIDGE, 5 + n, rng) for n in range(4)]
    write_rlds(folder / "1.0.0", "bridge_dataset", BRIDGE, episodes, shards=2)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tfrecord-*"))


LEROBOT = ("benchmark=libero_goal", "gripper=libero", "orientation=rotate180")
FORMATS = {
    "libero": (libero, ("benchmark=libero_goal",), bad_frame, r"cabinet_demo\.hdf5:demo_1: cannot be read"),
    "calvin": (
        write_split,
        ("benchmark=calvin_abc_d",),
        lambda folder: flip(folder / "episode_0000130.npz"),
        r"episode_0000130\.npz cannot be read",
    ),
    "rlds": (
        bridge,
        ("benchmark=simpler_widowx",),
        lambda folder: flip(shards(folder)[1]),
        r"00001-of-00002: record \d has a (length with a )?wrong checksum",
    ),
    "lerobot": (
        hub_like,
        LEROBOT,
        lambda folder: cut(folder / "data/chunk-000/file-001.parquet"),
        r"file-001\.parquet cannot be read",
    ),
}


def opened(folder: Path, overrides: tuple[str, ...], *more: str):
    from data.lerobot import Reading

    cfg = compose_config("convert", f"data.path={folder}", *overrides, *more)
    reading = Reading(cfg.gripper, cfg.orientation, {})
    return open_source(cfg.benchmark, cfg.data, reading=reading)


def check(folder: Path, *overrides: str, capsys) -> tuple[int, str]:
    """(exit code, what is printed) of scripts/check_data.py."""
    before = sys.argv
    sys.argv = ["scripts/check_data.py", f"data.path={folder}", *overrides]
    try:
        runpy.run_path(str(ROOT / "scripts/check_data.py"), run_name="__main__")
        code = 0
    except SystemExit as exited:
        code = exited.code
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("kind", ["libero", "rlds", *slow("calvin", "lerobot")])
def test_damage_is_raised_or_skipped_and_counted_and_the_audit_names_it(kind, tmp_path, capsys, monkeypatch):
    make, overrides, damage, named = FORMATS[kind]
    folder = tmp_path / kind
    make(folder)
    whole = opened(folder, overrides)
    code, said = check(folder, *overrides, capsys=capsys)
    assert code == 0 and "all of it is whole" in said
    assert f"{whole.meta.episodes} episodes, {whole.meta.windows} windows, {whole.meta.steps} steps" in said
    assert f"content {whole.meta.content_hash}" in said, "the hash of the store that a conversion makes"

    damage(folder)
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "another"))  # of CALVIN's frame files none stands for the data
    with pytest.raises(UserError, match=named) as caught:
        opened(folder, overrides)
    assert "\n" not in str(caught.value)
    left = opened(folder, overrides, "data.bad_files=skip")
    assert left.meta.skipped and any(re.search(named, line) for line in left.meta.skipped)
    assert 0 < left.meta.steps < whole.meta.steps
    code, said = check(folder, *overrides, capsys=capsys)
    assert code == 1 and f"{len(left.meta.skipped)} cannot be read" in said
    assert all(f"bad: {line}" in said for line in left.meta.skipped)
    assert f"{left.meta.episodes} episodes, {left.meta.windows} windows, {left.meta.steps} steps" in said


def test_one_bad_demonstration_costs_only_itself(tmp_path):
    libero(tmp_path / "libero")
    whole = opened(tmp_path / "libero", ())
    bad_frame(tmp_path / "libero")
    left = opened(tmp_path / "libero", (), "data.bad_files=skip")
    assert [row["source"] for row in left.episodes] == [
        row["source"] for row in whole.episodes if not row["source"].endswith("cabinet_demo.hdf5:demo_1")
    ]
    assert len(left.episodes) == 3


def test_a_missing_rlds_shard_is_raised_or_left_out(tmp_path, capsys):
    bridge(tmp_path / "bridge")
    whole = opened(tmp_path / "bridge", ("benchmark=simpler_widowx",))
    shards(tmp_path / "bridge")[0].unlink()
    with pytest.raises(UserError, match=r"tfrecord-00000-of-00002 is missing"):
        opened(tmp_path / "bridge", ("benchmark=simpler_widowx",))
    left = opened(tmp_path / "bridge", ("benchmark=simpler_widowx", "data.bad_files=skip"))
    assert left.meta.episodes == 2 and len(whole.episodes) == 4
    assert "00000-of-00002" in left.meta.skipped[0] and "ends after 0 of 2 episodes" in left.meta.skipped[-1]
    np.testing.assert_array_equal(left.actions, whole.actions[-len(left) :])
    code, said = check(tmp_path / "bridge", "benchmark=simpler_widowx", capsys=capsys)
    assert code == 1 and "00000-of-00002" in said


@pytest.mark.slow
def test_the_audit_is_the_same_on_two_processes(tmp_path):
    write_split(tmp_path / "training")
    cfg = compose_config("convert", "benchmark=calvin_abc_d", f"data.path={tmp_path}/training")
    units = [u for u in source_of(cfg.benchmark, cfg.data).units(("static",))]
    units += [type(u)(u.path, u.prefix, u.digits, u.cameras, u.stretches[:1]) for u in units]
    one, two = Audit(), Audit()
    assert list(audit_source(units, 1, one)) == list(audit_source(units, 2, two)) == [1, 2]
    assert one == two and one.episodes == len(units[0].stretches) + 1 and not one.bad


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Encoding → a store."""
    path = tmp_path_factory.mktemp("written")
    for encoding in ("raw", "jpeg"):
        write_store(make_episodes(), path / encoding, reader={}, encoding=encoding)
    return path


@settings(max_examples=40)
@given(data=st.data())
def test_any_changed_byte_of_a_store_is_named(written, tmp_path_factory, data):
    written = written / data.draw(st.sampled_from(["raw", "jpeg"]))
    files = sorted(file.name for file in written.iterdir() if file.suffix in (".arrow", ".parquet"))
    name = data.draw(st.sampled_from(files))
    copy = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(written, copy)
    content = bytearray((copy / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (copy / name).write_bytes(content)
    audit = Audit()
    list(audit_store(copy, audit))
    assert [line.split(" is not as it was written")[0] for line in audit.bad] == [str(copy / name)]
    shutil.rmtree(copy)


def test_a_store_that_lost_or_won_a_file_or_has_no_hashes(written, tmp_path, capsys):
    written = written / "raw"
    code, said = check(written, capsys=capsys)
    assert code == 0 and FrameStore(written).meta.content_hash in said
    copy = tmp_path / "store"
    shutil.copytree(written, copy)
    (copy / "shard-00007-000.arrow").write_bytes(b"")
    (copy / "windows.parquet").unlink()
    code, said = check(copy, capsys=capsys)
    assert code == 1 and "windows.parquet is missing" in said and "00007-000.arrow is none of the store's files" in said

    old = tmp_path / "old"
    shutil.copytree(written, old)
    meta = json.loads((old / "meta.json").read_text())
    (old / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "files"}))
    code, said = check(old, capsys=capsys)
    assert code == 0 and "note: made before stores kept hashes" in said
    (old / "meta.json").write_text(json.dumps({**meta, "files": {}, "windows": 9}))
    code, said = check(old, capsys=capsys)
    assert code == 1 and "holds 4 windows, meta.json says 9" in said
    (old / "meta.json").write_text("{")
    code, said = check(old, capsys=capsys)
    assert code == 2 and said.count("\n") == 1 and "meta.json cannot be read" in said


def test_nothing_there_is_bad_input(tmp_path, capsys):
    code, said = check(tmp_path / "nowhere", capsys=capsys)
    assert code == 2 and said.startswith("error: no data at") and said.count("\n") == 1
