"""Repeat a training step whose loss or gradient was not finite, from the newest checkpoint before it.

    .venv/bin/python scripts/replay_nan.py runs/<run>/nan/step=K

Trains on from that checkpoint to step K in a temporary folder, changing nothing of the run, and prints what the step
gave then and gives now, with the samples it read. The same numbers: it is the data or the weights. A finite loss now:
it is the machine. Exit code 0 where the step is repeated, 1 where it is not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf

from train import train
from vla.cli import one_line
from vla.config import LoggerConfig, TrainConfig, open_schema, typed
from vla.errors import UserError
from vla.policy_configs import POLICIES
from vla.run_identity import run_dir
from vla.saving import damage, saved, step_of


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    with one_line("train"):
        then, now = replay(Path(sys.argv[1]))
    print(f"step {then['step']}, samples {then['batches']}")
    for name in ("losses", "gradient_norm"):
        print(f"  {name} then  {then[name]}\n  {name} now   {now.get(name, 'the step was passed without a fault')}")
    same = all(then[name] == now.get(name) for name in ("losses", "gradient_norm", "batches", "key"))
    print("repeated: it is the data or the weights" if same else "not repeated: it is the machine, or another version")
    sys.exit(0 if same else 1)


def replay(folder: Path) -> tuple[dict, dict]:
    """(what was written down of a step, what it gives now); the latter is {} where the step is finite now.

    Raises:
        UserError: `folder` is none of those, or of a run of several processes.
    """
    then, run = read(folder), folder.resolve().parent.parent
    if then["world_size"] > 1:
        raise UserError(
            f"{folder} is of {then['world_size']} processes; replay it by the run's own command, resume=auto"
        )
    cfg = read_config(run / "config.yaml")
    before = [path for path in saved(run) if step_of(path) <= then["step"] and damage(path) is None]
    with tempfile.TemporaryDirectory() as root:
        # Steps that were skipped before are skipped again; at this one the run then stops.
        trainer = replace(
            cfg.trainer, on_nan="skip", max_skipped=then["skipped_before"], checkpoint_every=cfg.max_steps + 1
        )
        again = replace(
            cfg, run_root=root, resume="auto", time_limit_minutes=None, logger=LoggerConfig(), trainer=trainer
        )
        if before:
            (run_dir(again) / "checkpoints").mkdir(parents=True)
            (run_dir(again) / "checkpoints" / before[-1].name).symlink_to(before[-1])
        repeated = run_dir(again) / "nan" / f"step={then['step']}"
        try:
            train(again)
        except UserError:
            if not repeated.exists():  # of something else
                raise
        return then, read(repeated) if repeated.exists() else {}


def read(folder: Path) -> dict:
    try:
        return json.loads((folder / "rank=0.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no runs/<run>/nan/step=K folder ({error})") from error


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run wrote."""
    content = OmegaConf.load(path)
    schema = open_schema(TrainConfig)
    schema.policy = open_schema(POLICIES[content.policy.name])
    return typed(OmegaConf.merge(schema, content))


if __name__ == "__main__":
    main()
