"""Measure speed, each figure beside the plain way of doing the same thing on the same machine in the same run.

python scripts/bench.py rollout            environment steps/s: rendering every step, once a chunk, never
                                           (--family calvin: CALVIN's chains)
python scripts/bench.py workers            environment steps/s of the whole evaluator with one worker and with two
python scripts/bench.py loader             samples/s: frame store, and CALVIN's files read directly
python scripts/bench.py probe              seconds of a frozen-encoder probe: first, second, without kept tokens
python scripts/bench.py latency            ms per action chunk of every baseline and size, on the device at hand
python scripts/bench.py latency --baseline flower pi0 --size tiny --json latency.json
python scripts/bench.py decode             ms of an action said as text, and as seven tokens by the same model
python scripts/bench.py train              a training step: ptr beside vanilla, the trainer's loop beside the bare step
python scripts/bench.py train --size full --precision bf16 --backward-only       VLM4VLA's 8 B shape on one large GPU
python scripts/bench.py flops              FLOPs of a step of every baseline at full size, counted without running it
python scripts/bench.py startup            seconds until a command answers, and until evaluate.py's first action
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
    if options.command in ("rollout", "workers"):
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
    two.add_argument("--compile", action="store_true", help="measure compiled policies too (a minute each)")
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
    six = commands.add_parser("train", help="a training step with inverse dynamics and without")
    six.add_argument("--baseline", choices=list(POLICIES), default="vlm4vla")
    six.add_argument("--size", choices=["tiny", "small", "full"], default="tiny")
    six.add_argument("--batch", type=int, help="samples a step (default: the configuration's)")
    six.add_argument(
        "--precision", choices=["fp32", "bf16-mixed", "bf16"], help="(default: bf16-mixed on CUDA, else fp32)"
    )
    six.add_argument("--backward-only", action="store_true", help="without the optimiser, where that does not fit")
    six.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    six.add_argument("--rounds", type=int, default=20, help="steps of each arm, in turns")
    six.add_argument("--steps", type=int, default=20, help="of the trainer's loop, three times")
    six.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    seven = commands.add_parser("startup", help="seconds until a command answers")
    seven.add_argument("--rounds", type=int, default=3, help="of each command, in turns")
    eight = commands.add_parser("workers", help="env steps/s of the evaluator by its number of workers")
    eight.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    eight.add_argument("--episodes", type=int, default=12)
    eight.add_argument("--steps", type=int, default=120, help="of an episode")
    eight.add_argument("--rounds", type=int, default=2, help="of each number, in turns")
    nine = commands.add_parser("flops", help="FLOPs of a training step, counted on the meta device")
    nine.add_argument("--baseline", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    nine.add_argument("--size", nargs="+", choices=["tiny", "small", "full"], default=["full"])
    nine.add_argument("--batch", type=int, default=16, help="samples a step")
    parsers = (one, two, three, four, five, six, seven, eight, nine)
    measures = (rollout, latency, loader, probe, decode, train, startup, workers, flops)
    for command, measure in zip(parsers, measures, strict=True):
        command.set_defaults(measure=measure)
        command.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def rollout(options: argparse.Namespace):
    from vla.bench.rollout import measure, show

    result = measure(options.family, options.suite, options.task, options.steps, options.rounds)
    return show(result), result


def workers(options: argparse.Namespace):
    from vla.bench.workers import measure, show

    result = measure(options.workers, options.episodes, options.steps, options.rounds)
    return show(result), result


def flops(options: argparse.Namespace):
    from vla.bench.flops import measure, show

    result = measure(options.baseline, options.size, options.batch)
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
    result = measure(options.baseline, options.size, device, options.dtype, options.repeats, options.compile)
    return show(result), result


def decode(options: argparse.Namespace):
    import torch

    from vla.bench.decode import measure, show

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(options.baseline, options.size, options.batch, device, options.repeats)
    return show(result), result


def train(options: argparse.Namespace):
    import torch

    from vla.bench.train import measure, show

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision or ("bf16-mixed" if device.startswith("cuda") else "fp32")
    what = (options.baseline, options.size, options.batch, device, precision)
    result = measure(*what, options.rounds, options.steps, options.backward_only)
    return show(result), result


def startup(options: argparse.Namespace):
    from vla.bench.startup import measure, show

    result = measure(options.rounds)
    return show(result), result


if __name__ == "__main__":
    main()
