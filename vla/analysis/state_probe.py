"""Proprioception from frozen visual tokens by a light MLP: IDL §4.4, A.7, tables 4 and 12.

One head on the demonstrations of all tasks, L1 on the eight numbers of the state in their own units, one epoch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vla.analysis.features import TaskFeatures
from vla.analysis.mlp_probe import Fit, ProbeSettings, fit_probe, split_demonstrations


def fit_state_probe(features: TaskFeatures, settings: ProbeSettings, epochs: float, share: float, on_disk: bool) -> Fit:
    """Train the head on every task of the store for `epochs`; settings.steps is not read.

    Args:
        share: of each task's demonstrations, held out to validate.
        on_disk: read tokens from the features' files, writing those that are missing.
    """
    store = features.store
    tasks = sorted({window["task"] for window in store.windows})
    held_out = np.zeros(len(store.samples), dtype=bool)
    row = np.zeros(len(store.samples), dtype=np.int64)
    task_of = np.zeros(len(store.samples), dtype=np.int64)
    files = []
    for number, task in enumerate(tasks):
        samples = features.samples(task)
        held_out[samples] = split_demonstrations(store.episode_of[store.samples[samples]], share)
        row[samples], task_of[samples] = np.arange(len(samples)), number
        files.append(features.load(task) if on_disk else None)
    states = torch.from_numpy(store.states[store.samples]).to(features.device)

    def tokens(samples: np.ndarray) -> Tensor:
        if not on_disk:
            return features.encode(samples).clone()
        return torch.from_numpy(np.stack([files[task_of[s]][row[s]] for s in samples]))

    def loss(predicted: Tensor, samples: np.ndarray) -> Tensor:
        return (predicted - states[samples]).abs().mean()

    train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    steps = max(1, round(epochs * len(train) / settings.batch_size))
    settings = ProbeSettings(**{**settings.__dict__, "steps": steps})
    shape, outputs = features.shape, states.shape[1]
    fit = fit_probe(tokens, loss, shape, outputs, train, validation, settings, features.device)
    for task in tasks:
        features.forget(task)
    return fit
