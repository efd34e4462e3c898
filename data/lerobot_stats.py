"""The statistics that a LeRobot v3 data set carries, of each episode and of the whole.

For each feature min, max, mean, std, count and the quantiles q01, q10, q50, q90, q99, as lists: a number for each
dimension, and (3, 1, 1) in [0, 1] for images. Exact, where lerobot bins vectors and bounds the whole's quantiles by the
episodes'; images by at most FRAMES_OF_EPISODE evenly spaced frames of each episode, as lerobot samples them too.
"""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
FRAMES_OF_EPISODE = 100


def vector_stats(values: np.ndarray) -> dict[str, list]:
    """Of (T, D) or (T,) numbers, over the steps."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    stats |= dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True))
    return {name: stat.tolist() for name, stat in stats.items()} | {"count": [len(values)]}


def histogram(frames: np.ndarray) -> tuple[np.ndarray, int]:
    """Counts (3, 256) of the values of each channel in some of (T, H, W, 3) uint8 frames, and how many frames."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES_OF_EPISODE)).round().astype(int))
    channels = frames[chosen].reshape(-1, 3).T
    return np.stack([np.bincount(channel, minlength=256) for channel in channels]), len(chosen)


def image_stats(counts: np.ndarray, frames: int) -> dict[str, list]:
    """Of the pixels that `histogram` counted."""
    levels = np.arange(256) / 255
    pixels = counts.sum(1)
    mean = counts @ levels / pixels
    shares = counts.cumsum(1) / pixels[:, None]
    stats = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / pixels),
    }
    stats |= {name: levels[(shares >= q).argmax(1)] for name, q in QUANTILES.items()}
    return {name: stat.reshape(3, 1, 1).tolist() for name, stat in stats.items()} | {"count": [frames]}
