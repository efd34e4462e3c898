"""Five steps of every baseline give the losses written down in tests/golden/losses.json.

What changes them changes what was trained before: a loss, a draw, an order, an initial weight. Where that is meant:

    .venv/bin/python -m tests.test_golden_losses        # writes the file anew; the difference belongs in the commit
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path

import pytest

from data.frame_store import FrameStore
from data.store_writer import write_store
from tests.conftest import make_episodes, train_config
from train import train
from vla.build import BASELINES

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
ARM = "ptr"  # its draws and its head too


def losses(baseline: str, store: FrameStore, root: Path) -> dict[str, list[float]]:
    """Every logged loss, per step. With Adam's usual eps the sign of a gradient that is all rounding would count."""
    options = (f"baseline={baseline}", f"ablation={ARM}", "max_steps=5", "optim.eps=1e-3", "optim.warmup_steps=2")
    policy = train(train_config(store.path, root, *options))
    with open(policy.parent / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "samples_per_s", "data_wait", "mfu")]
    return {name: [float(f"{float(row[name]):.8g}") for row in rows] for name in names}


@pytest.mark.parametrize("baseline", BASELINES)
def test_losses_are_those_written_down(baseline, store, tmp_path):
    found, golden = losses(baseline, store, tmp_path), json.loads(GOLDEN.read_text())[baseline]
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert len(values) == 5
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-7), name
    assert max(golden["total"]) > min(golden["total"]) > 0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(make_episodes(), path, reader={"image_rotation": "rotate180"})
        store = FrameStore(path)
        golden = {baseline: losses(baseline, store, Path(folder) / "runs") for baseline in BASELINES}
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = (f' "{name}": {json.dumps(of)}'.replace("], ", "],\n  ") for name, of in golden.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
