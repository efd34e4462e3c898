"""GenVLA's representation tests as tables (Fig. 4 and 5): VQA accuracy per benchmark, CIFAR-10 linear probes.

Reads what evaluate.py evaluation=vqa and evaluation=cifar10 leave, at any depth below a folder of results. Arms are
compared within a training seed, on the questions or images that both have: VQA by flipping signs of whole pictures
(its interval by a bootstrap over them), CIFAR-10 by McNemar's exact test. Both speak of these two networks; of a method
speaks a t test over training seeds, one difference each. p-values are Holm's over the pairs of arms of one baseline on
one benchmark.

    show_representations(console, Path("results"))
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vla.analysis.resampling import sign_flip_p
from vla.analysis.seed_tables import COLUMNS, judged
from vla.analysis.statistics import ALPHA, format_p, holm, mean_interval, paired_test, verdict
from vla.analysis.tables import NONE
from vla.analysis.vqa_records import read_answers, weights_of
from vla.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

KEYS, PAIR = ["baseline", "arm", "train_seed", "what"], ["arm_a", "arm_b"]
ORDER = ("textvqa", "pope", "gqa", "vizwiz", "vsr")
"""As in GenVLA's Fig. 5."""
FEW = 20
"""Below as many pictures a bootstrap over them says nothing."""


def load_probes(root: Path) -> pd.DataFrame:
    """One row per result: baseline, arm, train_seed (text), what (a VQA benchmark, or "cifar10, <tap>"), value, low,
    high, n, missing, extra (POPE's mean F1, VSR's share of unread answers, else ""), folder.

    Raises:
        UserError: a file cannot be read or lacks a key; two results of the same run and benchmark.
    """
    rows = []
    for name in ("vqa_probe.json", "cifar10_probe.json"):
        for path in sorted(root.rglob(name)):
            try:
                content = json.loads(path.read_text())
                what = content["set"] if name.startswith("vqa") else f"cifar10, {content['tap']}"
                row = {"baseline": content["baseline"], "arm": content["arm"], "train_seed": str(content["train_seed"])}
                accuracy = {key: content["accuracy"][key] for key in ("value", "low", "high", "n")}
                extra = f"F1 {content['pope']['mean']['f1']:.3f}" if "pope" in content else ""
                if content.get("unread"):
                    extra = f"{100 * content['unread']:.0f} % unread"
                row |= accuracy | {"what": what, "missing": content.get("missing", 0), "extra": extra}
                rows.append(row | {"folder": path.parent})
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path} cannot be read or lacks {error}; run that evaluation again") from None
    probes = pd.DataFrame(rows, columns=[*KEYS, "value", "low", "high", "n", "missing", "extra", "folder"])
    if (twice := probes.duplicated(KEYS, keep=False)).any():
        first, second = probes[twice].sort_values(KEYS).folder.iloc[:2]
        raise UserError(f"the same evaluation of the same run lies in {first} and in {second}: move one away")
    return probes


def compare_probes(probes: pd.DataFrame) -> pd.DataFrame:
    """Each pair of arms of a baseline with the same training seed, on what both were measured on.

    Returns:
        baseline, train_seed, what, arm_a, arm_b, n (shared questions or images), difference (a − b), low, high (95 %),
        p, p_holm (nan for one pair), told (a sentence).
    """
    table = []
    for key, group in probes.groupby(["baseline", "train_seed", "what"], dropna=False, sort=False):
        compare = _compare_cifar10 if key[-1].startswith("cifar10") else _compare_answers
        arms = group.sort_values("arm").itertuples()
        pairs = [(a.arm, b.arm, found) for a, b in combinations(arms, 2) if (found := compare(key[-1], a, b))]
        several = len(pairs) > 1
        for (a, b, found), p in zip(pairs, holm([found["p"] for *_, found in pairs]), strict=True):
            told = found.pop("tell")(a, b, p, ", Holm" if several else "")
            found |= {"p_holm": p if several else np.nan, "told": told}
            table.append(dict(zip(KEYS[:1] + KEYS[2:], key, strict=True)) | {"arm_a": a, "arm_b": b} | found)
    columns = ["baseline", "train_seed", "what", *PAIR, "n", "difference", "low", "high", "p", "p_holm", "told"]
    return pd.DataFrame(table, columns=columns)


def compare_over_seeds(compared: pd.DataFrame) -> pd.DataFrame:
    """Each pair of arms of `compare_probes` with two training seeds or more; the unit is a training seed.

    Returns:
        baseline, what, arm_a, arm_b, seeds (how many), differences (a − b per seed), difference (their mean), low, high
        (95 %, Student's t), p (paired t test), p_holm (nan for one pair), verdict.
    """
    table, trained = [], compared[compared.train_seed != NONE]
    for key, group in trained.groupby(["baseline", "what"], dropna=False, sort=False):
        pairs = [(*arms, rows.difference.tolist()) for arms, rows in group.groupby(PAIR)]
        table += [[*key, *row] for row in judged(pairs, most=1.0)]
    return pd.DataFrame(table, columns=["baseline", "what", *COLUMNS])


def _compare_answers(what: str, a, b) -> dict[str, Any]:
    """Mean difference of the scores, its interval by a bootstrap over pictures; {} where fewer than two are shared.

    "tell" makes the sentence: (a's name, b's, adjusted p, how) → text.
    """
    first, second = ({row["id"]: row for row in read_answers(arm.folder)} for arm in (a, b))
    shared = [(row, second[key]) for key, row in first.items() if key in second]
    weights = np.array(weights_of(what, [row["group"] for row, _ in shared]))
    differences = np.array([row["score"] - other["score"] for row, other in shared])
    names, picture = np.unique([row["image"] for row, _ in shared], return_inverse=True)
    if len(names) < 2:
        return {}
    weight = np.bincount(picture, weights)
    of_picture = np.bincount(picture, weights * differences) / weight
    low, high = mean_interval(of_picture, weights=weight)
    value = float((weights * differences).sum() / weights.sum())

    def tell(a: str, b: str, p: float, how: str) -> str:
        told = f"{a if value > 0 else b} better" if p < ALPHA else "not distinguishable"
        told = "too few pictures to tell" if len(names) < FEW else told
        counts = f"{len(shared)} questions about {len(names)} pictures"
        return f"{told} ({value:+.3f} [{low:+.3f}, {high:+.3f}], {format_p(p)}{how}, {counts})"

    p = sign_flip_p(of_picture, weight)
    return {"n": len(shared), "difference": value, "low": low, "high": high, "p": p, "tell": tell}


def _compare_cifar10(what: str, a, b) -> dict[str, Any]:
    right = []
    for arm in (a, b):
        with np.load(arm.folder / "cifar10_probe.npz", allow_pickle=False) as arrays:
            right.append(dict(zip(arrays["test"].tolist(), arrays["right"].tolist(), strict=True)))
    shared = sorted(right[0].keys() & right[1].keys())
    if not shared:
        return {}
    test = paired_test(*([of[image] for image in shared] for of in right))
    low, high = test.interval

    def tell(a: str, b: str, p: float, how: str) -> str:
        told = verdict(test, a, b, p).replace("pairs", "images").replace("episodes", "images")
        return told.replace(format_p(p), f"{format_p(p)}{how}", 1)

    return {"n": test.n, "difference": test.difference, "low": low, "high": high, "p": test.p, "tell": tell}


def show_representations(console: Console, root: Path) -> None:
    """Print a table per kind of test and a line per compared pair; nothing where there is nothing."""
    from rich.table import Table

    probes = load_probes(root)
    probes["place"] = [ORDER.index(what) if what in ORDER else len(ORDER) for what in probes.what]
    probes = probes.sort_values(["place", *KEYS])
    compared = compare_probes(probes)
    methods = compare_over_seeds(compared)
    is_cifar = probes.place == len(ORDER)
    for title, mine in (("Visual question answering", probes[~is_cifar]), ("CIFAR-10 linear probe", probes[is_cifar])):
        if not len(mine):
            continue
        caption = "accuracy [95 % interval]; n: questions or test images, * not all of them asked"
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        for column in ("on", "baseline", "arm", "training seed", "accuracy", "n", ""):
            table.add_column(column)
        for row in mine.itertuples():
            accuracy = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
            n = f"{row.n}{'*' if row.missing else ''}"
            table.add_row(row.what, str(row.baseline), row.arm, row.train_seed, accuracy, n, row.extra)
        console.print(table)
        for row in methods[methods.what.isin(set(mine.what))].itertuples():
            each = ", ".join(f"{difference:+.3f}" for difference in row.differences)
            interval = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}] (seeds: {each})"
            console.print(f"{row.arm_a} vs {row.arm_b}, {row.what}: {row.verdict}: {interval}")
        for row in compared[compared.what.isin(set(mine.what))].itertuples():
            console.print(f"{row.arm_a} vs {row.arm_b}, seed {row.train_seed}, {row.what}: {row.told}")
        console.print()
