"""Alignment (IDL A.8) against pandas, statsmodels and PIL; the ridge probe against augmented least squares."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla.analysis import alignment as al
from vla.analysis.probes import ridge_probe
from vla.errors import UserError


def naive_partial_spearman(feature, pose, pixel):
    ranks = pd.DataFrame({"feature": feature, "pose": pose, "pixel": pixel}).rank()
    control = sm.add_constant(ranks.pixel)
    residuals = [sm.OLS(ranks[name], control).fit().resid for name in ("feature", "pose")]
    return np.corrcoef(*residuals)[0, 1]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(10, 200), st.booleans())
def test_partial_spearman_equals_ols_on_ranks(seed, n, ties):
    rng = np.random.default_rng(seed)
    pixel = rng.normal(size=n)
    feature, pose = pixel + rng.normal(size=n), 0.5 * pixel + rng.normal(size=n)
    if ties:
        feature, pose, pixel = np.round(feature), np.round(pose), np.round(pixel)
    assert al.partial_spearman(feature, pose, pixel) == pytest.approx(
        naive_partial_spearman(feature, pose, pixel), abs=1e-9
    )


def test_partial_spearman_removes_what_pixels_explain():
    rng = np.random.default_rng(0)
    pixel = rng.normal(size=5000)
    feature, pose = pixel + rng.normal(size=5000), pixel + rng.normal(size=5000)
    assert abs(al.partial_spearman(feature, pose, pixel)) < 0.05
    assert al.partial_spearman(feature, np.exp(feature), pixel) == pytest.approx(1)
    assert np.isnan(al.partial_spearman(pixel, pose, pixel))


def test_distances_are_the_papers_formulas():
    rng = np.random.default_rng(1)
    a, b, sigma = rng.normal(size=(7, 6)), rng.normal(size=(7, 6)), rng.uniform(0.1, 2, size=6)
    for k in range(7):
        assert al.pose_distance(a, b, sigma)[k] == pytest.approx(sum(((a[k] - b[k]) / sigma) ** 2) ** 0.5)
        norm_a, norm_b = sum(a[k] ** 2) ** 0.5, sum(b[k] ** 2) ** 0.5
        assert al.cosine_distance(a, b)[k] == pytest.approx(1 - sum(a[k] * b[k]) / norm_a / norm_b)
        assert al.scale_distance(a, b)[k] == pytest.approx(abs(norm_a - norm_b))
    still = np.array([1, 1, 1, 1, 1, 0.0])
    assert al.pose_distance(np.ones((1, 6)), np.ones((1, 6)), still) == [0]


@pytest.mark.parametrize("shape", [(128, 128), (200, 200), (84, 90), (32, 32)])
def test_thumbnail_is_the_area_mean(shape):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    grey = (frame.astype(np.float64) @ [0.299, 0.587, 0.114]).astype(np.float32)
    expected = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BOX))
    if shape == (128, 128):
        np.testing.assert_allclose(al.thumbnail(frame), grey.reshape(32, 4, 32, 4).mean((1, 3)), rtol=1e-5)
        np.testing.assert_allclose(al.thumbnail(frame), expected, atol=1e-2)
    assert al.thumbnail(frame).mean() == pytest.approx(grey.mean(), rel=1e-5)  # area means keep the total
    flat = np.full_like(frame, 77)
    np.testing.assert_allclose(al.thumbnail(flat), 77)


def test_pixel_distance_is_the_mse_of_thumbnails():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 255, (2, 5, 32, 32))
    np.testing.assert_allclose(al.pixel_distance(a, b), [((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])


@settings(max_examples=50)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=6), st.integers(1, 80), st.integers(0, 99))
def test_sampled_pairs_lie_in_one_segment_and_are_distinct(lengths, per_gap, seed):
    ends = np.cumsum(lengths)
    segments = [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
    gaps = [gap for gap in (1, 2, 4, 8, 16, 32) if gap < max(lengths)]
    pairs = al.sample_pairs(segments, gaps, per_gap, np.random.default_rng(seed))
    assert len({tuple(pair) for pair in pairs}) == len(pairs)
    for gap in gaps:
        of_gap = [(i, j) for i, j in pairs.tolist() if j - i == gap]
        assert all(any(start <= i and j < end for start, end in segments) for i, j in of_gap)
        possible = sum(max(0, length - gap) for length in lengths)
        assert len(of_gap) == min(per_gap, possible)
    assert len(pairs) == sum((pairs[:, 1] - pairs[:, 0] == gap).sum() for gap in gaps)


def test_pairs_are_uniform_over_the_starts_of_a_gap():
    starts = np.concatenate(
        [al.sample_pairs([(0, 10), (10, 15)], [4], 2, np.random.default_rng(seed))[:, 0] for seed in range(2000)]
    )
    seen, counts = np.unique(starts, return_counts=True)
    assert seen.tolist() == [0, 1, 2, 3, 4, 5, 10]
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_gaps_longer_than_every_segment_are_named():
    with pytest.raises(UserError, match=r"\[16, 32\].*longest has 16"):
        al.sample_pairs([(0, 10), (10, 26)], (1, 8, 16, 32), 5, np.random.default_rng(0))


def episode_data(seed=0, n=240):
    rng = np.random.default_rng(seed)
    poses = np.cumsum(rng.normal(size=(n, 6)), axis=0)
    frames = rng.integers(0, 256, (n, 40, 48, 3), dtype=np.uint8)
    return poses, frames, [(start, start + 60) for start in range(0, n, 60)]


def test_alignment_equals_a_naive_computation_on_the_same_pairs():
    poses, frames, segments = episode_data()
    features = np.tanh(0.1 * poses @ np.random.default_rng(1).normal(size=(6, 16))) + 1
    result = al.alignment(features, poses, frames, segments, per_gap=100, seed=5)
    pairs = al.sample_pairs(segments, al.GAPS, 100, np.random.default_rng(5))
    small = [al.thumbnail(frame) for frame in frames]
    sigma = poses.std(axis=0)
    pose = [np.sqrt((((poses[i] - poses[j]) / sigma) ** 2).sum()) for i, j in pairs]
    pixel = [((small[i] - small[j]) ** 2).mean() for i, j in pairs]
    norm = np.linalg.norm
    scores = {
        "cosine": [1 - features[i] @ features[j] / norm(features[i]) / norm(features[j]) for i, j in pairs],
        "scale": [abs(norm(features[i]) - norm(features[j])) for i, j in pairs],
    }
    for name, feature in scores.items():
        estimate = asdict(result)[name]
        assert estimate["value"] == pytest.approx(naive_partial_spearman(feature, pose, pixel), abs=1e-9)
        assert estimate["low"] < estimate["value"] < estimate["high"]
        assert estimate["n"] == len(pairs)
    distances = [result.distances[name].astype(float) for name in ("cosine", "pose", "pixel")]
    assert {len(of) for of in result.distances.values()} == {600}
    assert al.partial_spearman(*distances) == pytest.approx(result.cosine.value, abs=1e-4)  # kept in float32: ties
    assert np.corrcoef(*al.residual_ranks(*distances))[0, 1] == pytest.approx(al.partial_spearman(*distances))
    assert result.pairs_per_gap == {1: 100, 2: 100, 4: 100, 8: 100, 16: 100, 32: 100}
    assert al.alignment(features, poses, frames, segments, per_gap=100, seed=5) == result


def test_alignment_tells_a_pose_encoder_from_noise_and_reports_fewer_pairs():
    poses, frames, segments = episode_data()
    noise = np.random.default_rng(2).normal(size=(len(poses), 32))
    aligned = al.alignment(np.c_[poses / poses.std(0), np.full((len(poses), 1), 9)], poses, frames, segments)
    assert aligned.cosine.low > 0.8
    assert abs(al.alignment(noise, poses, frames, segments).cosine.value) < 0.15
    assert aligned.pairs_per_gap == {1: 236, 2: 232, 4: 224, 8: 208, 16: 176, 32: 112}
    assert aligned.cosine.n == sum(aligned.pairs_per_gap.values())


def test_alignment_refuses_bad_input():
    poses, frames, segments = episode_data()
    features = np.random.default_rng(0).normal(size=(len(poses), 4))
    for bad, message in [
        ((features[1:], poses, frames, segments), "239"),
        ((features, poses[:, :3], frames, segments), "N, 6"),
        ((features, poses, frames, [(0, 241)]), r"\(0, 241\)"),
        ((np.ones_like(features), poses, frames, segments), "undefined"),
        ((np.zeros_like(features), poses, frames, segments), "zeros"),
        ((features, poses, frames[:, :20], segments), "thumbnail"),
    ]:
        with pytest.raises(UserError, match=message):
            al.alignment(*bad, per_gap=20)


def probe_data(noise, seed=0):
    rng = np.random.default_rng(seed)
    demonstrations = np.repeat(np.arange(10), 30)
    features = rng.normal(size=(300, 12)) * rng.uniform(0.1, 10, size=12) + 3
    states = np.c_[features @ rng.normal(size=(12, 3)) * 0.01, rng.normal(size=(300, 5))]
    return features, states + noise * rng.normal(size=states.shape), demonstrations < 7, demonstrations


def test_ridge_probe_equals_least_squares_on_the_augmented_system():
    features, states, train, demonstrations = probe_data(noise=0.01)
    result = ridge_probe(features, states, train, demonstrations, alpha=10.0)
    mean, deviation = features[train].mean(0), features[train].std(0)
    x, target = (features - mean) / deviation, states[:, :3]
    design = np.r_[np.c_[np.ones(train.sum()), x[train]], np.c_[np.zeros(12), np.sqrt(10.0) * np.eye(12)]]
    weights = np.linalg.lstsq(design, np.r_[target[train], np.zeros((12, 3))], rcond=None)[0]
    error = np.c_[np.ones((~train).sum()), x[~train]] @ weights - target[~train]
    assert result["mae_mm"]["value"] == pytest.approx(1000 * np.abs(error).mean(), rel=1e-9)
    held_out = target[~train]
    assert result["r2"] == pytest.approx(1 - (error**2).sum() / ((held_out - held_out.mean(0)) ** 2).sum())
    assert result["mae_mm"]["low"] < result["mae_mm"]["value"] < result["mae_mm"]["high"]
    assert (result["mae_mm"]["n"], result["frames"], result["train_frames"]) == (3, 90, 210)


def test_ridge_probe_error_grows_with_noise_and_a_constant_feature_is_harmless():
    features, states, train, demonstrations = probe_data(noise=0.0)
    clean = ridge_probe(np.c_[features, np.ones(300)], states, train, demonstrations, alpha=1e-6)
    noisy = ridge_probe(*probe_data(noise=0.02))
    assert clean["mae_mm"]["value"] < 1e-3 and clean["r2"] == pytest.approx(1)
    assert noisy["mae_mm"]["value"] == pytest.approx(20 * np.sqrt(2 / np.pi), rel=0.15)


def test_ridge_probe_refuses_bad_input():
    features, states, train, demonstrations = probe_data(noise=0.01)
    leaky = train.copy()
    leaky[-1] = True
    for bad, message in [
        ((features, states, leaky, demonstrations), "demonstration 9"),
        ((features, states, demonstrations < 9, demonstrations), "1 held-out"),
        ((features, states, demonstrations < 0, demonstrations), "0 training"),
        ((features[1:], states, train, demonstrations), "299"),
        ((np.full_like(features, np.nan), states, train, demonstrations), "finite"),
    ]:
        with pytest.raises(UserError, match=message):
            ridge_probe(*bad)
