"""The page's first section: every comparison that can be made, as a sentence with interval, n and training seeds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pandas as pd

from vla.analysis import tables, vqa_tables
from vla.analysis.chains import chains_table
from vla.analysis.probe_tables import compare_losses
from vla.analysis.probe_tables import verdict as loss_verdict
from vla.analysis.seed_tables import SUCCESS, compare_over_seeds
from vla.analysis.vqa_tables import compare_probes
from vla.report.material import Material
from vla.report.sheets import Sheet

OPEN = "open"
BASELINE = "vanilla"
FEW, MOST = 3, 9
"""Pairs of arms: up to FEW are all told first; more than MOST do not fit into the overview's columns."""


@dataclass(frozen=True)
class Answer:
    """`difference` is first − second with its 95 % interval; `units` what was compared."""

    question: str
    first: str
    second: str
    sentence: str
    difference: str
    units: str
    seeds: str

    @property
    def arms(self) -> str:
        return f"{self.first} vs {self.second}"

    @property
    def decided(self) -> str:
        """ "ptr better", "ptr lower", or "" where the sentence names no winner."""
        for arm in sorted((self.first, self.second), key=len, reverse=True):
            for word in ("better", "lower", "higher"):
                if self.sentence.startswith((f"{arm} {word} (", f"{arm} is {word} (")):
                    return f"{arm} {word}"
        return ""


def answers(material: Material, results: pd.DataFrame, comparisons: pd.DataFrame) -> list[Answer]:
    """What training seeds say first, then success, chains, probes, accuracies; in the words of scripts/tables.py."""
    found = _over_seeds(material, results) + _successes(material.episodes, results, comparisons)
    return found + _chains(material.episodes, results) + _losses(material.losses) + _accuracies(material.accuracies)


def _successes(episodes: pd.DataFrame, results: pd.DataFrame, comparisons: pd.DataFrame) -> list[Answer]:
    text, found = tables.printable_comparisons(comparisons, results), []
    for row, words in zip(comparisons.itertuples(), text.itertuples(), strict=True):
        mine = episodes[(episodes.benchmark == row.benchmark) & (episodes.conditions == row.conditions)]
        seeds = [set(mine[mine.arm == arm].train_seed) - {tables.NONE} for arm in (row.arm_a, row.arm_b)]
        what = "Success of frozen-encoder probes" if "probe" in evaluation_of(row.conditions) else "Success"
        what += " (all five subtasks)" if mine.subtasks.map(bool).all() else ""
        shared = str(len(seeds[0] & seeds[1]) or tables.NONE)
        units = f"{row.n} pairs of episodes"
        pair = f"{what}: {words.benchmark}", row.arm_a, row.arm_b
        found.append(Answer(*pair, row.verdict, words.difference, units, shared))
    return found


def _over_seeds(material: Material, results: pd.DataFrame) -> list[Answer]:
    heading, found = tables.titles(results), []
    for row in compare_over_seeds(material.episodes, material.analyses).itertuples():
        where = heading.get((row.benchmark, row.conditions), row.benchmark)
        what = "Success" if row.measure == SUCCESS else row.measure[0].upper() + row.measure[1:]
        told = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        units = "of each seed: " + ", ".join(f"{difference:+.2f}" for difference in row.differences)
        question = f"{what} over training seeds: {where}"
        found.append(Answer(question, row.arm_a, row.arm_b, row.verdict, told, units, str(row.seeds)))
    return found


def evaluation_of(conditions: str) -> str:
    """Which evaluation left the episodes of these conditions (vla.analysis.tables): "rollout", "bc_probe" …"""
    return json.loads(conditions).get("evaluation", "rollout")


def _chains(episodes: pd.DataFrame, results: pd.DataFrame) -> list[Answer]:
    _, comparisons = chains_table(episodes)
    heading, found = tables.titles(results), []
    for row in comparisons.itertuples():
        mine = episodes[(episodes.benchmark == row.benchmark) & (episodes.conditions == row.conditions)]
        seeds = [set(mine[mine.arm == arm].train_seed) - {tables.NONE} for arm in (row.arm_a, row.arm_b)]
        difference = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        pair = f"Avg. Len.: {heading[row.benchmark, row.conditions]}", row.arm_a, row.arm_b
        shared = str(len(seeds[0] & seeds[1]) or tables.NONE)
        found.append(Answer(*pair, row.verdict, difference, f"{row.n} chains", shared))
    return found


def _losses(losses: pd.DataFrame) -> list[Answer]:
    found = []
    for row in compare_losses(losses).itertuples():
        interval = "" if row.low != row.low else f" [{row.low:+.4f}, {row.high:+.4f}]"
        question = f"{row.probe.capitalize()} from frozen tokens, {row.measure} loss: {row.benchmark}"
        told = f"{row.difference:+.4f}{interval}"
        units = "of each seed: " + ", ".join(f"{difference:+.4f}" for difference in row.differences)
        found.append(Answer(question, row.arm_a, row.arm_b, loss_verdict(row), told, units, str(row.seeds)))
    return found


def _accuracies(accuracies: pd.DataFrame) -> list[Answer]:
    found, compared = [], compare_probes(accuracies)
    for row in vqa_tables.compare_over_seeds(compared).itertuples():
        question = f"{_question(row)}, over training seeds"
        told = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        units = "of each seed: " + ", ".join(f"{difference:+.3f}" for difference in row.differences)
        found.append(Answer(question, row.arm_a, row.arm_b, row.verdict, told, units, str(row.seeds)))
    for row in compared.itertuples():
        told = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        units = f"{row.n} {'images' if row.what.startswith('cifar10') else 'questions'}"
        seed = "1" if row.train_seed == tables.NONE else f"1 (seed {row.train_seed})"
        found.append(Answer(_question(row), row.arm_a, row.arm_b, row.told, told, units, seed))
    return found


def _question(row) -> str:
    return f"{'Linear probe' if row.what.startswith('cifar10') else 'VQA'}: {row.what}, {row.baseline}"


def main_pairs(answers: list[Answer]) -> list[str]:
    """The pairs a reader comes for: each arm against the vanilla one of its baseline, all where they are few."""

    def family(arm: str) -> tuple[str, bool]:
        baseline, _, name = arm.rpartition(" ")
        return baseline, name == BASELINE

    pairs = {answer.arms: (family(answer.first), family(answer.second)) for answer in answers}
    main = [pair for pair, (a, b) in pairs.items() if a[0] == b[0] and a[1] != b[1]]
    return main if main and len(pairs) > FEW else list(pairs)


def overview(answers: list[Answer], pairs: list[str]) -> Sheet | None:
    """The verdicts alone, a row per question and a column per pair of arms; None where there are too many pairs."""
    if not answers or len(pairs) > MOST:
        return None
    rows = []
    for question in dict.fromkeys(answer.question for answer in answers):
        cells = []
        for pair in pairs:
            told = Counter(a.decided or OPEN for a in answers if (a.question, a.arms) == (question, pair))
            seeds = sum(told.values())
            texts = [word if seeds == 1 else f"{word} ({count} of {seeds})" for word, count in told.items()]
            cells.append(", ".join(texts) or tables.NONE)
        rows.append([question, *cells])
    caption = "“open”: the measurements cannot tell them apart"
    if any("(" in cell for _, *cells in rows for cell in cells):
        caption += "; (1 of 2): of two training seeds compared one by one"
    return Sheet("At a glance", ["measured", *pairs], rows, caption)
