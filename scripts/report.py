"""One self-contained HTML page about a folder of results: the answer, tables, figures, and where it all comes from.

    python scripts/report.py results
    python scripts/report.py results/demo runs=runs/demo out=demo.html

No other file is needed to read or send it. What is on it is told in vla/report/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.errors import UserError

EPILOG = """On the page: every comparison as a sentence with its interval, n and training seeds; what is measured and
what is missing; the tables of scripts/tables.py; learning curves, probe curves, alignment, successes per task, film
strips (evaluation.videos=N keeps films), t-SNE and VQA accuracies; configurations, versions, hashes, time, and the
commands that repeat it. Open it in any browser: it loads nothing, needs no JavaScript, follows dark mode, and prints.

Examples: python scripts/report.py results
          python scripts/report.py results/demo runs=runs/demo out=demo.html"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/report.py",
        description="Write one HTML page about everything evaluate.py and train.py left below two folders.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of evaluate.py's runs")
    parser.add_argument("--runs", type=Path, help="folder of train.py's runs, for curves and configs (runs; runs=DIR)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html; also out=FILE)")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([f"--{word}" if word.startswith(("runs=", "out=")) else word for word in words])
    try:
        run(options.results, options.runs, options.out)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def run(results: Path, runs: Path | None, out: Path) -> None:
    if not results.is_dir():
        raise UserError(f"{results} is not a folder: give the folder that evaluate.py writes its results to")
    if runs is not None and not runs.is_dir():
        raise UserError(f"runs={runs} is not a folder: give the folder that train.py writes its runs to")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"{out} cannot be written: give a file in a folder that exists")
    started = time.monotonic()
    from vla.report.page import write_page

    write_page(results, runs or Path("runs"), out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
