"""LIBERO's tasks and initial states, from either package; LIBERO-PRO's suites."""

from __future__ import annotations

import importlib.util
import os
import pickle

import numpy as np
import pytest
import torch

from data.libero import suites_of
from envs import libero_files
from envs.libero_files import HF, PRO, base, initial_states, max_steps, task_list, tasks_of
from vla.errors import UserError

installed = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")


def test_a_perturbed_suite_has_its_base_and_its_steps():
    assert [base(s) for s in ("libero_goal", "libero_goal_swap", "libero_10_lan")] == ["libero_goal"] * 2 + [
        "libero_10"
    ]
    assert max_steps("libero_10_task") == 520
    for wrong in ("libero_gaol", "libero_goal_warp", "libero_90_swap"):
        with pytest.raises(UserError, match=f"unknown LIBERO suite '{wrong}'"):
            base(wrong)


@installed
def test_words_of_the_perturbed_suites():
    """By hand from the package's scene files: other words, another task, the same words."""
    plain = dict(task_list("libero_goal"))
    drawer = "open_the_middle_drawer_of_the_cabinet"
    assert plain[drawer] == "open the middle drawer of the cabinet"
    assert dict(task_list("libero_goal_lan"))[drawer] == "open the cabinet's middle drawer"
    assert dict(task_list("libero_goal_task"))[drawer] == "open the bottom drawer of the cabinet"
    assert dict(task_list("libero_goal_swap")) == plain


@installed
def test_suites_under_one_name_count_through():
    names = [name for name, _ in task_list("libero_four")]
    assert len(names) == 40 and names[20:30] == [task.name for task in tasks_of("libero_goal")]
    assert suites_of("libero_pro_goal")[2] == "libero_goal_swap" and len(task_list("libero_pro_goal")) == 40


@installed
@pytest.mark.parametrize("suite", ["libero_goal_swap", "libero_spatial_object", "libero_10_task"])
def test_perturbed_suites_are_whole(suite):
    if libero_files.package() != PRO:
        pytest.skip("hf-libero has no perturbed suites")
    for task in tasks_of(suite):
        assert task.bddl_file.exists() and initial_states(task.init_states_file).shape[0] == 50


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_hf_libero_s_states_are_read_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(libero_files, "package", lambda: HF)
    states = np.random.default_rng(0).normal(size=(50, 9))
    torch.save(states, "good.pruned_init")
    np.testing.assert_array_equal(initial_states(tmp_path / "good.pruned_init"), states)
    torch.save(Payload(), "bad.pruned_init")
    with pytest.raises(UserError, match=r"bad\.pruned_init cannot be read"):
        initial_states(tmp_path / "bad.pruned_init")
    (tmp_path / "bare.pruned_init").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"bare\.pruned_init cannot be read"):
        initial_states(tmp_path / "bare.pruned_init")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"none\.pruned_init cannot be read"):
        initial_states(tmp_path / "none.pruned_init")


def test_hf_libero_is_answered_before_it_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "libero")]})
    monkeypatch.setattr(libero_files, "find_spec", lambda name: spec)
    libero_files._answer_hf_libero()
    written = (tmp_path / f"vla-libero-{os.getuid()}" / "config.yaml").read_text()
    assert f"bddl_files: {tmp_path}/libero/libero/bddl_files" in written
    assert os.environ["LIBERO_CONFIG_PATH"] == str(tmp_path / f"vla-libero-{os.getuid()}")
    os.environ.pop("LIBERO_CONFIG_PATH")  # what was there before comes back with the fixture
