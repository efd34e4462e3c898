"""How tests are run: those of one xdist group in one process, none begun after --minutes.

What a group shares is made once, and what must not run side by side does not. pytest-xdist writes the group into an
attribute of pytest's, which a newer pytest may no longer read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUPED = """
import os
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("index", range(8))
def test_where(index):
    with open("where", "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_group_stays_in_one_process(tmp_path):
    (tmp_path / "test_grouped.py").write_text(GROUPED)
    done = run(tmp_path, "-n", "2", "--dist", "loadgroup")
    assert done.returncode == 0, done.stdout
    where = (tmp_path / "where").read_text().split()
    assert len(where) == 8 and len(set(where)) == 1


@pytest.mark.parametrize(("minutes", "told"), [("5", "1 passed"), ("0", "not begun within --minutes 0")])
def test_what_has_not_begun_in_time_is_skipped_and_told(tmp_path, minutes, told):
    (tmp_path / "test_quick.py").write_text("def test_quick():\n    pass\n")
    done = run(tmp_path, "-p", "tests.conftest", "--minutes", minutes, "-rs")
    assert done.returncode == 0 and told in done.stdout, done.stdout
