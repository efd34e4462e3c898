"""The scripted WidowX and a policy that does nothing, in the real simulator (make simpler; MS_ASSET_DIR)."""

from __future__ import annotations

import pytest
import torch

from envs.pool import EpisodeSpec
from envs.rollout import run_rollouts
from envs.simpler.experts import ExpertWidowX
from envs.simpler.maniskill3 import TASKS, WidowXEnv
from tests.simpler_sim import NOTHING, sim
from vla.replay import ExpertPolicy


@pytest.mark.sim
@sim
def test_expert_succeeds_and_doing_nothing_does_not():
    env = ExpertWidowX("carrot_on_plate", cameras=())
    for seed in (0, 1):
        state, done = env.reset(seed)["state"], []
        while not env._ended:
            done.append(env.step(state))
            state = env.observe()["state"]
        assert done == [*[False] * 59, True]
    env.close()
    idle = WidowXEnv("carrot_on_plate", cameras=(), success_rule="ever")
    idle.reset(0)
    assert not any(idle.step(NOTHING) for _ in range(60))
    idle.close()


@pytest.mark.sim
@pytest.mark.slow
@sim
@pytest.mark.parametrize("task", TASKS)
def test_through_the_evaluator(task, tmp_path):
    """The expert and a policy that does nothing, this one judged by its every step, in a quarter of the episodes."""

    class NothingPolicy:
        chunk = 10

        def predict(self, observation: dict) -> torch.Tensor:
            return torch.tensor(NOTHING, dtype=torch.float32).repeat(len(observation["state"]), self.chunk, 1)

    episodes = [EpisodeSpec("simpler_widowx", task, seed, {"task": task}) for seed in (0, 5, 10, 13, 18, 23)]
    header = {"checkpoint": "none", "config": "none"}
    wins = {}
    for policy, env, rule in (
        (ExpertPolicy(), "envs.simpler.experts:ExpertWidowX", "last_step"),
        (NothingPolicy(), "envs.simpler.maniskill3:WidowXEnv", "ever"),
    ):
        result = run_rollouts(
            policy, episodes, tmp_path / rule, env=env, env_kwargs={"cameras": [], "success_rule": rule},
            workers=1, execute_steps=policy.chunk, episode_timeout_s=300, header=header, progress=False,
        )  # fmt: skip
        assert result.summary["complete"]
        wins[rule] = result.summary["successes"]
    assert wins["ever"] == 0 and wins["last_step"] >= 5, wins
