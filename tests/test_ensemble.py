"""Temporal ensembling (fact sheet §5.6, §10, §14) against a plain reference, alone and behind the policy server."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vla_eval.model_servers.base import SessionContext

from envs.server import PolicyServer
from vla.ensemble import TemporalEnsembler

TEMPERATURE = -0.8


def chunks(steps: int, horizon: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(steps, horizon, 7)).astype(np.float32)
    out[..., 6] = rng.integers(0, 2, (steps, horizon))
    return out


def reference(episode: np.ndarray, now: int, temperature: float) -> np.ndarray:
    """The mean of what chunks predicted at `now` and up to H − 1 steps earlier say of `now`, the oldest first."""
    horizon = episode.shape[1]
    predictions = [episode[then][now - then] for then in range(max(0, now - horizon + 1), now + 1)]
    total, weights = np.zeros(7), 0.0
    for index, prediction in enumerate(predictions):
        total += np.exp(-temperature * index) * prediction
        weights += np.exp(-temperature * index)
    mean = total / weights
    mean[6] = 1.0 if mean[6] > 0.5 else 0.0
    return mean


def test_weights_are_the_sheets():
    """§10: for four predictions at −0.8 ∝ 1, 2.2255, 4.9530, 11.0232, oldest to newest."""
    weights = []
    for index in range(4):
        ensembler = TemporalEnsembler(4, TEMPERATURE)
        for call in range(4):
            chunk = np.zeros((4, 7), np.float32)
            chunk[:, 0] = call == index
            action = ensembler(chunk)
        weights.append(action[0])
    np.testing.assert_allclose(np.array(weights) / weights[0], [1, 2.2255, 4.9530, 11.0232], atol=2e-4)
    assert sum(weights) == pytest.approx(1)


def test_first_call_returns_the_prediction_unchanged():
    chunk = chunks(1)[0]
    np.testing.assert_array_equal(TemporalEnsembler(4, TEMPERATURE)(chunk), chunk[0])


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.0, 0.3])
def test_a_whole_episode_equals_the_plain_reference(horizon, temperature):
    episode = chunks(25, horizon)
    ensembler = TemporalEnsembler(horizon, temperature)
    for now, chunk in enumerate(episode):
        np.testing.assert_allclose(ensembler(chunk), reference(episode, now, temperature), atol=1e-6)


def test_the_gripper_is_averaged_and_closes_on_a_tie():
    """Equal weights: open alone; then closed now, open earlier; then open now, closed earlier; then open twice."""
    ensembler = TemporalEnsembler(2, 0.0)
    openings = [(1, 1), (0, 0), (1, 1), (1, 1)]  # of this step and the next
    got = []
    for opening in openings:
        chunk = np.zeros((2, 7), np.float32)
        chunk[:, 6] = opening
        got.append(ensembler(chunk)[6])
    assert got == [1, 0, 0, 1]


class Scripted:
    """Answers with the chunk its observation names in the state: (session, episode, step)."""

    chunk = 4

    def __init__(self, episodes: np.ndarray):
        self.episodes = torch.from_numpy(episodes)  # session, episode, step, H, 7

    def predict(self, observation: dict) -> torch.Tensor:
        session, episode, step = observation["state"].long().unbind(1)
        return self.episodes[session, episode, step]


def ask(
    server: PolicyServer, contexts: list[SessionContext], rows: list[tuple[int, int, int]], told: str = ""
) -> list[np.ndarray]:
    blank = {"static": np.zeros((4, 4, 3), np.uint8)}
    observations = [{"images": blank, "state": np.array(row, np.float32), "task_description": told} for row in rows]
    replies = server.predict_batch(observations, contexts)
    for context in contexts:
        context._increment_step()
    return [reply["actions"] for reply in replies]


@pytest.mark.parametrize("together", [False, True])
def test_the_server_ensembles_every_session_on_its_own(together):
    """Two sessions that alternate, or share a batch, and a second episode in the first of them half way through."""
    episodes = np.stack([[chunks(12, seed=10 * s + e) for e in range(2)] for s in range(2)])
    server = PolicyServer(Scripted(episodes), execute_steps=1, max_batch=2, exact=not together, ensemble=TEMPERATURE)
    first, second = SessionContext("a", "a0"), SessionContext("b", "b0")
    for step in range(12):
        if step == 5:  # a new episode of the same session: vla-eval hands out a fresh context
            first = SessionContext("a", "a1")
        at_first = (0, 0, step) if step < 5 else (0, 1, step - 5)
        rows = [at_first, (1, 0, step)]
        if together:
            got = ask(server, [first, second], rows)
        else:
            got = [ask(server, [context], [row])[0] for context, row in zip((first, second), rows, strict=True)]
        for action, (session, episode, now) in zip(got, rows, strict=True):
            assert action.shape == (1, 7)
            np.testing.assert_allclose(action[0], reference(episodes[session, episode], now, TEMPERATURE), atol=1e-6)


def test_another_instruction_in_a_chain_starts_the_mean_anew():
    """Chunks predicted for the task before say nothing about this one."""
    episode = chunks(10)
    server = PolicyServer(Scripted(episode[None, None]), execute_steps=1, ensemble=TEMPERATURE)
    context = SessionContext("a", "a0")
    for step in range(10):
        told = "open the drawer" if step < 6 else "close the drawer"
        (action,) = ask(server, [context], [(0, 0, step)], told)
        since = episode if step < 6 else episode[6:]
        np.testing.assert_allclose(action[0], reference(since, step if step < 6 else step - 6, TEMPERATURE), atol=1e-6)


def test_without_ensembling_the_server_answers_with_the_chunk():
    episodes = chunks(3)[None, None]
    server = PolicyServer(Scripted(episodes), execute_steps=2)
    context = SessionContext("a", "a0")
    for step in range(3):
        (reply,) = ask(server, [context], [(0, 0, step)])
        np.testing.assert_array_equal(reply, episodes[0, 0, step, :2])
