"""From a folder of results to comparison tables: one row per arm, every cell with its n and interval, arms paired.

Reads what evaluate.py leaves behind, at any depth: rollouts (run.json, episodes.jsonl, summary.json; see
envs/records.py), alignment.json and ridge_probe.json. Rates are computed from the episode records, never copied.
Runs are compared only under equal conditions: the same benchmark and the same arguments of the simulator.

    episodes, analyses = load(Path("results"))
    results, comparisons = results_table(episodes, analyses), comparison_table(episodes)

The command is scripts/tables.py.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from envs.records import load_records
from vla.analysis.statistics import format_p, holm, paired_test, rate_interval, verdict
from vla.errors import UserError

POLICY_SIDE = {"cameras", "resolution", "image_rotation"}
"""Simulator arguments that say what the policy sees, not what it has to do: arms may differ in them."""
POOLED = "pooled"
NONE = "–"
UNKNOWN = -1
"""Missing episodes of a run without summary.json."""
GROUP = ["benchmark", "conditions"]
PAIR_NOTE = "The tests compare these trained policies; differences between training seeds are not in their p-values."


def load(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All episodes and all analyses below `root`.

    Returns:
        episodes: the columns of envs.records.COLUMNS, and conditions, arm, train_seed (text), missing (episodes the
            run still lacks, -1 where unknown) and folder.
        analyses: benchmark, arm, train_seed, metric ("probe", "cosine", "scale"), value, low, high, n, folder.
    Raises:
        UserError: no such folder, nothing in it, an unreadable or incomplete file, an episode or analysis found twice.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that evaluate.py writes its results to")
    runs = [_load_run(path.parent) for path in sorted(root.rglob("episodes.jsonl"))]
    rows = [row for path in sorted(root.rglob("alignment.json")) for row in _load_analysis(path, ("cosine", "scale"))]
    rows += [row for path in sorted(root.rglob("ridge_probe.json")) for row in _load_analysis(path, ("mae_mm",))]
    if not runs and not rows and not any(root.rglob("*_probe.json")):
        raise UserError(f"{root} holds no episodes.jsonl, alignment.json or *_probe.json: run evaluate.py first")
    identity = ["benchmark", "conditions", "arm", "train_seed", "task", "seed"]
    episodes = pd.concat(runs, ignore_index=True) if runs else pd.DataFrame(columns=[*identity, "folder"])
    columns = ["benchmark", "baseline", "arm", "train_seed", "metric", "value", "low", "high", "n", "folder"]
    analyses = pd.DataFrame(rows, columns=columns)
    _name_baselines(episodes, analyses)
    _adopt_seeds(analyses, episodes)
    _refuse_repeats(episodes, identity, "episode")
    _refuse_repeats(analyses, ["benchmark", "arm", "train_seed", "metric"], "analysis")
    return episodes, analyses


def results_table(episodes: pd.DataFrame, analyses: pd.DataFrame) -> pd.DataFrame:
    """One row per (benchmark, conditions, arm, training seed), and a pooled row for an arm with several seeds.

    Returns:
        numbers: successes, n, rate, rate_low, rate_high (95 % Wilson), missing, and for each of probe (mm), cosine,
        scale the columns <metric>, <metric>_low, <metric>_high, <metric>_n; nan where not measured. A pooled row
        counts the episodes of all seeds and averages the analyses, without an interval.
    """
    conditions = {b: _of_policies(sorted(set(rows.conditions))) for b, rows in episodes.groupby("benchmark")}
    analyses = analyses.assign(conditions=[conditions.get(b, ["{}"]) for b in analyses.benchmark]).explode("conditions")
    arm = [*GROUP, "arm"]
    keys = pd.concat([episodes[[*arm, "train_seed"]], analyses[[*arm, "train_seed"]]]).drop_duplicates()
    table = []
    for key, found in keys.groupby(arm, sort=True):
        identity = dict(zip(arm, key, strict=True))
        own_episodes, own_analyses = _select(episodes, identity), _select(analyses, identity)
        seeds = sorted(found.train_seed, key=lambda seed: (len(seed), seed))
        for seed in [*seeds, POOLED] if len(seeds) > 1 else seeds:
            of_seed = {} if seed == POOLED else {"train_seed": seed}
            row = identity | {"train_seed": seed} | _success(_select(own_episodes, of_seed))
            for metric, values in _select(own_analyses, of_seed).groupby("metric"):
                single = values.iloc[0] if len(values) == 1 else {"value": values.value.mean(), "n": values.n.sum()}
                row |= {metric: single["value"], f"{metric}_n": single["n"]}
                row |= {f"{metric}_{side}": single.get(side, float("nan")) for side in ("low", "high")}
            table.append(row)
    rate = ["successes", "n", "rate", "rate_low", "rate_high", "missing"]
    measured = [f"{m}{part}" for m in ("probe", "cosine", "scale") for part in ("", "_low", "_high", "_n")]
    counts = [column for column in rate + measured if column.endswith(("successes", "n", "missing"))]
    results = pd.DataFrame(table).reindex(columns=[*arm, "train_seed", *rate, *measured])
    return results.astype(dict.fromkeys(counts, "Int64"))


def _of_policies(conditions: list[str]) -> list[str]:
    """Where a policy's analyses stand: beside its own rollouts, and beside those of cloned heads only without them."""
    return [of for of in conditions if "evaluation" not in json.loads(of)] or conditions


def comparison_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """Each pair of arms that is compared under equal conditions, on the episodes (task, seed) they share.

    Runs of the same training seed are paired; arms that share no training seed are compared by the lowest of each.

    Returns:
        benchmark, conditions, arm_a, arm_b, n (pairs), only_a, only_b (successes of one arm alone), difference
        (rate_a - rate_b), low, high (95 %, Tango), p (exact McNemar), p_holm (over the pairs of a family; nan where it
        has one), verdict.
    """
    table = []
    families = [(key, f, group) for key, group in episodes.groupby(GROUP, sort=True) for f in families_of_arms(group)]
    for key, family, group in families:
        pairs = []
        for a, b in family:
            shared, remark = _shared_episodes(_select(group, {"arm": a}), _select(group, {"arm": b}))
            result = paired_test(shared.success_a, shared.success_b) if len(shared) else None
            pairs.append((a, b, result, remark))
        tested = [result.p for _, _, result, _ in pairs if result is not None]
        adjusted = iter(holm(tested))
        for a, b, result, remark in pairs:
            row = dict(zip(GROUP, key, strict=True)) | {"arm_a": a, "arm_b": b, "n": 0}
            if result is None:
                row["verdict"] = "no shared episodes: evaluate both arms on the same tasks and seeds"
            else:
                p = next(adjusted)
                row |= {"n": result.n, "only_a": result.wins_a, "only_b": result.wins_b}
                row |= {"difference": result.difference, "low": result.interval[0], "high": result.interval[1]}
                row |= {"p": result.p, "p_holm": p if len(tested) > 1 else float("nan")}
                row["verdict"] = verdict(result, a, b, p) + remark
            table.append(row)
    numbers = ["n", "only_a", "only_b", "difference", "low", "high", "p", "p_holm", "verdict"]
    return pd.DataFrame(table, columns=[*GROUP, "arm_a", "arm_b", *numbers])


def families_of_arms(rows: pd.DataFrame) -> list[list[tuple[str, str]]]:
    """Which arms are compared: those of one baseline (and those that nobody trained, replay for one), a family; one arm
    of two baselines, families of their own. Else both baseline and idea differ.

    p-values are adjusted within a family: what is found of one baseline does not hang on what else was run.
    """
    of = dict(zip(rows.arm, rows.baseline.where(rows.baseline.notna(), None), strict=True))
    idea = {arm: arm.removeprefix(f"{baseline} ") for arm, baseline in of.items()}

    def one_differs(a: str, b: str) -> bool:
        return None in (of[a], of[b]) or of[a] == of[b] or idea[a] == idea[b]

    families: dict[tuple, list[tuple[str, str]]] = {}
    for a, b in filter(lambda pair: one_differs(*pair), combinations(sorted(of), 2)):
        families.setdefault(tuple(sorted({of[a], of[b]} - {None})), []).append((a, b))
    return list(families.values())


def notes(episodes: pd.DataFrame, results: pd.DataFrame) -> list[str]:
    """What a reader must know before trusting the tables, one sentence each."""
    found = []
    for column in ("renderer", "versions", "execute_steps"):
        for (benchmark, _), group in episodes.groupby(GROUP):
            if len(values := sorted({str(value) for value in group[column]})) > 1:
                found.append(f"{benchmark}: runs differ in {column} ({'; '.join(values)}), which can change scores.")
    if (results.train_seed == POOLED).any():
        found.append("Pooled rows count episodes of all training seeds as independent and average the other columns.")
    return found


def titles(results: pd.DataFrame) -> dict[tuple[str, str], str]:
    """A heading per (benchmark, conditions): the benchmark, and those simulator arguments in which its runs differ."""
    found = {}
    for benchmark, rows in results.groupby("benchmark"):
        arguments = {text: json.loads(text) for text in rows.conditions}
        names = sorted({name for each in arguments.values() for name in each})
        for each in arguments.values() if "evaluation" in names else ():
            each.setdefault("evaluation", "rollout")  # which leaves no trace in the conditions
        differing = [n for n in names if len({json.dumps(each.get(n)) for each in arguments.values()}) > 1]
        for text, each in arguments.items():
            shown = ", ".join(f"{name}={each.get(name)}" for name in differing)
            found[benchmark, text] = f"{benchmark} ({shown})" if shown else benchmark
    return found


def printable(results: pd.DataFrame) -> pd.DataFrame:
    """`results_table` as text for people: value [95 % interval] (n); "–" where nothing was measured."""
    several = results.groupby([*GROUP, "arm"]).train_seed.transform("size") > 1
    names = [
        arm + (f", {seed if seed == POOLED else 'training seed ' + seed}" if more else "") + _incomplete(missing)
        for arm, seed, more, missing in zip(results.arm, results.train_seed, several, results.missing, strict=True)
    ]
    text = pd.DataFrame({"benchmark": _headings(results, results), "arm": names})
    success_n = results.successes.astype(str) + "/" + results.n.astype(str)
    text["success rate"] = _cells(results, "rate", success_n, digits=2)
    text["state probe, mm"] = _cells(results, "probe", results.probe_n.astype(str), digits=1)
    text["alignment, cosine"] = _cells(results, "cosine", results.cosine_n.astype(str), digits=2)
    return text


def printable_comparisons(comparisons: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """`comparison_table` as text for people, under the headings of the results."""
    text = pd.DataFrame({"benchmark": _headings(comparisons, results)})
    text["arms"] = comparisons.arm_a + " vs " + comparisons.arm_b
    rows = list(comparisons.itertuples())
    text["pairs"] = [str(row.n) for row in rows]
    text["only first / second"] = [f"{row.only_a:.0f} / {row.only_b:.0f}" if row.n else NONE for row in rows]
    text["difference"] = [f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]" if row.n else NONE for row in rows]
    text["McNemar"] = [format_p(row.p) if row.n else NONE for row in rows]
    if comparisons.p_holm.notna().any():
        text["Holm"] = [NONE if pd.isna(row.p_holm) else format_p(row.p_holm) for row in rows]
    text["verdict"] = comparisons.verdict
    return text


def _load_run(folder: Path) -> pd.DataFrame:
    header = read_json(folder / "run.json")
    arm = header.get("arm") or header.get("policy_name")
    if not arm:
        raise UserError(f"{folder / 'run.json'} names no arm: add the key 'arm', the label of this run in the table")
    rows = load_records(folder)
    missing = UNKNOWN
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")
        if lacking := {"n", "missing"} - summary.keys():
            raise UserError(f"{folder / 'summary.json'} lacks {sorted(lacking)[0]!r}: run that evaluation again")
        missing = summary["n"] + summary["missing"] - len(rows)  # rows may be newer than the summary
    conditions = {k: v for k, v in header.get("env_kwargs", {}).items() if k not in POLICY_SIDE}
    if header.get("protocol") and "env" in header:
        conditions["simulator"] = header["env"].split(".")[-1].split(":")[0]
    if (evaluation := header.get("evaluation", "rollout")) != "rollout":
        conditions |= {"evaluation": evaluation}
    return rows.assign(
        conditions=json.dumps(conditions, sort_keys=True),
        arm=str(arm),
        baseline=header.get("baseline"),
        train_seed=_seed(header),
        missing=missing,
        folder=str(folder),
    )


def _load_analysis(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    content = read_json(path)
    if lacking := [key for key in ("benchmark", "arm", *keys) if key not in content]:
        raise UserError(f"{path} lacks the key {lacking[0]!r}: run that evaluation again")
    rows = []
    for key in keys:
        if not isinstance(content[key], dict) or (lacking := {"value", "low", "high", "n"} - content[key].keys()):
            raise UserError(f"{path} lacks value, low, high or n of {key!r}: run that evaluation again")
        row = {"benchmark": content["benchmark"], "arm": content["arm"], "train_seed": _seed(content)}
        row |= {"baseline": content.get("baseline")}
        row |= {"metric": "probe" if key == "mae_mm" else key, "folder": str(path.parent)}
        rows.append(row | {name: content[key][name] for name in ("value", "low", "high", "n")})
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A header or a result, UserError naming the file where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or move its folder out of the results") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: restore it, or move its folder out of the results")
    return content


def _seed(header: dict[str, Any]) -> str:
    seed = header.get("train_seed")
    return NONE if seed is None else str(seed)


def _name_baselines(episodes: pd.DataFrame, analyses: pd.DataFrame) -> None:
    """Where the results are of several baselines, an arm is called by both names: "flower ptr"."""
    frames = [frame for frame in (episodes, analyses) if len(frame)]
    if len({name for frame in frames for name in frame.baseline.dropna()}) > 1:
        for frame in frames:
            named = frame.baseline.notna()
            frame.loc[named, "arm"] = frame.baseline[named] + " " + frame.arm[named]


def _adopt_seeds(analyses: pd.DataFrame, episodes: pd.DataFrame) -> None:
    """Give an analysis without a training seed that of its arm's rollouts."""
    for index, row in analyses[analyses.train_seed == NONE].iterrows():
        seeds = set(_select(episodes, {"benchmark": row.benchmark, "arm": row.arm}).train_seed)
        if len(seeds) > 1:
            raise UserError(f"{row.folder}: {row.arm!r} has training seeds {sorted(seeds)}: add 'train_seed'")
        analyses.loc[index, "train_seed"] = next(iter(seeds), NONE)


def _refuse_repeats(frame: pd.DataFrame, identity: list[str], what: str) -> None:
    repeated = frame[frame.duplicated(identity, keep=False)]
    if len(repeated):
        first = repeated.iloc[0]
        twins = repeated[(repeated[identity] == first[identity]).all(axis=1)].folder.unique()
        raise UserError(
            f"arm {first.arm!r} (training seed {first.train_seed}) has the same {what} of {first.benchmark} in "
            f"{' and in '.join(twins)}: move one away or give it another arm name"
        )


def _select(frame: pd.DataFrame, values: dict[str, str]) -> pd.DataFrame:
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


def _success(episodes: pd.DataFrame) -> dict[str, Any]:
    n, successes = len(episodes), int(episodes.success.sum()) if len(episodes) else 0
    if n == 0:
        return {}
    missing = episodes.groupby("folder").missing.first()
    low, high = rate_interval(successes, n)
    numbers = {"successes": successes, "n": n, "rate": successes / n, "rate_low": low, "rate_high": high}
    return numbers | {"missing": UNKNOWN if (missing == UNKNOWN).any() else int(missing.sum())}


def _shared_episodes(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Episodes of both arms side by side, and a remark where not all training seeds took part."""
    columns = ["task", "seed", "train_seed", "success"]
    a, b = a[columns], b[columns]
    if set(a.train_seed) & set(b.train_seed):
        return a.merge(b, on=columns[:3], suffixes=("_a", "_b")), ""
    first_a, first_b = (min(arm.train_seed, key=lambda seed: (len(seed), seed)) for arm in (a, b))
    several = a.train_seed.nunique() > 1 or b.train_seed.nunique() > 1
    a, b = _select(a, {"train_seed": first_a}), _select(b, {"train_seed": first_b})
    remark = f"; training seeds {first_a} and {first_b} only, the arms share none" if several else ""
    return a.merge(b, on=columns[:2], suffixes=("_a", "_b")), remark


def _incomplete(missing: float) -> str:
    if pd.isna(missing) or missing == 0:
        return ""
    return f" {NONE} incomplete ({'no summary.json' if missing == UNKNOWN else f'{missing:.0f} missing'})"


def _headings(table: pd.DataFrame, results: pd.DataFrame) -> list[str]:
    heading = titles(results)
    return [heading[key] for key in zip(table.benchmark, table.conditions, strict=True)]


def _cells(results: pd.DataFrame, column: str, count: pd.Series, digits: int) -> list[str]:
    """ "0.70 [0.48, 0.85] (14/20)" per row."""
    text = []
    for value, low, high, n in zip(
        results[column], results[f"{column}_low"], results[f"{column}_high"], count, strict=True
    ):
        interval = "" if pd.isna(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        text.append(NONE if pd.isna(value) else f"{value:.{digits}f}{interval} ({n})")
    return text
