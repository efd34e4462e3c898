"""The page: what vla.report finds, put into page.html. jinja2 escapes every text that comes from a file.

write_page(Path("results"), Path("runs"), Path("report.html"))
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vla.analysis import tables
from vla.files import write_atomic
from vla.report import pictures, provenance
from vla.report.answers import Answer, answers, main_pairs, overview
from vla.report.drawing import Looks, Picture
from vla.report.films import strips
from vla.report.material import Material, load
from vla.report.pairs import pair_scatter
from vla.report.sheets import coverage, sheets

FOLDER = Path(__file__).parent
REMEDY = {
    "rollouts": "evaluation=rollout",
    "behaviour-cloning probe": "evaluation=bc_probe",
    "state probe": "evaluation=state_probe",
    "position probe": "evaluation=ridge_probe",
    "alignment": "evaluation=alignment",
    "VQA": "evaluation=vqa",
    "CIFAR-10": "evaluation=cifar10",
    "latency": "evaluation=latency",
    "films of rollouts": "evaluation=rollout evaluation.videos=2",
}
"""What is not there → what evaluate.py is asked for."""


def write_page(results: Path, runs: Path, out: Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        UserError: no results, a damaged file, or a folder that cannot be written to (vla/report/material.py).
    """
    material = load(results, runs)
    write_atomic(out, render(material))
    return out


def render(material: Material) -> str:
    looks = Looks(material.arms)
    results = tables.results_table(material.episodes, material.analyses)
    comparisons = tables.comparison_table(material.episodes)
    measured, absent = coverage(material)
    episodes, more_films = strips(material)
    if not episodes:
        absent.append("films of rollouts")
    told = answers(material, results, comparisons)
    pairs = main_pairs(told)
    first, other = (_by_question([a for a in told if (a.arms in pairs) == main]) for main in (True, False))
    main = comparisons[(comparisons.arm_a + " vs " + comparisons.arm_b).isin(pairs)]
    script = (FOLDER / "page.js").read_text()
    return _template().render(
        title=f"Report: {material.results.name or material.results.resolve().name}",
        changed=_changed(material),
        policies=len({(e.arm, e.seed) for e in material.evaluations}),
        answers=told,
        overview=overview(told, pairs),
        first=first,
        other=other,
        differences=pictures.differences(main, results),
        notes=tables.notes(material.episodes, results),
        coverage=measured,
        absent=[(kind, REMEDY[kind]) for kind in absent],
        sheets=sheets(material, results, comparisons),
        figures=_figures(material, results, looks),
        without_curve=[run.folder.name for run in material.runs if run.metrics is None],
        runs_root=material.runs_root,
        films=episodes,
        more_films=more_films,
        tsne=_tsne(material),
        provenance=[provenance.policies(material), provenance.environment(material), provenance.times(material)],
        commands="\n".join(provenance.commands(material)),
        configs=[(run.folder.name, run.config_text) for run in material.runs],
        headers=[(_name(e.file, material.results), _header(e.header)) for e in material.evaluations],
        css=Markup((FOLDER / "page.css").read_text()),
        js=Markup(script),
        js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _by_question(told: list[Answer]) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for answer in told:
        found.setdefault(answer.question, []).append(answer)
    return found


def _figures(material: Material, results, looks: Looks) -> list[tuple[str, str, list[Picture]]]:
    """(heading, what one sees, panels), and no panels where there is nothing to draw."""
    curve = "Thin lines: training seeds, smoothed; thick line: their mean as far as every seed has come."
    bars = "Bars: mean over training seeds; marks with lines: each seed with its own 95 % interval."
    return [
        ("Learning curves", curve, pictures.learning_curves(material.runs, looks)),
        (
            "Frozen-encoder probes while they train",
            f"Lower is easier to learn from (IDL Fig. 1b). {curve}",
            pictures.probe_curves(material.curves, looks),
        ),
        (
            "State-feature alignment",
            f"Higher: distances of features follow distances of robot poses (IDL Fig. 1c). {bars} Points: some of the "
            "pairs of frames; line: the median of each tenth of all pairs, which rises where features follow poses.",
            pictures.alignment_bars(material.analyses, looks)
            + pair_scatter(material.evaluations, looks)
            + pictures.alignment_scatter(results, looks),
        ),
        (
            "Success per task",
            "All training seeds together; the interval is wide where episodes are few.",
            pictures.successes(material.episodes, results, looks),
        ),
        (
            "Questions about pictures, and linear probes",
            f"GenVLA Fig. 5 and the numbers of Fig. 4. {bars}",
            pictures.accuracy_bars(material.accuracies, looks),
        ),
    ]


def _tsne(material: Material) -> list[tuple[str, str]]:
    """(caption, PNG as data: URI) of the t-SNE pictures that evaluation=cifar10 left."""
    found = []
    for evaluation in material.evaluations:
        path = evaluation.file.with_name("tsne.png")
        if evaluation.kind == "CIFAR-10" and path.exists():
            data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            found.append((f"{evaluation.arm}, training seed {evaluation.seed}", data))
    return found


def _changed(material: Material) -> str:
    newest = max(evaluation.file.stat().st_mtime for evaluation in material.evaluations)
    return datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _header(header: dict) -> str:
    """As JSON, long lists (a probe's curve) cut off."""
    short = {k: [*v[:3], f"… {len(v)} in all"] if isinstance(v, list) and len(v) > 20 else v for k, v in header.items()}
    return json.dumps(short, indent=2)


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _template():
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
