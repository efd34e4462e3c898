"""Log trials on a real robot, one call each, into the records that scripts/tables.py reads.

    python scripts/trial.py runs/<run>/policy PickCarrot success
    python scripts/trial.py runs/<run>/policy PickCarrot failure --trial 7 --note "gripper slipped"
    python scripts/trial.py runs/<run>/policy --undo        # take back the last one; trials.jsonl keeps both
    python scripts/trial.py runs/<run>/policy               # what is logged, per task
    python scripts/tables.py results

Trial n of a task is one placement of the objects: use the same for every policy, and the arms are compared in pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/trial.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help='policy directory, or "run:<overrides of train.py>"')
    parser.add_argument("task", nargs="?", help="its name in the benchmark's YAML")
    parser.add_argument("outcome", nargs="?", choices=["success", "failure"])
    parser.add_argument("--trial", type=int, help="its number (default: the first of the task that is not logged)")
    parser.add_argument("--note", default="")
    parser.add_argument("--steps", type=int, default=0, help="control steps it took, if counted")
    parser.add_argument("--seconds", type=float, default=0.0, help="it took, if measured")
    parser.add_argument("--undo", action="store_true", help="take back the last trial logged for this policy")
    parser.add_argument("--benchmark", default="real_robot", help="conf/benchmark/<this>.yaml, with a list `trials`")
    parser.add_argument("--arm", help="label in the table (default: the policy's own)")
    parser.add_argument("--execute-steps", type=int, help="actions executed per answer (default: the policy's chunk)")
    parser.add_argument("--results", default="results")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.task) != bool(options.outcome) or (options.undo and options.task):
        parser.error("give a task and its outcome (success or failure), or --undo, or neither")
    try:
        run(options)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    with open_log(options) as log:
        if options.undo:
            line = log.undo()
            print(f"taken back: trial {line['trial']} of {line['task']}, {outcome(line)}")
        elif options.task:
            success = options.outcome == "success"
            line = log.add(options.task, success, options.trial, options.note, options.steps, options.seconds)
            print(f"logged: trial {line['trial']} of {line['task']}, {outcome(line)}; {log.path}")
        else:
            print(f"{log.header['arm']}; {log.path}")
        for task, rate in log.per_task_rates():
            if options.task in (None, task) and rate["n"]:
                low, high = rate["interval"]
                counts = f"{rate['successes']}/{rate['n']} = {rate['rate']:.2f} [{low:.2f}, {high:.2f}]"
                print(f"  {task}: {counts}, {log.per_task - rate['n']} to go")


def outcome(line: dict) -> str:
    return ("success" if line["success"] else "failure") + (f" ({line['note']})" if line["note"] else "")


def open_log(options: argparse.Namespace):
    """The log of this policy in the folder that evaluate.py would give it."""
    from envs.trials import TrialLog
    from evaluate import folder, identity
    from vla.checkpoint import checkpoint_hash
    from vla.cli import choices, compose_config
    from vla.experiment import RUN, policy_of_run

    if options.benchmark not in choices("benchmark"):
        raise UserError(f"--benchmark {options.benchmark} does not exist; choose real_robot or write its YAML")
    cfg = compose_config("evaluate", "policy=none", f"benchmark={options.benchmark}")
    cfg = replace(cfg, arm=options.arm, results_root=options.results)
    if not cfg.benchmark.trials:
        raise UserError(
            f"benchmark={options.benchmark} has no list `trials` in its YAML; its episodes are evaluate.py's"
        )
    path = policy_of_run(options.policy) if options.policy.startswith(RUN) else Path(options.policy)
    config = read_config(path)
    steps = options.execute_steps or config["arguments"]["chunk"]
    header = identity(cfg, config["about"] | {"baseline": config["baseline"]}, checkpoint_hash(path))
    header |= {"evaluation": "real_robot", "execute_steps": steps}
    return TrialLog(folder(cfg, header), header, list(cfg.benchmark.trials), cfg.benchmark.init_states)


def read_config(path: Path) -> dict:
    """config.json of a policy directory, without its weights, of which a large policy has many."""
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not an exported policy ({error}); train.py leaves one at runs/<run>/policy"
        ) from None


if __name__ == "__main__":
    main()
