"""Measure speed, each figure beside the plain way of doing the same thing on the same machine in the same run.

python scripts/bench.py rollout            environment steps/s: rendering every step, once a chunk, never
                                           (--family calvin: CALVIN's chains)
python scripts/bench.py loader             samples/s: frame store, and CALVIN's files read directly
python scripts/bench.py probe              seconds of a frozen-encoder probe: first, second, without kept tokens
python scripts/bench.py latency            ms per action chunk of every baseline and size, on the device at hand
python scripts/bench.py latency --baseline flower pi0 --size tiny --json latency.json
python scripts/bench.py decode             ms of an action said as text, and as seven tokens by the same model
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.errors import UserError
from vla.policy_configs import POLICIES


def main() -> None:
    options = arguments()
    # As in the rollout workers: one core a simulator. Set before the simulator is imported, which reads it then.
    if options.command == "rollout":
        os.environ.update(LP_NUM_THREADS="1", OMP_NUM_THREADS="1")
    try:
        table, result = options.measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python scripts/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("rollout", help="environment steps/s with render on demand")
    one.add_argument("--family", choices=["libero", "calvin"], default="libero")
    one.add_argument("--suite", default="libero_goal", help="of LIBERO")
    one.add_argument("--task", type=int, default=8, help="of LIBERO")
    one.add_argument("--steps", type=int, default=48, help="control steps per measurement")
    one.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each mode")
    two = commands.add_parser("latency", help="ms per action chunk of every baseline and size")
    two.add_argument("--baseline", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    two.add_argument("--size", nargs="+", choices=["tiny", "small", "full"], default=["tiny", "small", "full"])
    two.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    two.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    two.add_argument("--repeats", type=int, default=10, help="calls that are timed")
    two.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    three = commands.add_parser("loader", help="samples/s from the frame store and from CALVIN's files")
    three.add_argument("--data", type=Path, help="a CALVIN split (default: made-up frames of the same size)")
    three.add_argument("--batches", type=int, default=8, help="of 32 samples, per measurement")
    three.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each way")
    four = commands.add_parser("probe", help="a frozen-encoder probe with its tokens kept on disk, and without")
    four.add_argument("--baseline", choices=list(POLICIES), default="vlm4vla")
    four.add_argument("--size", choices=["tiny", "small", "full"], default="small")
    four.add_argument("--frames", type=int, default=1500, help="of the task (a LIBERO task has about 7,000)")
    four.add_argument("--steps", type=int, default=1000, help="of the probe's training")
    four.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    five = commands.add_parser("decode", help="ms of an action as text beside that of seven tokens")
    five.add_argument("--baseline", choices=["openvla", "pi0", "vlm4vla", "spatialvla"], default="openvla")
    five.add_argument("--size", choices=["tiny", "small"], default="tiny")
    five.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="environments at a time")
    five.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    five.add_argument("--repeats", type=int, default=20, help="rounds that are timed")
    five.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    for command, measure in ((one, rollout), (two, latency), (three, loader), (four, probe), (five, decode)):
        command.set_defaults(measure=measure)
        command.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def rollout(options: argparse.Namespace):
    from vla.bench.rollout import measure, show

    result = measure(options.family, options.suite, options.task, options.steps, options.rounds)
    return show(result), result


def loader(options: argparse.Namespace):
    from vla.bench.loader import measure, show

    result = measure(options.data, options.batches, options.rounds)
    return show(result), result


def probe(options: argparse.Namespace):
    import torch

    from vla.bench.probe import measure, show

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(options.baseline, options.size, options.frames, options.steps, device)
    return show(result), result


def latency(options: argparse.Namespace):
    import torch

    from vla.bench.latency import measure, show

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(options.baseline, options.size, device, options.dtype, options.repeats)
    return show(result), result


def decode(options: argparse.Namespace):
    import torch

    from vla.bench.decode import measure, show

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(options.baseline, options.size, options.batch, device, options.repeats)
    return show(result), result


if __name__ == "__main__":
    main()
