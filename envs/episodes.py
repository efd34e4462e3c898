"""Which episodes an evaluation runs, and where: a benchmark's configuration in envs/rollout.py's terms."""

from __future__ import annotations

from pathlib import Path

from envs.pool import EpisodeSpec
from vla.config import EXPERT, EvaluateConfig
from vla.errors import UserError

ALL = 10**6
"""More episodes than any task has."""


def execution(cfg: EvaluateConfig, policy) -> tuple[float | None, int]:
    """(temperature of temporal ensembling or None, actions executed per query), the policy's own by default."""
    ensemble = cfg.evaluation.ensemble
    if ensemble == "policy":
        ensemble = getattr(policy, "ensemble", None)
    if ensemble is not None and not isinstance(ensemble, (int, float)):
        raise UserError(f"evaluation.ensemble={ensemble} is not known; give policy, null (off) or a temperature")
    steps = cfg.evaluation.execute_steps or (policy.chunk if ensemble is None else 1)
    if ensemble is not None and steps != 1:
        raise UserError(
            f"evaluation.execute_steps={steps} and temporal ensembling exclude each other; set evaluation.ensemble=null"
        )
    return ensemble, steps


def simulator(cfg: EvaluateConfig, policy, about: dict) -> tuple[str, dict, list]:
    """(environment factory, its arguments, the episodes) of the benchmark, checked before anything starts."""
    benchmark, cameras = cfg.benchmark, list(getattr(policy, "cameras", ["static"]))
    if cfg.evaluation.videos and not cameras:
        cameras = ["static"]  # a film of a policy that looks at nothing
    seeds = range(cfg.first_seed, cfg.first_seed + (cfg.episodes or ALL))
    if benchmark.family == "calvin":
        from envs.calvin_sequences import TOTAL, sequences
        from envs.calvin_sim import package_root, resolve_renderer

        if seeds.stop > TOTAL:
            raise UserError(
                f"episodes up to seed {seeds.stop - 1} were asked for; CALVIN has the chains 0 to {TOTAL - 1}"
            )
        package_root()
        sequences()  # made once here, not in every worker
        env = "envs.calvin:ExpertChains" if cfg.policy == EXPERT else "envs.calvin:CalvinChains"
        arguments = {"scene": benchmark.scene, "cameras": cameras, "max_steps": benchmark.max_steps}
        arguments |= {"renderer": resolve_renderer(benchmark.renderer)}
        return env, arguments, [EpisodeSpec(benchmark.name, "chain", seed) for seed in seeds]

    if benchmark.family == "simpler":
        return simpler(cfg, cameras, seeds)

    if benchmark.family == "real_robot":
        raise UserError(
            "a real robot is not simulated; serve the policy (scripts/serve.py), log trials (scripts/trial.py)"
        )

    from data.libero import suites_of
    from envs.libero import ensure_gl
    from envs.libero_files import task_list

    known = [
        (suite, index, *names) for suite in suites_of(benchmark.suite) for index, names in enumerate(task_list(suite))
    ]
    tasks = benchmark.tasks if benchmark.tasks is not None else range(len(known))
    if unknown := [task for task in tasks if not 0 <= task < len(known)]:
        raise UserError(f"benchmark.tasks={unknown} is not in {benchmark.suite}; choose from 0 … {len(known) - 1}")
    told = getattr(policy, "instructions", None)  # of a policy that knows some tasks only
    chosen = [known[task] for task in tasks if told is None or known[task][3] in told]
    if cfg.policy == EXPERT:
        from envs.experts import check_solved

        for suite, index, *_ in chosen:
            check_solved(suite, index)
    ensure_gl()  # once here, not in every worker
    keys = ("resolution", "fixture_seed", "settle_steps", "start_displacement", "max_steps")
    arguments = {key: getattr(benchmark, key) for key in keys}
    # The image orientation is the one the policy was trained on.
    arguments |= {"cameras": cameras, "image_rotation": about.get("image_rotation", cfg.data.image_rotation)}
    episodes = [
        EpisodeSpec(suite, name, seed, {"suite": suite, "task_id": index})
        for suite, index, name, _ in chosen
        for seed in seeds
    ]
    env = "envs.libero_expert:ExpertLibero" if cfg.policy == EXPERT else "envs.libero:LiberoEnv"
    return env, arguments, episodes


def simpler(cfg: EvaluateConfig, cameras: list[str], seeds: range) -> tuple[str, dict, list]:
    """SimplerEnv's part of `simulator`: of every task, the episodes among `seeds`."""
    from envs.simpler.protocol import cells

    benchmark = cfg.benchmark
    if benchmark.simulator not in SIMPLER_SIMULATORS:
        known = ", ".join(SIMPLER_SIMULATORS)
        raise UserError(f"benchmark.simulator={benchmark.simulator} is not known; choose one of {known}")
    chosen = [cell for cell in cells(benchmark.suite, benchmark.groups) if cell.seed in seeds]
    episodes = [EpisodeSpec(benchmark.name, cell.task, cell.seed, {"task": cell.task}) for cell in chosen]
    keys = ("success_rule", "background", "rotation", "action_scale", "max_steps")
    arguments = {key: getattr(benchmark, key) for key in keys} | {"cameras": cameras}
    return *SIMPLER_SIMULATORS[benchmark.simulator](cfg, arguments), episodes


def maniskill3(cfg: EvaluateConfig, arguments: dict) -> tuple[str, dict]:
    """Factory and arguments of ManiSkill3's environment, which has WidowX and the benchmark's own words only."""
    from envs.simpler.maniskill3 import asset_folder
    from envs.simpler.vulkan import resolve_renderer

    benchmark = cfg.benchmark
    if benchmark.suite != "widowx" or benchmark.paraphrases is not None:
        raise UserError(f"{benchmark.name} is not on ManiSkill3; set benchmark.simulator=original")
    asset_folder()
    arguments["renderer"] = resolve_renderer(benchmark.renderer) if arguments["cameras"] else "auto"
    env = "envs.simpler.experts:ExpertWidowX" if cfg.policy == EXPERT else "envs.simpler.maniskill3:WidowXEnv"
    return env, arguments


def original(cfg: EvaluateConfig, arguments: dict) -> tuple[str, dict]:
    """Factory and arguments of the original SimplerEnv, for workers under `interpreter(cfg)`."""
    from envs.simpler.sapien2 import resolve_renderer

    benchmark = cfg.benchmark
    if cfg.policy == EXPERT:
        raise UserError(
            "the original SimplerEnv has no scripted expert; benchmark.simulator=maniskill3 has one of WidowX"
        )
    renderer = resolve_renderer(interpreter(cfg), benchmark.renderer)
    shader = {"gpu": "rt", "cpu": "ibl"}[renderer] if benchmark.shader == "auto" else benchmark.shader
    arguments |= {"suite": benchmark.suite, "paraphrases": benchmark.paraphrases}
    return "envs.simpler.original:OriginalEnv", arguments | {"renderer": renderer, "shader": shader}


SIMPLER_SIMULATORS = {"maniskill3": maniskill3, "original": original}


def interpreter(cfg: EvaluateConfig) -> Path | None:
    """The interpreter that the simulator needs for itself, None where it is this one."""
    if cfg.benchmark.family != "simpler" or cfg.benchmark.simulator != "original":
        return None
    return Path(__file__).resolve().parents[1] / cfg.benchmark.python
