"""Tables from a folder of results: arms compared among themselves, or a paper's table with ours beside it.

    python scripts/tables.py results
    python scripts/tables.py results --csv table.csv --latex table.tex --alignment alignment.png
    python scripts/tables.py table=idl_table1                     # results/ beside the paper's numbers
    python scripts/tables.py results table=idl_table6 benchmark=libero_goal --sequential --markdown table.md

Every number comes from the records below the folder; what the columns mean is told in vla/analysis/tables.py and
vla/analysis/paper_tables.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/tables.py",
        description="Compare arms: one table per benchmark from the episode records and analyses below a folder, each "
        "number with its n and 95 % interval, each pair of arms tested on the episodes they share (exact McNemar). "
        "With table=NAME: that table of the papers, our numbers beside the printed ones.",
        epilog="Examples: python scripts/tables.py results --csv table.csv --latex table.tex; "
        "python scripts/tables.py table=idl_table1",
    )
    parser.add_argument("results", type=Path, nargs="?", help="folder of evaluate.py's runs, at any depth (results)")
    parser.add_argument("--table", help="a paper's table: idl_table1 … genvla_fig5 (also as table=NAME)")
    parser.add_argument("--benchmark", help="of a table: show its arms on another benchmark too, as a rehearsal")
    parser.add_argument("--sequential", action="store_true", help="of a table: could a comparison have stopped early?")
    parser.add_argument("--csv", type=Path, help="write the numbers here, the comparisons to <name>_comparisons.csv")
    parser.add_argument("--latex", type=Path, help="write the tables here (needs \\usepackage{booktabs})")
    parser.add_argument("--markdown", type=Path, help="of a table: write it here")
    parser.add_argument("--alignment", type=Path, help="draw the arms' state-feature alignment here (PNG)")
    parser.add_argument("--probes", type=Path, help="draw the frozen-encoder probes' training curves here (PNG)")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([f"--{w}" if w.startswith(("table=", "benchmark=")) else w for w in words])
    try:
        check_options(options)
        if options.table:
            run_paper(options)
        else:
            folder = options.results or Path("results")
            run(folder, options.csv, options.latex, options.alignment, options.probes)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def check_options(options: argparse.Namespace) -> None:
    only_table, never_table = ("benchmark", "sequential", "markdown"), ("alignment", "probes")
    for name in never_table if options.table else only_table:
        if getattr(options, name):
            remedy = "leave it out" if options.table else "add table=NAME"
            raise UserError(f"--{name} does not go {'with' if options.table else 'without'} table=NAME: {remedy}")
    for name in ("csv", "latex", "markdown", "alignment", "probes"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: create the folder {path.parent} first")


def run_paper(options: argparse.Namespace) -> None:
    """A table of a paper; where no folder was given and there is no results/, nothing has been run."""
    from vla.analysis import paper_print
    from vla.analysis.paper_results import load_runs
    from vla.analysis.paper_tables import compare_with_paper
    from vla.analysis.papers import load_paper
    from vla.files import write_atomic

    paper, folder = load_paper(options.table), options.results or Path("results")
    runs = [] if options.results is None and not folder.exists() else load_runs(folder)
    sheet = compare_with_paper(paper, runs, options.benchmark, options.sequential)
    out = console()
    for table in paper_print.text_tables(sheet, options.sequential):
        print_table(out, table.text, table.title, table.caption)
    for note in paper_print.notes(sheet):
        out.print(f"Note: {note}", soft_wrap=True)
    if options.csv is not None:
        write_atomic(options.csv, paper_print.numbers(sheet).to_csv(index=False))
    if options.markdown is not None:
        write_atomic(options.markdown, paper_print.markdown(sheet, options.sequential))
    if options.latex is not None:
        write_atomic(options.latex, paper_print.latex(sheet, options.sequential))


def console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140  # a log file does not wrap at 80
    return Console(width=width, markup=False, highlight=False)


def print_table(console: Console, text: pd.DataFrame, title: str | None, caption: str) -> None:
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in text.columns:
        table.add_column(column)
    for row in text.itertuples(index=False):
        table.add_row(*row)
    console.print(table)


def run(
    folder: Path, csv: Path | None, latex: Path | None, alignment: Path | None = None, probes: Path | None = None
) -> None:
    from vla.analysis import tables
    from vla.analysis.chains import chains_table
    from vla.analysis.probe_tables import load_losses
    from vla.analysis.seed_tables import compare_over_seeds
    from vla.analysis.simpler_tables import protocol_scores
    from vla.analysis.simpler_tables import show as show_scores
    from vla.analysis.vqa_tables import show_representations

    episodes, analyses = tables.load(folder)
    results, comparisons = tables.results_table(episodes, analyses), tables.comparison_table(episodes)
    out, over_seeds = console(), compare_over_seeds(episodes, analyses)
    show(out, results, comparisons, over_seeds)
    show_chains(out, *chains_table(episodes), results)
    show_scores(out, protocol_scores(episodes), tables.titles(results))
    show_losses(out, load_losses(folder))
    show_representations(out, folder)
    for note in tables.notes(episodes, results):
        out.print(f"Note: {note}")
    if csv is not None:
        write_csv(csv, results, comparisons)
    if latex is not None:
        write_latex(latex, results, comparisons)
    if alignment is not None:
        from vla.analysis.plots import plot_alignment

        plot_alignment(analyses, alignment)
    if probes is not None:
        from vla.analysis.probe_plots import plot_probes

        plot_probes(folder, probes)


def show(console: Console, results: pd.DataFrame, comparisons: pd.DataFrame, over_seeds: pd.DataFrame) -> None:
    """Print one table per benchmark and set of conditions, its paired comparisons below it."""
    from vla.analysis import tables
    from vla.analysis.seed_tables import told

    text, compared = tables.printable(results), tables.printable_comparisons(comparisons, results)
    for title in dict.fromkeys(text.benchmark):
        mine = text.benchmark == title
        conditions = json.loads(results.conditions[mine].iloc[0])
        caption = "value [95 % interval] (successes/episodes; held-out demonstrations; frame pairs)"
        caption += "\n" + ", ".join(f"{name}={value}" for name, value in conditions.items())
        shown = [c for c in text.columns[1:] if c in ("arm", "success rate") or (text[c][mine] != tables.NONE).any()]
        print_table(console, text.loc[mine, shown], title, caption)
        benchmark, conditions = results.benchmark[mine].iloc[0], results.conditions[mine].iloc[0]
        last = title == text.benchmark[results.benchmark == benchmark].iloc[-1]
        wanted = over_seeds.conditions.isin({conditions, ""} if last else {conditions})  # "": of no conditions
        methods = over_seeds[(over_seeds.benchmark == benchmark) & wanted]
        if len(methods):
            console.print("Of the arms, each training seed one observation:", style="bold")
        for row in methods.itertuples():
            console.print(f"{row.arm_a} vs {row.arm_b}, {row.measure}: {told(row)}: {row.verdict}", soft_wrap=True)
        pairs = compared[compared.benchmark == title]
        if len(pairs):
            if len(methods):
                console.print("Of these trained policies, their episodes taken together:", style="bold")
            shown = [c for c in pairs.columns[1:-1] if c != "Holm" or (pairs[c] != tables.NONE).any()]
            print_table(console, pairs[shown], None, "paired on shared (task, seed), difference = first - second")
            for row in pairs.itertuples():
                console.print(f"{row.arms}: {row.verdict}")
            console.print(tables.PAIR_NOTE, style="dim")
        console.print()


def show_chains(console: Console, found: pd.DataFrame, comparisons: pd.DataFrame, results: pd.DataFrame) -> None:
    """CALVIN's own numbers: SR 1-5 in percent and Avg. Len. with its interval, arms paired on the chains they share."""
    from rich.table import Table

    from vla.analysis import tables
    from vla.analysis.statistics import format_interval

    for key, rows in found.groupby(tables.GROUP):
        title = f"{tables.titles(results)[key]}, the first chains of the 1,000"
        caption = "SR k: share of chains with k subtasks done in a row, %; Avg. Len. with its 95 % interval over chains"
        table = Table(title=title, caption=caption, title_justify="left")
        for column in ("arm", "training seed", "chains", *(f"SR {k}" for k in range(1, 6)), "Avg. Len."):
            table.add_column(column)
        for row in rows.itertuples():
            shares = [f"{100 * getattr(row, f'sr{k}'):.1f}" for k in range(1, 6)]
            interval = f"{row.avg_len:.2f} {format_interval(row.low, row.high)}"
            table.add_row(row.arm, row.train_seed, str(row.n), *shares, interval)
        console.print(table)
        mine = (comparisons.benchmark == key[0]) & (comparisons.conditions == key[1])
        for row in comparisons[mine].itertuples():
            difference = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
            console.print(f"{row.arm_a} vs {row.arm_b}: Avg. Len. {difference}: {row.verdict}", soft_wrap=True)
        console.print()


def show_losses(console: Console, losses: pd.DataFrame) -> None:
    """IDL table 4: losses of the frozen-encoder probes, lower is better, and what the training seeds allow to say."""
    from rich.table import Table

    from vla.analysis.probe_tables import compare_losses, loss_table, verdict

    def cell(row, measure: str) -> str:
        low, high = getattr(row, f"{measure}_low"), getattr(row, f"{measure}_high")
        return f"{getattr(row, measure):.4f}" + ("" if low != low else f" [{low:.4f}, {high:.4f}]")

    if losses.baseline.nunique() > 1:
        losses = losses.assign(arm=losses.baseline + " " + losses.arm)
    compared = compare_losses(losses)
    for (benchmark, probe), rows in loss_table(losses).groupby(["benchmark", "probe"]) if len(losses) else ():
        caption = "mean loss, lower is better [95 % interval over tasks]"
        table = Table(title=f"{benchmark}, {probe} from frozen tokens", caption=caption, title_justify="left")
        for column in ("arm", "training seed", "tap", "tasks", "train", "validation"):
            table.add_column(column)
        for row in rows.itertuples():
            cells = cell(row, "train"), cell(row, "validation")
            table.add_row(row.arm, row.train_seed, row.tap, str(row.n), *cells)
        console.print(table)
        mine = compared[(compared.benchmark == benchmark) & (compared.probe == probe)] if len(compared) else compared
        for row in mine.itertuples():
            interval = "" if row.low != row.low else f" [{row.low:+.4f}, {row.high:+.4f}]"
            each = ", ".join(f"{difference:+.4f}" for difference in row.differences)
            told = f"{row.difference:+.4f}{interval} (seeds: {each}): {verdict(row)}"
            console.print(f"{row.arm_a} vs {row.arm_b}, {row.measure}: {told}")
        console.print()


def write_csv(path: Path, results: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    from vla.files import write_atomic

    write_atomic(path, results.to_csv(index=False))
    write_atomic(path.with_name(f"{path.stem}_comparisons{path.suffix}"), comparisons.to_csv(index=False))


def write_latex(path: Path, results: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    """Two booktabs tabulars, text escaped; dashes and < spelt so that any engine and font encoding sets them."""
    from vla.analysis import tables
    from vla.files import write_atomic

    texts = tables.printable(results), tables.printable_comparisons(comparisons, results).drop(columns="verdict")
    source = "\n".join(text.to_latex(index=False, escape=True) for text in texts if len(text))
    write_atomic(path, source.replace(tables.NONE, "--").replace("<", "$<$").replace(">", "$>$"))


if __name__ == "__main__":
    main()
