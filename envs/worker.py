"""The rollout worker: a process, perhaps under its own interpreter, that owns one simulator.

Started by envs/rollout.py as `python -m envs.worker JOBS ANSWERS`, two inherited file descriptors carrying JSON lines
(simulators print to stdout and some read stdin, so neither is used):
  JOBS     perhaps {"factory", "kwargs"}, an environment to build before there is a policy (envs/early.py);
           {"factory", "url", "timeout_s"}, perhaps with "log", where output goes from then on; then a job per episode:
           {"kwargs", "task": {"name", "seed"}, "execute_steps", "video": null | path without ending}
  ANSWERS  one line per job: {"ok": true, "success", "steps", "seconds", "subtasks", "versions"}
           or {"ok": false, "kind": "simulator" | "policy" | "user", "error"}
The environment is kept while successive jobs have the same kwargs. Anything but a policy's or a user's error is the
simulator's: the parent then replaces this process. When the parent dies, JOBS ends and the worker exits, even from
inside an episode; on Linux the kernel ends it too, even from inside native code that never lets another thread run.
Imports neither torch nor policy code, and runs on Python >= 3.8.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import set_image_format
from vla_eval.runners.base import ModelActError
from vla_eval.runners.sync_runner import SyncEpisodeRunner

from envs.base import Environment
from envs.benchmark import ChunkBenchmark
from vla.errors import UserError

VIDEO_FPS = 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(jobs_fd: int, answers_fd: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_jobs, args=(jobs_fd, jobs), daemon=True).start()
    with os.fdopen(answers_fd, "w") as answers:

        def answer(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        anyio.run(_work, jobs.get, answer)


def _read_jobs(fd: int, jobs: queue.Queue) -> None:
    with os.fdopen(fd) as lines:
        for line in lines:
            jobs.put(json.loads(line))
    os._exit(0)  # the parent is gone or has finished; an episode in progress has nobody to report to


async def _work(next_job: Callable[[], dict[str, Any]], answer: Callable[[dict[str, Any]], None]) -> None:
    env: Environment | None = None
    kwargs: dict[str, Any] | None = None
    setup = next_job()
    if "kwargs" in setup:
        env, kwargs = _built_early(setup)
        setup = next_job()
    if "log" in setup:
        _log_to(setup["log"])
    set_image_format("raw")  # the server is on this machine: PNG would cost more than it saves
    # One attempt: a lost connection means that the parent is gone, or that the episode must start again anyway.
    async with Connection(setup["url"], timeout=setup["timeout_s"], max_retries=1) as connection:
        while True:
            job = next_job()
            try:
                if env is None or kwargs != job["kwargs"]:
                    if env is not None:
                        env.close()
                    env, kwargs = load_factory(setup["factory"])(**job["kwargs"]), job["kwargs"]
                answer({"ok": True, **await run_episode(env, job, connection)})
            except UserError as error:
                answer({"ok": False, "kind": "user", "error": str(error)})
            except ModelActError as error:
                answer({"ok": False, "kind": "policy", "error": str(error)})
            except Exception as error:
                # Reported, not hidden: the parent decides whether to retry, the log keeps the traceback.
                traceback.print_exc()
                answer({"ok": False, "kind": "simulator", "error": f"{type(error).__name__}: {error}"[:2000]})


def _built_early(guess: dict[str, Any]) -> tuple[Environment | None, dict[str, Any] | None]:
    """The environment and its arguments, or neither: the first episode then builds one and reports what is wrong."""
    try:
        return load_factory(guess["factory"])(**guess["kwargs"]), guess["kwargs"]
    except Exception:
        traceback.print_exc()
        return None, None


def _log_to(path: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


async def run_episode(env: Environment, job: dict[str, Any], connection: Connection) -> dict[str, Any]:
    """Roll one episode out: {"success": bool, "steps": int, "seconds": wall clock, "subtasks": list, "versions": dict}.

    Raises:
        UserError: the chunk is longer than the episode.
        ModelActError: the policy raised. Anything else: the simulator did.
    """
    if job["execute_steps"] > env.max_steps:
        raise UserError(
            f"execute_steps={job['execute_steps']} is longer than an episode of {job['task']['name']!r} "
            f"({env.max_steps} control steps); lower execute_steps"
        )
    benchmark = ChunkBenchmark(env, film=job["video"] is not None)
    result = await SyncEpisodeRunner().run_episode(benchmark, job["task"], connection)
    success = bool(result["metrics"]["success"])
    if job["video"] is not None:
        write_video(Path(f"{job['video']}_{'success' if success else 'failure'}.mp4"), benchmark.frames)
    return {
        "success": success,
        "steps": int(result["metrics"]["steps"]),
        "seconds": float(result["elapsed_sec"]),
        "subtasks": env.subtasks,
        "versions": env.versions(),
    }


def load_factory(name: str) -> Callable[..., Environment]:
    """The callable behind "package.module:name".

    Raises:
        UserError: it cannot be imported in this interpreter (no retry would help).
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{sys.executable} cannot load the environment {name}: {type(error).__name__}: {error}; "
            "install the simulator there or choose another python"
        ) from error


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Encode uint8 (H, W, 3) frames as H.264 at 20 frames/s; odd edges are cropped, which yuv420p requires."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"videos need PyAV in {sys.executable} ({error}); pip install av there, or ask for videos=0"
        ) from None

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            image = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(temporary, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
