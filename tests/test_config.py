"""The command line: every YAML composes, mistakes end as one line, nothing heavy is imported before they are found."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vla.cli import CONF, choices, compose_config
from vla.run_identity import run_hash

ROOT = CONF.parent
GROUPS = ("baseline", "size", "ablation", "benchmark", "trainer", "logger")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def timed(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """What a command gave, and the processor seconds it took: the wall clock depends on what else is running."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_training_yaml_composes(group, choice):
    cfg = compose_config("train", f"{group}={choice}")
    assert cfg.chunk >= 1 and cfg.optim.lr > 0


@pytest.mark.parametrize(
    "combination",
    [
        *itertools.product(choices("baseline"), choices("size"), ["vanilla"]),
        *itertools.product(["flower", "openvla"], ["tiny"], choices("ablation")),
    ],
)
def test_baseline_by_size_by_ablation(combination):
    baseline, size, ablation = combination
    cfg = compose_config("train", f"baseline={baseline}", f"size={size}", f"ablation={ablation}")
    assert (cfg.policy.name, cfg.size, cfg.arm) == combination
    assert cfg.inverse_dynamics.enabled == ablation.endswith(("aux", "ptr"))
    assert cfg.untouched == (ablation == "untouched")


@pytest.mark.parametrize("choice", choices("recipe"))
def test_recipe_is_taken_between_benchmark_and_backbone(choice):
    """Each is named after a baseline and a benchmark, and changes what the two say, at the paper's size."""
    baseline, benchmark = choice.split("_", 1)
    assert baseline in choices("baseline") and benchmark in choices("benchmark")
    recipe = OmegaConf.load(CONF / "recipe" / f"{choice}.yaml")
    cfg = compose_config("train", f"baseline={baseline}", f"benchmark={benchmark}", "size=full")
    plain = compose_config("train", f"baseline={baseline}", "benchmark=libero_goal", "size=full")
    for key, value in recipe.items():
        assert getattr(cfg, key) == value != getattr(plain, key)


@pytest.mark.parametrize("choice", choices("evaluation"))
@pytest.mark.parametrize("benchmark", choices("benchmark"))
def test_every_evaluation_composes(choice, benchmark):
    cfg = compose_config("evaluate", "policy=x", f"evaluation={choice}", f"benchmark={benchmark}")
    assert cfg.evaluation.name == choice and cfg.benchmark.name == benchmark


@pytest.mark.parametrize("name", ["collect", "convert"])
def test_scripts_compose(name):
    assert compose_config(name).benchmark.name == "libero_goal"


def test_every_yaml_belongs_to_a_tested_group():
    tested = {*GROUPS, "evaluation", "backbone", "experiment", "recipe", "launcher"}
    assert {path.parent.name for path in CONF.rglob("*.yaml")} - {"conf"} <= tested


def test_idl_table_values():
    """IDL tables 8 and 10, as they reach the program."""
    cfg = compose_config("train", "size=full", "ablation=ptr")
    inverse = cfg.inverse_dynamics
    assert (inverse.weight, inverse.gripper_weight, inverse.reverse_prob, inverse.dim) == (0.1, 0.01, 0.5, 1024)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.warmup_epochs, cfg.chunk) == (2e-5, 0.0, 0.25, 4)
    assert cfg.policy.pretrained == "Qwen/Qwen3-VL-8B-Instruct"


def test_config_is_frozen_and_hash_is_of_the_config_alone():
    cfg = compose_config("train")
    with pytest.raises(FrozenInstanceError):
        cfg.seed = 1
    assert run_hash(cfg) == run_hash(compose_config("train", "resume=auto", "run_root=elsewhere", "logger=wandb"))
    assert run_hash(cfg) != run_hash(replace(cfg, seed=1))
    assert run_hash(cfg) != run_hash(compose_config("train", "ablation=ptr"))


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "evaluate.py",
        "scripts/collect.py",
        "scripts/convert.py",
        "scripts/tables.py",
        "scripts/serve.py",
        "scripts/trial.py",
    ],
)
def test_help_teaches_within_five_seconds(script):
    done, seconds = timed(script, "--help")
    assert seconds < 5
    assert done.returncode == 0 and "python" in done.stdout and len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "named", "hint"),
    [
        (["optim.lrr=1"], "optim.lrr", "optim.lr"),
        (["max_step=3"], "max_step", "max_steps"),
        (["ablation=ptrr"], "ablation=ptrr", "ptr"),
        (["benchmark=libero_gaol"], "benchmark=libero_gaol", "libero_goal"),
        (["max_steps=many"], "max_steps", "many"),
        (["benchmarkk=libero_goal"], "benchmarkk", "benchmark"),
        (["optim.lr"], "optim.lr", "="),
    ],
)
def test_mistakes_are_one_line(arguments, named, hint):
    done, seconds = timed("train.py", *arguments)
    assert seconds < 5
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert named in done.stderr and hint in done.stderr


def test_missing_mandatory_value_is_one_line():
    done = run("evaluate.py")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "policy" in done.stderr
