"""A compared table (vla/analysis/paper_tables.py) as text for people and as numbers for a CSV.

for table in text_tables(sheet): print(table.title, table.text, table.caption)
for note in notes(sheet): print(note)
numbers(sheet).to_csv("table.csv", index=False)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vla.analysis.paper_power import Gain, gains
from vla.analysis.paper_tables import Cell, Compared, Estimated, Sheet
from vla.analysis.papers import Column, Paper, Row, text
from vla.analysis.statistics import format_p
from vla.analysis.tables import NONE, UNKNOWN
from vla.experiment import read

CONF = Path(__file__).resolve().parents[2] / "conf"
TRAINED_ON = {"real_robot": "simpler_widowx"} | dict.fromkeys(
    ("vqa", "cifar10", "simpler_google_masked", "simpler_google_va", "simpler_google_paraphrase"), "simpler_google_vm"
)
LATEX = {"–": "--", "π₀": "$\\pi_0$", "⁺": "$^+$", "→": "$\\to$", "<": "$<$", ">": "$>$", "≥": "$\\geq$", "§": "\\S "}


@dataclass(frozen=True)
class TextTable:
    title: str
    text: pd.DataFrame
    caption: str


def text_tables(sheet: Sheet, sequential: bool = False) -> list[TextTable]:
    """The paper's setting beside the paper, each rehearsal by itself, the paper's own gains, others' rows."""
    paper = sheet.paper
    tables = [_compared_table(sheet, setting, sequential) for setting in sheet.settings]
    if found := gains(paper):
        caption = "unpaired, two-sided, from the printed numbers; episodes: of each arm, 80 % power at 5 %, unpaired; "
        caption += "in brackets pairs, with the spread of our shared episodes"
        shown = pd.DataFrame([_gain(sheet, gain) for gain in found])
        tables.append(TextTable(f"{paper.title}: what the paper's own numbers show", shown, caption))
    others = [row for row in paper.rows if row.arm is None]
    if others:
        marks = _marks(sheet)
        columns = ["method", *(column.name for column in paper.columns)]
        shown = [[row.name, *(_printed(paper, row, column, marks) for column in paper.columns)] for row in others]
        title = f"{paper.title}: others, as printed"
        tables.append(TextTable(title, pd.DataFrame(shown, columns=columns), paper.source))
    return tables


def notes(sheet: Sheet) -> list[str]:
    """Printed numbers that cannot be right, what is missing and how to run it, and what else must be known."""
    found = []
    for mark, finding in zip(_letters(sheet), sheet.findings, strict=True):
        cell = f"{finding.row}, {finding.column}: {finding.printed} " if finding.row else ""
        found.append(f"({mark}) {cell}{finding.told}.")
    lacking: dict[str, tuple[Row, list[Column]]] = {}
    for row, column in sheet.missing():
        lacking.setdefault(row.name, (row, []))[1].append(column)
    by_command: dict[str, list[str]] = {}
    for name, (row, columns) in lacking.items():
        part = "" if len(columns) == len(sheet.paper.columns) else f" ({', '.join(c.name for c in columns)})"
        by_command.setdefault("; ".join(commands(sheet.paper, row, columns)), []).append(name + part)
    found += [f"Not run: {'; '.join(names)}: {command}" for command, names in by_command.items()]
    found += _trained(sheet)
    if any(cell.compared and cell.compared.seeds == 1 for cell in sheet.cells):
        found.append("With one training seed a verdict is about these two networks; another seed may turn it round.")
    if any(cell.compared and cell.compared.told for cell in sheet.cells):
        found.append("A sequential verdict holds however often one looks, each at 5 % by itself; p supposes one look.")
    return found + sheet.paper.notes


def _trained(sheet: Sheet) -> list[str]:
    steps: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in sheet.cells:
        if cell.ours and cell.ours.steps:
            told = " or ".join(f"{count:,}" for count in sorted(cell.ours.steps))
            steps.setdefault(cell.setting, {})[cell.row.name] = told
    return [
        f"Training steps{', ' + ', '.join(setting) if setting else ''}: "
        + "; ".join(f"{name} {count}" for name, count in rows.items())
        for setting, rows in steps.items()
    ]


def commands(paper: Paper, row: Row, columns: list[Column]) -> list[str]:
    """What runs the missing cells."""
    found = []
    for column in columns:
        experiment = column.experiment or paper.experiment or paper.name
        benchmark, evaluation = column.benchmark or paper.benchmark, column.evaluation or paper.evaluation
        of = f"baseline={row.baseline} ablation={row.arm}"
        run = f"{of} benchmark={TRAINED_ON.get(benchmark, benchmark)} size=full trainer=gpu"
        if evaluation == "real_robot":
            command = f'python scripts/trial.py "run:{run}" TASK success|failure'
        elif sweep := sweep_of(experiment, row) or sweep_of(row.same_as, row):
            both = [f"python {program}.py -m {sweep}" for program in ("train", "evaluate")]
            command = " && ".join(both) + (f" evaluation.tap={paper.tap}" if paper.tap else "")
        else:
            command = f'python train.py {run} && python evaluate.py policy="run:{run}" evaluation={evaluation}'
            command += "" if benchmark in ("vqa", "cifar10") else f" benchmark={benchmark}"
        found.append(command)
    return list(dict.fromkeys(found))


def sweep_of(experiment: str | None, row: Row) -> str | None:
    """The words after -m that run `row`'s policy; None where the experiment has none of that arm."""
    if experiment is None or not (CONF / "experiment" / f"{experiment}.yaml").exists():
        return None
    for block in read(experiment, CONF)["train"]:
        if block.get("arm") == row.arm:
            return f"experiment={experiment} arm={row.arm}"
        if "arm" not in block and row.arm in np.atleast_1d(block["ablation"]):
            return f"experiment={experiment} baseline={row.baseline} ablation={row.arm}"
    return None


def _compared_table(sheet: Sheet, setting: tuple[str, ...], sequential: bool) -> TextTable:
    paper, marks = sheet.paper, _marks(sheet)
    rows = []
    for cell in sheet.cells:
        if cell.setting != setting:
            continue
        line = {"method": cell.row.name, "column": f"{cell.column.name}, {cell.column.unit}"}
        if not setting:
            line["paper"] = _printed(paper, cell.row, cell.column, marks)
        line["ours [95 %] (n, training seeds)"] = ours(cell)
        line["difference [95 %] (pairs)"] = "reference" if paper.against(cell.row) is None else difference(cell)
        line["p"] = "" if cell.compared is None else p_value(cell.compared)
        line["verdict"] = "" if cell.compared is None else cell.compared.verdict
        if sequential:
            line["sequential, these networks"] = cell.compared.told or NONE if cell.compared else ""
        rows.append(line)
    references = sorted({row.name for row in map(paper.against, paper.rows) if row})
    caption = f"{paper.source}; difference to {' or '.join(references)}, on shared episodes and training seeds"
    caption += "; p Holm-adjusted over a column's rows"
    title = f"{paper.title}: {'beside the paper' if not setting else rehearsal(setting)}"
    return TextTable(title, pd.DataFrame(rows), caption)


def rehearsal(setting: tuple[str, ...]) -> str:
    return f"REHEARSAL ({', '.join(setting)}), not comparable with the paper"


def ours(cell: Cell) -> str:
    """ "94.1 [92.5, 95.4] (n = 1,000, 1 seed)", or "–, not run"."""
    found = cell.ours
    if found is None:
        return f"{NONE}, not run"
    count = f"n = {found.n:,}, {found.seeds} seed{'s' if found.seeds > 1 else ''}{_missing(found)}"
    value = NONE if np.isnan(found.value) else _number(cell.column, found.value)
    return f"{value}{_interval(cell.column, found.low, found.high)} ({count})"


def difference(cell: Cell) -> str:
    found = cell.compared
    if found is None:
        return ""
    column = replace(cell.column, decimals=cell.column.decimals + (cell.column.unit == "loss"))
    interval = _interval(column, found.low, found.high, sign=True)
    return f"{_number(column, found.difference, sign=True)}{interval} ({found.n:,})"


def p_value(found: Compared) -> str:
    """The adjusted p-value and its test; over seeds also that of these networks alone."""
    if np.isnan(found.p_holm):
        return NONE
    told = f"{format_p(found.p_holm)} ({found.test})"
    if found.seeds > 1 and not np.isnan(found.p_networks):
        told += f"; these networks {format_p(found.p_networks)}"
    return told


def _gain(sheet: Sheet, gain: Gain) -> dict[str, str]:
    def signed(value: float) -> str:
        return f"{value:+.{gain.column.decimals}f}"

    interval = "" if gain.p is None else f" [{signed(gain.low)}, {signed(gain.high)}]"
    mine = [cell for cell in sheet.cells if (cell.setting, cell.row, cell.column) == ((), gain.row, gain.column)]
    pairs = mine[0].pairs_needed if mine else None
    needed = NONE if gain.needed is None else f"{gain.needed:,}"
    return {
        "method": gain.row.name,
        "against": gain.reference.name,
        "column": f"{gain.column.name}, {gain.column.unit}",
        "paper's difference [95 %]": signed(gain.difference) + interval,
        "p": NONE if gain.p is None else format_p(gain.p),
        "episodes to see it": needed + (f" ({pairs:,})" if pairs else ""),
    }


def _printed(paper: Paper, row: Row, column: Column, marks: dict[tuple[str, str], str]) -> str:
    value = paper.printed(row, column)
    return NONE if value is None else text(value, column.decimals) + marks.get((row.name, column.name), "")


def _letters(sheet: Sheet) -> list[str]:
    return [chr(ord("a") + index) for index in range(len(sheet.findings))]


def _marks(sheet: Sheet) -> dict[tuple[str, str], str]:
    marks: dict[tuple[str, str], str] = {}
    for letter, finding in zip(_letters(sheet), sheet.findings, strict=True):
        if finding.row:
            marks[finding.row, finding.column] = marks.get((finding.row, finding.column), "") + f" ({letter})"
    return marks


def _number(column: Column, value: float, sign: bool = False) -> str:
    return f"{column.scale * value:{'+' if sign else ''}.{column.decimals}f}"


def _interval(column: Column, low: float, high: float, sign: bool = False) -> str:
    return "" if np.isnan(low) else f" [{_number(column, low, sign)}, {_number(column, high, sign)}]"


def _missing(found: Estimated) -> str:
    if found.missing == UNKNOWN:
        return ", INCOMPLETE: no summary.json"
    return f", INCOMPLETE: {found.missing:,} missing" if found.missing else ""


def numbers(sheet: Sheet) -> pd.DataFrame:
    """One row per setting, method and column; values in the column's unit, empty where there is none."""
    paper, of = sheet.paper, {(gain.row.name, gain.column.name): gain for gain in gains(sheet.paper)}
    why = {(finding.row, finding.column): finding.told for finding in sheet.findings}
    rows = []
    for cell in sheet.cells:
        row, column = cell.row, cell.column
        line: dict[str, Any] = {"setting": ", ".join(cell.setting) or "paper's", "method": row.name}
        line |= {"baseline": row.baseline, "arm": row.arm, "column": column.name, "unit": column.unit}
        if not cell.setting:
            gain = of.get((row.name, column.name))
            line |= {"paper": paper.printed(row, column), "paper_flaw": why.get((row.name, column.name))}
            if gain is not None:
                line |= {"paper_difference": gain.difference, "paper_low": gain.low, "paper_high": gain.high}
                line |= {"paper_p": gain.p, "episodes_needed": gain.needed, "pairs_needed": cell.pairs_needed}
        if (found := cell.ours) is not None:
            line |= {key: column.scale * getattr(found, key) for key in ("value", "low", "high")}
            line |= {"n": found.n, "seeds": found.seeds, "missing": found.missing}
        if (pair := cell.compared) is not None:
            line |= {"difference": column.scale * pair.difference}
            line |= {"difference_low": column.scale * pair.low, "difference_high": column.scale * pair.high}
            line |= {"pairs": pair.n, "shared_seeds": pair.seeds, "test": pair.test, "p": pair.p}
            line |= {"p_holm": pair.p_holm, "p_networks": pair.p_networks, "verdict": pair.verdict}
            line |= {"sequential": pair.told}
        rows.append(line)
    return pd.DataFrame(rows)


def markdown(sheet: Sheet, sequential: bool = False) -> str:
    parts = []
    for table in text_tables(sheet, sequential):
        lines = [list(table.text.columns), ["---"] * len(table.text.columns), *table.text.values.tolist()]
        body = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{body}\n\n{table.caption}\n")
    return "\n".join([*parts, "\n".join(f"- {note}" for note in notes(sheet)), ""])


def latex(sheet: Sheet, sequential: bool = False) -> str:
    """Booktabs tabulars with the notes below; only ASCII, so that any engine and font encoding sets them."""
    parts = []
    for table in text_tables(sheet, sequential):
        heading = pd.DataFrame({"": [table.title, table.caption, *notes(sheet)]}).map(str)
        heading = heading.to_latex(index=False, header=False, escape=True).splitlines()
        title, caption, *rest = [line.removesuffix(" \\\\") for line in heading if line.endswith("\\\\")]
        parts.append(f"% {title}\n\\paragraph{{{title}}}\n{table.text.to_latex(index=False, escape=True)}\n{caption}\n")
    source = "\n".join([*parts, "\n\n".join(rest)])
    for character, command in LATEX.items():
        source = source.replace(character, command)
    return source
