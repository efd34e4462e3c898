"""How the entry points start: Hydra composes, bad input becomes one line, heavy imports wait.

`main("train")` wraps a function of one typed config. Hydra's own messages run over several lines and, for a few
mistakes, a traceback; here every mistake in the command line ends as one line that names the key, suggests the
nearest one, and exits with 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vla import plan
from vla.config import register, typed
from vla.errors import UserError
from vla.experiment import expand
from vla.launched import as_job, before_launch, in_own_job

CONF = Path(__file__).resolve().parent.parent / "conf"


def main(name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorate `run(cfg)`, where cfg is the frozen dataclass of conf/<name>.yaml.

    Exit codes: 0 done, 2 bad input (one line on stderr), anything else is a bug and keeps its traceback.
    """

    def decorate(run: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(run)
        def entry() -> None:
            register()
            OmegaConf.register_new_resolver("choices", lambda group: "  ".join(choices(group)), replace=True)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting by itself

            @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
            def compose_and_run(cfg: DictConfig) -> Any:
                if in_own_job():
                    with as_job(), as_user_error(name):
                        return run(cell_of(typed(cfg), name))
                try:
                    with one_line(name):  # inside too: Hydra prints a line of its own for what leaves a job
                        return run(cell_of(typed(cfg), name))
                except SystemExit as mistake:
                    if mistake.code != 2 or not swept_here():
                        raise
                    failed.append(mistake)  # the sweep's other cells are run all the same

            failed: list[SystemExit] = []
            with one_line(name):
                sys.argv[1:] = expand(name, multirun_first(sys.argv[1:]), CONF)
                if plan.DRY_RUN in sys.argv:
                    jobs = plan.with_progress(plan.jobs(sys.argv[1:]), "composing")
                    plan.show(name, [compose_config(name, *plan.command_line(job)) for job in jobs])
                    return
                before_launch(sys.argv[1:])
                compose_and_run()
            if failed:
                fail(f"{len(failed)} of the sweep's runs ended with the errors above")

        return entry

    return decorate


def multirun_first(words: list[str]) -> list[str]:
    """-m may stand anywhere; argparse takes one stretch of overrides only and would refuse those behind it."""
    flags = [word for word in words if word in ("-m", "--multirun")]
    return flags[:1] + [word for word in words if word not in flags]


def swept_here() -> bool:
    """Whether this is one of several runs of a sweep in this very process."""
    job = HydraConfig.get()
    return job.mode == RunMode.MULTIRUN and job.launcher._target_.endswith("BasicLauncher")


def compose_config(name: str, *overrides: str) -> Any:
    """The frozen dataclass of conf/<name>.yaml with command-line overrides, for callers that are not a command line."""
    register()
    running = GlobalHydra.instance()
    job, running.hydra = running.hydra, None  # of an entry point that asks what another would have composed
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return typed(hydra.compose(name, overrides=list(overrides)))
    finally:
        running.hydra = job


def cell_of(cfg: Any, name: str) -> Any:
    """The configuration that `cell`, a whole command line (vla/experiment.py), stands for; `cfg` itself without one."""
    cell = getattr(cfg, "cell", None)
    return cfg if cell is None else compose_config(name, *shlex.split(cell))


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn bad input into one line on stderr and an exit code."""
    try:
        with as_user_error(name):
            yield
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; what was finished is kept", code=130)


@contextlib.contextmanager
def as_user_error(name: str) -> Iterator[None]:
    """What Hydra or OmegaConf found wrong, as the one line that the user gets."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, name)) from error


def fail(message: str, code: int = 2) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def explain(error: Exception, name: str) -> str:
    """One line for what Hydra or OmegaConf found wrong, with the nearest valid key or choice."""
    cause: BaseException | None = error
    text = str(error)
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
        text += "\n" + str(cause)
    if bare := re.search(r"Error parsing override '(.*?)'\s*missing EQUAL", text):
        return f"{bare.group(1)!r} has no value; write it as {bare.group(1)}=..."
    if missing := re.search(r"Could not find '(\w[\w/]*)/([^']+)'", text):
        group, choice = missing.groups()
        return f"{group}={choice} does not exist; choose one of: {', '.join(choices(group))}" + (
            f" (did you mean {near}?)" if (near := nearest(choice, choices(group))) else ""
        )
    if unknown := re.search(r"Could not override '([^']+)'.*(?:not in|is not in struct)", text, re.DOTALL):
        key = unknown.group(1)
        near = nearest(key, known_keys(name))
        hint = f"did you mean {near}?" if near else f"`python {name}.py --cfg job` lists the keys"
        return f"unknown key {key!r} on the command line; {hint}"
    if group := re.search(r"Could not override '([^']+)'\.?\s*No match in the defaults list", text):
        near = nearest(group.group(1), known_keys(name))
        return f"unknown group {group.group(1)!r}" + (f"; did you mean {near}?" if near else "")
    if key := re.search(
        r"Missing mandatory value: (\S+)|Structured config of type .* has missing mandatory value: (\S+)", text
    ):
        return (
            f"{key.group(1) or key.group(2)} needs a value; give {key.group(1) or key.group(2)}=... on the command line"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines[:4]))


def nearest(word: str, words: list[str]) -> str | None:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return close[0] if close else None


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def known_keys(name: str) -> list[str]:
    """Every dotted key of the default composition, and the group names."""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name=name)
    keys: list[str] = [path.name for path in CONF.iterdir() if path.is_dir()]

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            if OmegaConf.is_dict(OmegaConf.select(node, str(key), throw_on_missing=False)):
                walk(node[key], f"{prefix}{key}.")

    walk(cfg, "")
    return keys
