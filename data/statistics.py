"""Per-dimension statistics of a data set's actions and states; numpy only, so that converters start at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.errors import UserError


@dataclass(frozen=True)
class ActionStatistics:
    """Per-dimension statistics of (N, 7) actions, lists of seven floats; `state` has those of proprioception (N, S)."""

    q01: list[float]
    q99: list[float]
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    count: int
    state: dict[str, list[float]] | None = None

    @classmethod
    def of(cls, actions: np.ndarray, states: np.ndarray | None = None) -> ActionStatistics:
        state = None if states is None else describe(states, "states")
        return cls(**describe(actions, "actions"), count=len(actions), state=state)

    def to_dict(self) -> dict:
        return dict(self.__dict__)


def describe(values: np.ndarray, what: str) -> dict[str, list[float]]:
    """q01, q99, mean, std, min and max of each column; UserError where a value is not finite."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{what} hold NaN or infinite values; find the episode with scripts/convert.py and drop it")
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    moments = dict(mean=values.mean(0), std=values.std(0), min=values.min(0), max=values.max(0))
    return {name: value.tolist() for name, value in (dict(q01=q01, q99=q99) | moments).items()}
