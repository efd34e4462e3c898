"""Linear probe of frozen visual features: how exactly do they tell where the gripper is?

The quick probe (fact sheet demo §5): closed-form ridge regression, seconds on a CPU. It shows what is linearly readable
from mean-pooled tokens; the paper's probe (IDL A.7, an MLP on all tokens) measures more and costs hours.

    result = ridge_probe(features, states, train_mask, demonstrations)
    print(result["mae_mm"]["value"])
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from vla.analysis.statistics import Estimate, mean_interval
from vla.errors import UserError


def ridge_probe(
    features: np.ndarray,
    states: np.ndarray,
    train_mask: np.ndarray,
    demonstrations: np.ndarray,
    alpha: float = 10.0,
    seed: int = 0,
) -> dict:
    """Ridge regression from features to the end-effector position, scored on held-out demonstrations.

    Features are standardised with the training frames' mean and deviation; the intercept is not penalised.

    Args:
        features: (N, C) frozen mean-pooled tokens.
        states: (N, S) proprioception, the first three dimensions x, y, z of the end effector in metres.
        train_mask: (N,) bool, True for training frames; a demonstration lies wholly on one side.
        demonstrations: (N,) id of each frame's demonstration, the unit of the bootstrap.
        alpha: ridge penalty on standardised features.

    Returns:
        {"mae_mm": {"value", "low", "high", "n"}, "r2", "frames", "train_frames"}. mae_mm: mean over held-out frames and
        the three axes of the absolute error in millimetres, with a 95 % bootstrap interval over n held-out
        demonstrations. r2: 1 - residual / total sum of squares over the three axes, against the held-out mean.

    Raises:
        UserError: lengths that differ, a demonstration on both sides, fewer than two held out, values not finite.
    """
    features, targets = np.asarray(features, dtype=np.float64), np.asarray(states, dtype=np.float64)[:, :3]
    train, demonstrations = np.asarray(train_mask, dtype=bool), np.asarray(demonstrations)
    if not len(features) == len(targets) == len(train) == len(demonstrations):
        raise UserError(
            "the state probe needs one feature, state, mask and demonstration per frame, "
            f"got {len(features)}, {len(targets)}, {len(train)} and {len(demonstrations)}"
        )
    if not (np.isfinite(features).all() and np.isfinite(targets).all()):
        raise UserError("the state probe got features or states that are not finite: check the encoder and the data")
    if both := sorted(set(demonstrations[train].tolist()) & set(demonstrations[~train].tolist())):
        raise UserError(f"demonstration {both[0]} is in training and held-out frames: split by whole demonstrations")
    held_out, demonstration = np.unique(demonstrations[~train], return_inverse=True)
    if not train.any() or len(held_out) < 2:
        raise UserError(
            f"the state probe has {int(train.sum())} training frames and {len(held_out)} held-out demonstrations: "
            "give frames to train on and at least 2 demonstrations to hold out"
        )

    predicted = _ridge(features[train], targets[train], features[~train], alpha)
    error = predicted - targets[~train]
    frame_mm = 1000 * np.abs(error).mean(axis=1)
    sizes = np.bincount(demonstration)
    low, high = mean_interval(np.bincount(demonstration, frame_mm) / sizes, seed=seed, weights=sizes)
    spread = targets[~train] - targets[~train].mean(axis=0)
    return {
        "mae_mm": asdict(Estimate(float(frame_mm.mean()), low, high, n=len(held_out))),
        "r2": float(1 - (error**2).sum() / (spread**2).sum()),
        "frames": int((~train).sum()),
        "train_frames": int(train.sum()),
    }


def _ridge(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alpha: float) -> np.ndarray:
    """Predictions (M, K) at x_new (M, C) of the ridge fit on standardised x (N, C), y (N, K)."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1)
    z, z_new = (x - mean) / deviation, (x_new - mean) / deviation
    weights = np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T @ (y - y.mean(axis=0)))
    return z_new @ weights + y.mean(axis=0)
