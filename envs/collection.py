"""Demonstrations for LIBERO made by the scripted expert, in LIBERO's official HDF5 layout.

Attempts are numbered and attempt i depends on (seed, task, i) alone. The file holds the first N successes in attempt
order, so its content does not depend on the number of workers. Frames are rendered live on every step by the
environment that evaluation uses, because frames replayed from saved states differ (fact sheet demo §4).

    collect("libero_goal", [8], demos=40, out=Path("datasets/libero_goal"))

Called from a script, that needs the usual `if __name__ == "__main__":`, since workers are spawned.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.libero import CAMERA_KEYS, FILE_SUFFIX
from envs.experts import check_solved, expert
from envs.libero import HOLD, LiberoEnv, ensure_gl
from envs.libero_files import task_list
from vla.errors import UserError

_ATTEMPTS_PER_DEMO = 3


@dataclass(frozen=True)
class Settings:
    """Everything a file's content depends on; stored in it as the attribute `collector`."""

    suite: str
    task_id: int
    demos: int
    cameras: tuple[str, ...]
    resolution: int
    seeds_from: int
    init_pool: int
    start_displacement: float
    noise: float
    seed: int
    frame_every: int = 1


def collect(
    suite: str,
    task_ids: list[int],
    demos: int,
    out: Path,
    cameras: tuple[str, ...] = ("static",),
    resolution: int = 128,
    seeds_from: int = 0,
    init_pool: int = 30,
    start_displacement: float = 0.0,
    noise: float = 0.4,
    seed: int = 0,
    frame_every: int = 1,
    workers: int = 2,
    progress: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Write `<out>/<task>_demo.hdf5` with `demos` successful demonstrations of each task.

    Args:
        cameras: keys of `envs.libero.CAMERAS`.
        resolution: pixels per side.
        seeds_from: first initial state used.
        init_pool: number of initial states the attempts cycle through; keep it clear of the evaluation's.
        start_displacement: metres, as in `LiberoEnv`.
        frame_every: render every k-th step only. Neighbouring frames are nearly the same and rendering is most of the
            cost, so the same minutes give k times as many demonstrations. Actions and states are kept for every step;
            the other frames are zero and marked in the extra dataset `obs/frame_valid`, which `data.libero` heeds.
        noise: standard deviation of the executed motion's noise, action units (`envs.experts.expert`).
        workers: processes; one simulator each, about 2 GB.
        overwrite: replace files made with other parameters.

    Returns:
        One path per task. A complete file made with the same parameters is kept as it is.

    Raises:
        UserError: unknown suite, task or camera; a file made otherwise is in the way; the expert fails too often.
    """
    counts = {"demos": demos, "workers": workers, "init_pool": init_pool, "frame_every": frame_every}
    if low := [f"{name}={count}" for name, count in counts.items() if count < 1]:
        raise UserError(f"{', '.join(low)}: must be at least 1")
    names = [name for name, _ in task_list(suite)]
    todo: list[tuple[Settings, Path]] = []
    paths: list[Path] = []
    for task_id in task_ids:
        check_solved(suite, task_id)
        settings = Settings(
            suite,
            task_id,
            demos,
            tuple(cameras),
            resolution,
            seeds_from,
            init_pool,
            start_displacement,
            noise,
            seed,
            frame_every,
        )
        paths.append(Path(out) / f"{names[task_id]}{FILE_SUFFIX}")
        if overwrite or not _is_complete(paths[-1], settings):
            todo.append((settings, paths[-1]))
    if todo:
        ensure_gl()
        Path(out).mkdir(parents=True, exist_ok=True)
    with _progress(progress) as bar:
        for path in paths:
            if path not in [waiting for _, waiting in todo]:
                bar.console.print(f"kept {path}: complete, made with the same parameters")
        for settings, path in todo:
            _collect_task(settings, path, workers, bar)
    return paths


def attempt(env: LiberoEnv, settings: Settings, index: int) -> dict[str, np.ndarray] | None:
    """Run attempt `index`; its HDF5 datasets by name when the task succeeded within the protocol's steps, else None.

    The first step recorded holds still: the file pairs each action with the observation AFTER it, so this step carries
    the observation that the expert's first action answers (`data.libero.read_libero`, pairing "aligned").
    """
    init_states = len(env.init_states)
    round_, place = divmod(index, settings.init_pool)
    # The same initial state comes back in every round with another displacement, which the whole seed determines.
    first = settings.seeds_from + place
    env.reset(first % init_states + init_states * (round_ + 1000 * settings.seed))
    rng = np.random.default_rng([settings.seed, settings.task_id, index])
    steps = []
    for clean, executed in _hold_then(expert(env, settings.noise, rng)):
        before = env.sim_state()
        render = len(steps) % settings.frame_every == 0
        env.step(executed, render)
        steps.append(_record(env, clean, before, render))
        if env.success or len(steps) == env.max_steps:
            break
    if not env.success:
        return None
    demo = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
    if settings.frame_every > 1:
        demo["obs/frame_valid"] = (np.arange(len(steps)) % settings.frame_every == 0).astype(np.uint8)
    ending = np.zeros(len(steps), np.uint8)
    ending[-1] = 1
    return demo | {"rewards": ending, "dones": ending}


def _hold_then(actions: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield HOLD, HOLD
    yield from actions


def _record(env: LiberoEnv, clean: np.ndarray, before: np.ndarray, rendered: bool) -> dict[str, np.ndarray]:
    from robosuite.utils.transform_utils import quat2axisangle

    obs = env.raw_obs
    position, orientation = obs["robot0_eef_pos"], quat2axisangle(obs["robot0_eef_quat"].copy())
    record = {
        "actions": np.append(clean[:6], -1.0 if clean[6] >= 0.5 else 1.0),
        "states": before,
        "robot_states": env.robosuite.get_robot_state_vector(obs),
        "obs/ee_states": np.concatenate([position, orientation]),
        "obs/ee_pos": position,
        "obs/ee_ori": orientation,
        "obs/joint_states": obs["robot0_joint_pos"],
        "obs/gripper_states": obs["robot0_gripper_qpos"],
    }
    for camera in env.cameras:
        blank = np.zeros((env.resolution, env.resolution, 3), np.uint8)
        record[f"obs/{CAMERA_KEYS[camera]}"] = env.raw_frame(camera) if rendered else blank
    return record


def _collect_task(settings: Settings, path: Path, workers: int, bar) -> None:
    import h5py

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    row = bar.add_task(path.name.removesuffix(FILE_SUFFIX), total=settings.demos)
    try:
        with h5py.File(temporary, "w") as file:
            data = file.create_group("data")
            total = 0
            for count, (index, demo, scene) in enumerate(_successes(settings, workers, lambda: bar.advance(row))):
                _write_demo(data.create_group(f"demo_{count}"), demo, index, scene["model_file"])
                total += len(demo["actions"])
            _write_attributes(data, settings, scene, total)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _successes(settings: Settings, workers: int, on_success) -> Iterator[tuple[int, dict, dict]]:
    """(attempt, demo, scene) of the first N successes in attempt order, as soon as that order allows.

    Only as many attempts are under way as successes are missing: none is wasted, and those made are a prefix of the
    numbering whose successes are exactly the N wanted, whatever the number of workers.
    """
    limit = _ATTEMPTS_PER_DEMO * settings.demos
    running: dict[Future, int] = {}
    finished: dict[int, tuple | None] = {}
    started = succeeded = next_out = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, settings.demos), context, _start_worker) as pool:
        try:
            while succeeded < settings.demos:
                while succeeded + len(running) < settings.demos:
                    if started == limit:
                        raise UserError(
                            f"the expert made {succeeded} of {settings.demos} demonstrations of {settings.suite} "
                            f"task {settings.task_id} in {limit} attempts: lower noise or start_displacement"
                        )
                    running[pool.submit(_run_attempt, settings, started)] = started
                    started += 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    finished[running.pop(future)] = result
                    if result is not None:
                        succeeded += 1
                        on_success()
                while next_out in finished:
                    result = finished.pop(next_out)
                    if result is not None:
                        yield next_out, *result
                    next_out += 1
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker collecting {settings.suite} task {settings.task_id} was killed, most likely out of memory "
                "(2 GB each): lower workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # One thread each for the software renderer and the numerical libraries, which otherwise fight for the cores.
    os.environ.update(LP_NUM_THREADS="1", OMP_NUM_THREADS="1")


@functools.cache
def _environment(settings: Settings) -> LiberoEnv:
    return LiberoEnv(
        settings.suite,
        settings.task_id,
        settings.cameras,
        settings.resolution,
        start_displacement=settings.start_displacement,
    )


def _run_attempt(settings: Settings, index: int) -> tuple[dict, dict] | None:
    env = _environment(settings)
    demo = attempt(env, settings, index)
    return None if demo is None else (demo, _scene(env))


def _scene(env: LiberoEnv) -> dict[str, str]:
    from libero.libero.envs.bddl_utils import get_problem_info

    packages = f"{Path(np.__file__).parents[1]}{os.sep}"
    return {
        "model_file": env.robosuite.sim.model.get_xml().replace(packages, ""),
        "problem_info": json.dumps(get_problem_info(str(env.bddl_file))),
        "bddl_file_name": f"{env.suite}/{env.bddl_file.name}",
        "bddl_file_content": env.bddl_file.read_text(),
        "versions": json.dumps(env.versions()),
    }


def _write_demo(group, demo: dict[str, np.ndarray], index: int, model_file: str) -> None:
    for key, array in demo.items():
        # One chunk per frame: a reader that wants one frame inflates one frame.
        image = (
            {"chunks": (1, *array.shape[1:]), "compression": "gzip", "compression_opts": 4} if array.ndim == 4 else {}
        )
        group.create_dataset(key, data=array, **image)
    group.attrs["num_samples"] = len(demo["actions"])
    group.attrs["init_state"] = demo["states"][0]
    group.attrs["model_file"] = model_file
    group.attrs["attempt"] = index


def _write_attributes(data, settings: Settings, scene: dict[str, str], total: int) -> None:
    problem = json.loads(scene["problem_info"])
    data.attrs["env_name"] = problem["problem_name"]
    data.attrs["problem_info"] = scene["problem_info"]
    data.attrs["macros_image_convention"] = "opengl"
    data.attrs["bddl_file_name"] = scene["bddl_file_name"]
    data.attrs["bddl_file_content"] = scene["bddl_file_content"]
    environment = {"type": 1, "env_name": problem["problem_name"], "bddl_file": scene["bddl_file_name"]}
    data.attrs["env_args"] = json.dumps(environment)
    data.attrs["num_demos"] = settings.demos
    data.attrs["total"] = total
    data.attrs["collector"] = json.dumps(asdict(settings), sort_keys=True)
    data.attrs["versions"] = scene["versions"]


def _is_complete(path: Path, settings: Settings) -> bool:
    import h5py

    if not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            made_with = json.loads(file["data"].attrs["collector"])
    except (OSError, KeyError, json.JSONDecodeError):
        made_with = None
    if made_with != json.loads(json.dumps(asdict(settings))):
        raise UserError(f"{path}: exists, made with other parameters: choose another folder or pass overwrite=true")
    return True


def _progress(shown: bool):
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("demos"), disable=not shown)
