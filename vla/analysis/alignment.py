"""State-feature alignment (IDL §4.5, A.8): do distances between visual features follow distances between robot poses?

Frame pairs of one trajectory segment give three distances: features, 6-DoF pose, pixels. The score is the Spearman
correlation of the first two with the third partialled out, so that an encoder cannot earn it by tracking raw image
change. Numpy only: the caller brings mean-pooled features, poses and frames.

    result = alignment(features, poses, frames, segments=[(0, 71), (71, 140)])
    result.cosine.value, result.scale.low, result.pairs_per_gap, result.distances["pose"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import bootstrap, rankdata

from vla.analysis.statistics import Estimate
from vla.errors import UserError

GAPS = (1, 2, 4, 8, 16, 32)
PER_GAP = 1000
GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
RESAMPLES = 500


@dataclass(frozen=True)
class AlignmentResult:
    """Partial Spearman correlations in [-1, 1]; n counts pairs.

    The intervals resample pairs. They say how far the score depends on which pairs were drawn, not how far it would
    move with other demonstrations or another training seed: pairs of one segment resemble each other.
    """

    cosine: Estimate
    scale: Estimate
    pairs_per_gap: dict[int, int]
    distances: dict[str, np.ndarray] = field(compare=False)
    """Of each pair: "cosine", "scale", "pose", "pixel", float32 (P,)."""


def alignment(
    features: np.ndarray,
    poses: np.ndarray,
    frames: Sequence[np.ndarray],
    segments: Sequence[tuple[int, int]],
    gaps: Sequence[int] = GAPS,
    per_gap: int = PER_GAP,
    seed: int = 0,
) -> AlignmentResult:
    """Cosine and scale alignment of one encoder, with bootstrap 95 % intervals.

    Args:
        features: (N, C) visual tokens averaged over positions, eq. (2).
        poses: (N, 6) end-effector position (m) and orientation (rad), not normalised.
        frames: N images uint8 (H, W, 3), an array or anything indexed by frame; only frames of a pair are read.
        segments: half-open frame ranges [start, end), each within one instruction of one trajectory.
        gaps: temporal distances in frames; per_gap: pairs of each (fewer where fewer exist).
        seed: of the pair sampling and the bootstrap.

    Raises:
        UserError: lengths that differ, segments outside the frames, gaps longer than every segment, constant features.
    """
    features, poses = np.asarray(features, dtype=np.float64), np.asarray(poses, dtype=np.float64)
    if not len(features) == len(poses) == len(frames):
        raise UserError(
            f"alignment needs one feature, pose and frame each, got {len(features)}, {len(poses)} and {len(frames)}"
        )
    if features.ndim != 2 or poses.ndim != 2 or poses.shape[1] != 6:
        raise UserError(f"alignment needs (N, C) features and (N, 6) poses, got {features.shape} and {poses.shape}")
    if outside := [segment for segment in segments if not 0 <= segment[0] < segment[1] <= len(poses)]:
        raise UserError(f"segment {outside[0]} is not a range within the {len(poses)} frames: check its bounds")
    rng = np.random.default_rng(seed)
    pairs = sample_pairs(segments, gaps, per_gap, rng)
    i, j = pairs.T

    annotated = np.unique(np.concatenate([np.arange(start, end) for start, end in segments]))
    pose = pose_distance(poses[i], poses[j], sigma=poses[annotated].std(axis=0))
    used, position = np.unique(pairs, return_inverse=True)
    small = np.stack([thumbnail(frames[int(index)]) for index in used])
    position = position.reshape(pairs.shape)
    pixel = pixel_distance(small[position[:, 0]], small[position[:, 1]])

    gap_of_pair, counts = np.unique(j - i, return_counts=True)
    cosine, scale = cosine_distance(features[i], features[j]), scale_distance(features[i], features[j])
    distances = {"cosine": cosine, "scale": scale, "pose": pose, "pixel": pixel}
    return AlignmentResult(
        cosine=_estimate(cosine, pose, pixel, rng),
        scale=_estimate(scale, pose, pixel, rng),
        pairs_per_gap={int(gap): int(count) for gap, count in zip(gap_of_pair, counts, strict=True)},
        distances={name: values.astype(np.float32) for name, values in distances.items()},
    )


def sample_pairs(
    segments: Sequence[tuple[int, int]], gaps: Sequence[int], per_gap: int, rng: np.random.Generator
) -> np.ndarray:
    """Frame pairs (i, i + gap), both in one segment, uniform over all such pairs of a gap, none twice.

    Args:
        segments: half-open frame ranges [start, end).
        per_gap: pairs per gap; all of them where fewer exist.
    Returns:
        (P, 2) int64 frame indices, gaps in the order given.
    Raises:
        UserError: gaps that fit in no segment (it names them), or a gap below 1.
    """
    if min(gaps) < 1:
        raise UserError(f"a gap of {min(gaps)} frames pairs a frame with itself or the past: give gaps of 1 or more")
    longest = max((end - start for start, end in segments), default=0)
    if too_long := [gap for gap in gaps if gap >= longest]:
        raise UserError(
            f"gaps {too_long} fit in no segment, the longest has {longest} frames: drop them or give longer segments"
        )
    chosen = []
    for gap in gaps:
        firsts = np.unique(np.concatenate([np.arange(start, max(start, end - gap)) for start, end in segments]))
        firsts = rng.choice(firsts, size=min(per_gap, len(firsts)), replace=False)
        chosen.append(np.stack([firsts, firsts + gap], axis=1))
    return np.concatenate(chosen)


def pose_distance(a: np.ndarray, b: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Eq. (1): ||(a - b) / sigma||_2 for (P, 6) poses; a dimension that never varies (sigma 0) contributes nothing.

    The difference is the plain one, as in the paper: rotations must not jump between -pi and pi within a segment.
    """
    sigma = np.where(sigma > 0, sigma, np.inf)
    return np.linalg.norm((a - b) / sigma, axis=1)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eq. (2) for (P, C) mean-pooled features, values in [0, 2]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not (norms > 0).all():
        raise UserError("a visual feature is all zeros, its direction is undefined: check the encoder and its tap")
    return 1 - (a * b).sum(axis=1) / norms


def scale_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eq. (3): | ||a||_2 - ||b||_2 | for (P, C) mean-pooled features."""
    return np.abs(np.linalg.norm(a, axis=1) - np.linalg.norm(b, axis=1))


def thumbnail(frame: np.ndarray, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Grey thumbnail (h, w) in [0, 255] of a uint8 (H, W, 3) image, each cell the exact mean of the area it covers.

    A.8 says "downsampled grayscale image thumbnails" and gives neither size nor filter; 32 x 32 is our choice.
    """
    frame = np.asarray(frame)
    if frame.ndim != 3 or frame.shape[0] < size[0] or frame.shape[1] < size[1]:
        raise UserError(f"a frame of shape {frame.shape} has no {size[0]} x {size[1]} thumbnail: give (H, W, 3) images")
    return _area_weights(frame.shape[0], size[0]) @ (frame @ GREY) @ _area_weights(frame.shape[1], size[1]).T


def pixel_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`pixel_mse` of A.8: mean squared difference of (P, h, w) thumbnails."""
    return ((a - b) ** 2).mean(axis=(1, 2))


def partial_spearman(feature: np.ndarray, pose: np.ndarray, pixel: np.ndarray, axis: int = -1) -> np.ndarray | float:
    """Eq. (4): correlation of ranked feature and ranked pose distance, each residualised on ranked pixel distance.

    Args:
        feature, pose, pixel: distances of the same shape, pairs along `axis`; ties share their mean rank.
    Returns:
        in [-1, 1]; nan where a distance is constant or fully determined by the pixel distance.
    """
    feature, pose = residual_ranks(feature, pose, pixel, axis)
    norm = np.sqrt((feature**2).sum(axis=axis) * (pose**2).sum(axis=axis))
    return (feature * pose).sum(axis=axis) / norm


def residual_ranks(
    feature: np.ndarray, pose: np.ndarray, pixel: np.ndarray, axis: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the ranks of feature and pose distances where those of pixel distances do not explain them.

    Returns:
        both around 0, in ranks; nan where a distance is constant or fully determined by the pixel distance.
    """
    ranks = [rankdata(x, axis=axis) for x in (feature, pose, pixel)]
    feature, pose, pixel = (rank - rank.mean(axis=axis, keepdims=True) for rank in ranks)

    def residual(x: np.ndarray) -> np.ndarray:
        power = (pixel**2).sum(axis=axis, keepdims=True)
        slope = (x * pixel).sum(axis=axis, keepdims=True) / np.where(power > 0, power, 1)
        rest = x - slope * pixel
        left = (rest**2).sum(axis=axis, keepdims=True) > 1e-12 * (x**2).sum(axis=axis, keepdims=True)
        return np.where(left, rest, np.nan)  # what is left of a dependent x is rounding

    return residual(feature), residual(pose)


def _estimate(feature: np.ndarray, pose: np.ndarray, pixel: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Score with its percentile bootstrap interval over pairs (ranks are taken anew in every resample)."""
    value = float(partial_spearman(feature, pose, pixel))
    if not np.isfinite(value):
        raise UserError(
            "the alignment score is undefined: a distance is constant over all pairs or follows from the pixels alone; "
            "check that features and poses vary and belong to these frames"
        )
    interval = bootstrap(
        (feature, pose, pixel),
        partial_spearman,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=50,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), n=len(feature))


def _area_weights(source: int, target: int) -> np.ndarray:
    """(target, source) matrix that averages `source` pixels into `target` equal intervals."""
    edges = np.linspace(0, source, target + 1)
    pixels = np.arange(source)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(covered, 0, None) * target / source
