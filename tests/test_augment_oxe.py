"""The OXE augmentation (fact sheet §1.2): colour against Python's colorsys, crop against a plain bilinear sampler."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from data import augment as module
from data.augment import adjust_color, augment, centre_crop, hsv_to_rgb, random_color, random_crop_rotate, rgb_to_hsv
from vla.cli import compose_config
from vla.config import AugmentConfig

OXE = AugmentConfig(crop={"static": 0.9}, brightness_delta=0.2, contrast=0.2, saturation=0.2, hue=0.05)


def frames(count: int = 2, size: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def corner_cases() -> torch.Tensor:
    """(1, 3, 1, N): primaries, greys, ties and random colours."""
    rng = np.random.default_rng(0)
    fixed = [(r, g, b) for r in (0, 0.5, 1) for g in (0, 0.5, 1) for b in (0, 0.5, 1)]
    return torch.tensor(np.concatenate([fixed, rng.random((200, 3))]), dtype=torch.float32).T[None, :, None]


def test_hsv_is_colorsys():
    image = corner_cases()
    h, s, v = rgb_to_hsv(image)
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in image[0, :, 0].T.tolist()]
    np.testing.assert_allclose(torch.stack([h, s, v], -1).reshape(-1, 3), expected, atol=1e-5)
    hues = torch.linspace(0, 0.999, 61).expand(1, 1, 61)
    for saturation, value in [(1.0, 1.0), (0.3, 0.7), (0.0, 0.5)]:
        rgb = hsv_to_rgb(hues, torch.full_like(hues, saturation), torch.full_like(hues, value))
        expected = [colorsys.hsv_to_rgb(hue, saturation, value) for hue in hues.flatten().tolist()]
        np.testing.assert_allclose(rgb[0, :, 0].T, expected, atol=1e-5)
    torch.testing.assert_close(hsv_to_rgb(h, s, v), image, atol=1e-5, rtol=0)


def naive_color(image: np.ndarray, delta: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Brightness, contrast, saturation, hue on (3, H, W) in [0, 1], clipped after each, one pixel after the other."""
    image = np.clip(image + delta, 0, 1)
    for channel in range(3):
        mean = image[channel].mean()
        image[channel] = np.clip((image[channel] - mean) * contrast + mean, 0, 1)
    out = np.empty_like(image)
    for row in range(image.shape[1]):
        for col in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, row, col])
            rgb = colorsys.hsv_to_rgb(h, min(s * saturation, 1), v)
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            out[:, row, col] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    return out


@pytest.mark.parametrize("factors", [(0.2, 1.2, 1.2, 0.05), (-0.2, 0.8, 0.8, -0.05), (0.1, 1.1, 0.9, 0.03)])
def test_colour_equals_a_loop_over_pixels(factors):
    image = frames(2).float() / 255
    got = adjust_color(image, *(torch.full((2, 1, 1, 1), value) for value in factors))
    for b in range(2):
        np.testing.assert_allclose(got[b], naive_color(image[b].double().numpy(), *factors), atol=2e-5)


def naive_crop(image: np.ndarray, top: float, left: float, side: float) -> np.ndarray:
    """tf.image.crop_and_resize of the box [top, left, top + side, left + side], of 1, to the image's own size."""
    size = image.shape[-1]
    out = np.empty(image.shape)
    for row in range(size):
        for col in range(size):
            y = top * (size - 1) + row * side * (size - 1) / (size - 1)
            x = left * (size - 1) + col * side * (size - 1) / (size - 1)
            y0, x0 = min(math.floor(y), size - 2), min(math.floor(x), size - 2)
            a, b = y - y0, x - x0
            out[:, row, col] = (
                (1 - a) * (1 - b) * image[:, y0, x0] + (1 - a) * b * image[:, y0, x0 + 1]
                + a * (1 - b) * image[:, y0 + 1, x0] + a * b * image[:, y0 + 1, x0 + 1]
            )  # fmt: skip
    return out


@pytest.mark.parametrize("draw", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
def test_crop_equals_a_plain_corner_aligned_sampler(monkeypatch, draw):
    """`draw` of the way from the top-left corner's box to the bottom-right one's: (x, y)."""
    side, free = math.sqrt(0.9), 1 - math.sqrt(0.9)
    draws = iter([torch.tensor([draw, draw]), torch.full((2,), 0.5)])
    monkeypatch.setattr(module.torch, "rand", lambda *_, **__: next(draws))
    (got,) = random_crop_rotate([frames(2)], 0.9, 0.0)
    for b in range(2):
        expected = naive_crop(frames(2)[b].numpy().astype(float), draw[1] * free, draw[0] * free, side)
        assert np.abs(got[b].numpy() - expected).max() <= 0.51  # rounded to a grey level


def test_centre_crop_is_the_middle_box():
    free = 1 - math.sqrt(0.9)
    expected = naive_crop(frames(1)[0].numpy().astype(float), free / 2, free / 2, 1 - free)
    assert np.abs(centre_crop(frames(1), 0.9)[0].numpy() - expected).max() <= 0.51


def test_rotation_turns_about_the_middle(monkeypatch):
    """The largest draw of ±90° is a quarter turn, of ±45° leaves the corners black."""

    def turned(degrees: float) -> np.ndarray:
        draws = iter([torch.full((1, 2), 0.5), torch.ones(1)])
        monkeypatch.setattr(module.torch, "rand", lambda *_, **__: next(draws))
        return random_crop_rotate([frames(1)], 1.0, degrees)[0][0].numpy()

    np.testing.assert_array_equal(turned(90), np.rot90(frames(1)[0].numpy(), axes=(1, 2)))
    assert not turned(45)[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert (turned(45)[:, 4, 4] == frames(1)[0, :, 4, 4].numpy()).all()


def test_both_frames_of_a_pair_get_the_same_draw():
    torch.manual_seed(0)
    image = frames(8, 16)
    first, second = augment([image, image.clone()], "static", OXE)
    assert torch.equal(first, second) and first.dtype == torch.uint8
    assert not torch.equal(first, augment([image], "static", OXE)[0])
    distinct = augment([image[:1].expand(8, -1, -1, -1)], "static", OXE)[0]
    assert len({sample.numpy().tobytes() for sample in distinct}) == 8  # each sample of a batch has its own


def test_draws_span_the_sheets_ranges(monkeypatch):
    """Brightness ±0.2, contrast and saturation U(0.8, 1.2), hue ±0.05; boxes anywhere inside the image."""
    seen = {}

    def record(image, *factors):
        seen["factors"] = torch.stack(factors)[..., 0, 0, 0]
        return image

    monkeypatch.setattr(module, "adjust_color", record)
    torch.manual_seed(0)
    random_color([torch.zeros(4000, 3, 1, 1, dtype=torch.uint8)], 0.2, 0.2, 0.2, 0.05)
    low, high = seen["factors"].amin(1), seen["factors"].amax(1)
    np.testing.assert_allclose(low, [-0.2, 0.8, 0.8, -0.05], atol=2e-3)
    np.testing.assert_allclose(high, [0.2, 1.2, 1.2, 0.05], atol=2e-3)
    assert torch.corrcoef(seen["factors"]).fill_diagonal_(0).abs().max() < 0.06
    ramp = torch.linspace(0, 252, 64).expand(1000, 3, 64, 64)
    (cropped,) = random_crop_rotate([ramp.to(torch.uint8)], 0.9, 0.0)
    left, right = cropped[:, 0, 32, 0].float() / 252, cropped[:, 0, 32, -1].float() / 252
    np.testing.assert_allclose((right - left).mean(), math.sqrt(0.9), atol=5e-3)  # the box's side, not its area
    np.testing.assert_allclose([left.min(), left.max()], [0, 1 - math.sqrt(0.9)], atol=8e-3)


def test_spatialvlas_augmentation_is_this_one():
    cfg = compose_config("train", "baseline=spatialvla", "size=full").augment
    assert cfg == OXE


def test_nothing_asked_for_changes_nothing():
    image = frames()
    assert augment([image], "static", AugmentConfig())[0] is image
    (other,) = augment([image], "wrist", AugmentConfig(crop={"static": 0.9}))
    assert other is image
