"""SimplerEnv's own numbers from the records: every task and score of the protocol, weighted as it says.

The plain rate of a run counts all its episodes alike; SimplerEnv averages over the episodes of a variant, then over the
variants of a task, then over a score's tasks (envs/simpler/protocol.py, facts simpler §4d). Here that is computed for
each arm and training seed, with the episodes that are missing counted: a value with one missing behind it is none.

    scores = protocol_scores(episodes)      # the frame of vla.analysis.tables.load
    show(console, scores, titles)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from envs.simpler.protocol import aggregate

if TYPE_CHECKING:
    from rich.console import Console

GROUP = ["benchmark", "conditions"]


def protocol_scores(episodes: pd.DataFrame) -> pd.DataFrame:
    """One row per (benchmark, conditions, arm, training seed) and task or score, of the SimplerEnv runs in `episodes`.

    Returns:
        numbers: value (nan where an episode is missing), n (episodes there) and missing. Empty without such a run.

    Raises:
        UserError: a record that is no episode of what its run asked for.
    """
    headers = {folder: json.loads((Path(folder) / "run.json").read_text()) for folder in episodes.folder.unique()}
    mine = episodes[[headers[folder].get("protocol") is not None for folder in episodes.folder]]
    table = []
    for key, rows in mine.groupby([*GROUP, "arm", "train_seed"]) if len(mine) else ():
        runs = [headers[folder] for folder in rows.folder.unique()]
        asked = [run["groups"] for run in runs]
        groups = None if None in asked else [name for names in asked for name in names]
        for name, score in aggregate(runs[0]["protocol"], rows.to_dict("records"), groups).items():
            value = float("nan") if score.value is None else score.value
            identity = dict(zip([*GROUP, "arm", "train_seed"], key, strict=True))
            table.append(identity | {"score": name, "value": value, "n": score.n, "missing": score.missing})
    columns = [*GROUP, "arm", "train_seed", "score", "value", "n", "missing"]
    return pd.DataFrame(table, columns=columns)


def show(console: Console, scores: pd.DataFrame, titles: dict[tuple[str, str], str]) -> None:
    """Print a table per benchmark and conditions: a row per task and score, a column per arm and training seed.

    Args:
        titles: headings per (benchmark, conditions), vla.analysis.tables.titles.
    """
    from rich.table import Table

    for group, rows in scores.groupby(GROUP) if len(scores) else ():
        caption = "mean over the variants of a task, then over tasks (episodes); – where episodes are missing"
        table = Table(title=f"{titles[group]}, SimplerEnv's own scores", caption=caption, title_justify="left")
        arms = rows[["arm", "train_seed"]].drop_duplicates().itertuples(index=False)
        columns = {(arm, seed): rows[(rows.arm == arm) & (rows.train_seed == seed)] for arm, seed in arms}
        table.add_column("score")
        for arm, seed in columns:
            table.add_column(arm if seed == "–" else f"{arm}, training seed {seed}")
        for name in rows.score.unique():
            table.add_row(name, *(_cell(column[column.score == name]) for column in columns.values()))
        console.print(table)
        console.print()


def _cell(found: pd.DataFrame) -> str:
    """ "0.31 (300)", "– (299, 1 missing)", or "" for what an arm was not asked."""
    if not len(found):
        return ""
    row = found.iloc[0]
    return f"– ({row.n}, {row.missing} missing)" if row.missing else f"{row.value:.3f} ({row.n})"
