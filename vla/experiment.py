"""A paper's table as a file of sweep parameters: conf/experiment/<name>.yaml, read by both entry points.

    python train.py -m experiment=idl_table1 size=tiny         # every run of the table, at another size
    python evaluate.py -m experiment=idl_table1 size=tiny      # the policies of those runs, evaluated as the table says

`train` and `evaluate` in the file are overrides of the two programs; a list is swept. What is also given on the command
line replaces the file's. evaluate.py gets one `policy="run:<overrides of train.py>"` per run, which stands for the
policy that train.py left with these overrides. There an override that only train.py knows belongs to the runs, one that
both know to both; `run.key=value` is for the runs alone, and where a table trains on one benchmark and evaluates on
another, benchmark and data keys are the evaluation's.
A table whose rows are no product (GenVLA's OpenVLA has seven arms, its π0 two) lists several blocks under `train`; its
runs are then swept as whole command lines, `cell='baseline=pi0 ablation=plus seed=0',…`; `baseline=pi0` picks the
blocks that have it.
This only rewrites the command line: from here on it is Hydra's, its launchers (Slurm) included.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vla.config import PROGRAMS
from vla.errors import UserError
from vla.run_identity import run_dir

RUN = "run:"
ONLY_RUN = "run."
EVALUATION_ONLY = {"benchmark", "data"}


def expand(program: str, arguments: list[str], conf: Path) -> list[str]:
    """`arguments` with `experiment=NAME` replaced by what the file says for `program` ("train" or "evaluate").

    Raises:
        UserError: no such experiment, a file that is not one, or a sweep without -m.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    if not named:
        return arguments
    table = read(named[-1], conf)
    rest = [argument for argument in arguments if not argument.startswith("experiment=")]
    table["train"], rest = select(table["train"], rest)
    if program == "evaluate":
        apart = any(block.get("benchmark") != table["evaluate"].get("benchmark") for block in table["train"])
        ours, theirs = divide(rest, conf, EVALUATION_ONLY if apart else set())
        runs = [" ".join(run) for block in table["train"] for run in product(block, theirs)]
        sweep = sweeps(table["evaluate"], ours)
        if not any(key_of(argument) == "policy" for argument in ours):
            sweep.append("policy=" + ",".join(quoted(RUN + run) for run in runs))
    else:
        of_runs = [argument for argument in rest if not key_of(argument).startswith(("hydra", "dry_run"))]
        ours, runs = rest, [run for block in table["train"] for run in product(block, of_runs)]
        if len(table["train"]) == 1:
            sweep = sweeps(table["train"][0], rest)
        else:
            sweep = ["cell=" + ",".join(quoted(" ".join(run)) for run in runs)]
            ours = [argument for argument in rest if argument not in of_runs or argument.startswith("-")]
    if len(runs) > 1 and not {"-m", "--multirun", "--help", "-h", "--cfg", "-c", "dry_run=true"} & set(rest):
        raise UserError(f"experiment={named[-1]} has {len(runs)} runs; add -m to run them all")
    overrides = [argument for argument in ours if "=" in argument and not argument.startswith("-")]
    flags = [argument for argument in ours if argument not in overrides]
    return [*flags, *sweep, *overrides]  # argparse takes one run of positional arguments only


def read(name: str, conf: Path) -> dict[str, Any]:
    """{"train": blocks of overrides, "evaluate": overrides} of conf/experiment/<name>.yaml."""
    file = conf / "experiment" / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise UserError(f"experiment={name} does not exist; choose one of: {known}")
    table = yaml.safe_load(file.read_text())
    if not isinstance(table, dict) or set(table) != {"train", "evaluate"}:
        raise UserError(f"{file} must have the two keys train and evaluate, each with overrides")
    blocks = table["train"] if isinstance(table["train"], list) else [table["train"]]
    return table | {"train": blocks}


def select(blocks: list[dict[str, Any]], given: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The blocks that `given` picks, and what is given beside that.

    A key on which the blocks differ picks those that have one of its values ("baseline=pi0"), with these alone; where
    none has, it replaces what they all say, as any other key does.
    """
    left = []
    for argument in given:
        key, wanted = key_of(argument), split(argument.partition("=")[2])
        of_block = [axes_of(block, []).get(key, []) for block in blocks]
        if argument.startswith("-") or all(values == of_block[0] for values in of_block):
            left.append(argument)
            continue
        found = [[value for value in values if text(value) in wanted] for values in of_block]
        if any(found):
            blocks = [block | {key: values} for block, values in zip(blocks, found, strict=True) if values]
        else:
            left.append(argument)
    return blocks, left


def divide(arguments: list[str], conf: Path, apart: set[str]) -> tuple[list[str], list[str]]:
    """(for evaluate.py, for the runs): each gets what it knows; what neither knows, evaluate.py gets to refuse."""
    mine, runs = known("evaluate", conf), known("train", conf) - apart
    theirs = [a.removeprefix(ONLY_RUN) for a in arguments if a.startswith(ONLY_RUN) or key_of(a).split(".")[0] in runs]
    ours = [a for a in arguments if not a.startswith(ONLY_RUN)]
    return [a for a in ours if key_of(a).split(".")[0] not in runs - mine], theirs


def known(program: str, conf: Path) -> set[str]:
    """The top-level keys and groups of a program."""
    defaults = yaml.safe_load((conf / f"{program}.yaml").read_text())["defaults"]
    groups = {key.removeprefix("optional ") for entry in defaults if isinstance(entry, dict) for key in entry}
    return {field.name for field in fields(PROGRAMS[program])} | groups


def product(parameters: dict[str, Any], given: list[str]) -> list[list[str]]:
    """Every run of a table as overrides, in the order of the file; `given` on the command line comes first."""
    axes = [[f"{key}={text(value)}" for value in values] for key, values in axes_of(parameters, given).items()]
    lists = [[f"{key_of(a)}={value}" for value in split(a.partition("=")[2])] for a in given if not a.startswith("-")]
    return [list(run) for run in itertools.product(*axes, *lists)]


def sweeps(parameters: dict[str, Any], given: list[str]) -> list[str]:
    """The same as Hydra's sweep overrides: key=a,b."""
    return [f"{key}=" + ",".join(text(v) for v in values) for key, values in axes_of(parameters, given).items()]


def axes_of(parameters: dict[str, Any], given: list[str]) -> dict[str, list]:
    taken = {key_of(argument) for argument in given}
    return {key: value if isinstance(value, list) else [value] for key, value in parameters.items() if key not in taken}


def key_of(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def split(value: str) -> list[str]:
    """A sweep's values: "0,1" gives two, "[0,1]" is one list."""
    if value[:1] in ("[", "{", "'", '"'):
        return [value]
    return value.split(",")


def text(value: Any) -> str:
    """A YAML value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(text(item) for item in value) + "]"
    return str(value)


def quoted(words: str) -> str:
    return "'" + words.replace("'", "\\'") + "'"


def policy_of_run(spec: str) -> Path:
    """The policy directory of `run:<overrides>`.

    Raises:
        UserError: that run has not been trained (to its end).
    """
    from vla.cli import compose_config

    overrides = shlex.split(spec.removeprefix(RUN))
    policy = run_dir(compose_config("train", *overrides)) / "policy"
    if not (policy / "config.json").exists():
        raise UserError(f"{policy} does not exist yet; train it: python train.py {' '.join(overrides)}")
    return policy
