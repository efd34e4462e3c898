"""How tests are run: those of one xdist group in one process, none begun after --minutes.

What a group shares is made once, and what must not run side by side does not. pytest-xdist writes the group into an
attribute of pytest's, which a newer pytest may no longer read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import conftest

GROUPED = """
import os
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("index", range(8))
def test_where(index):
    with open("where", "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_a_group_stays_in_one_process(tmp_path):
    (tmp_path / "test_grouped.py").write_text(GROUPED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    where = (tmp_path / "where").read_text().split()
    assert len(where) == 8 and len(set(where)) == 1


def test_what_has_not_begun_in_time_is_skipped_and_told():
    def asked(minutes: float | None) -> None:
        conftest.pytest_runtest_setup(SimpleNamespace(config=SimpleNamespace(getoption={"minutes": minutes}.get)))

    asked(None)
    asked(1000)
    with pytest.raises(pytest.skip.Exception, match="not begun within --minutes 0"):
        asked(0)
