"""Image augmentation on uint8 batches, one draw per sample shared by all images of that sample.

o_t and o_{t+H} must move together, or the inverse dynamics head would be shown camera motion that no action caused
(design: Data; the reference draws a shift per frame, fact sheet §3.6, which we take for an oversight).

The colour operations are TensorFlow's, as in the RLDS pipeline that OpenVLA and SpatialVLA train with (§1.2), and in
its order: crop, brightness, contrast, saturation, hue.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.config import AugmentConfig


def augment(images: list[Tensor], camera: str, cfg: AugmentConfig) -> list[Tensor]:
    """All that `cfg` asks for, on one camera's frames: uint8 (B, 3, H, W) each; sample b of each is treated alike."""
    if pixels := cfg.shift.get(camera, 0):
        images = random_shift(images, pixels)
    area, degrees = cfg.crop.get(camera, 1.0), cfg.rotation.get(camera, 0.0)
    if area < 1 or degrees:
        images = random_crop_rotate(images, area, degrees)
    if cfg.brightness:
        images = random_brightness(images, cfg.brightness)
    if cfg.brightness_delta or cfg.contrast or cfg.saturation or cfg.hue:
        images = random_color(images, cfg.brightness_delta, cfg.contrast, cfg.saturation, cfg.hue)
    return images


def random_shift(images: list[Tensor], pixels: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Shift each sample by integers in ±pixels, replicating the border: pad-and-crop of fact sheet §3.6.

    Args:
        images: tensors (B, 3, H, W) of one camera; sample b of each gets the same shift.
    """
    batch, _, height, width = images[0].shape
    device = images[0].device
    shift = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) + shift[0]).clamp(0, height - 1)
    cols = (torch.arange(width, device=device) + shift[1]).clamp(0, width - 1)
    rows = rows[:, None, :, None].expand(-1, 3, -1, width)
    cols = cols[:, None, None, :].expand(-1, 3, height, -1)
    return [image.gather(2, rows).gather(3, cols) for image in images]


def random_crop_rotate(images: list[Tensor], area: float, degrees: float) -> list[Tensor]:
    """Crop a square-proportioned window of `area` of the image, turn it by up to ±degrees, resize back (bilinear).

    Corner-aligned sampling, as tf.image.crop_and_resize does it; what a rotation brings in from outside is black.
    """
    batch, device = len(images[0]), images[0].device
    side = math.sqrt(area)
    centre = (2 * torch.rand(batch, 2, device=device) - 1) * (1 - side)
    angle = (2 * torch.rand(batch, device=device) - 1) * math.radians(degrees)
    cos, sin = side * angle.cos(), side * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, centre[:, 0]], 1), torch.stack([sin, cos, centre[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images[0].shape), align_corners=True)
    return [_uint8(F.grid_sample(image.float(), grid, align_corners=True)) for image in images]


def centre_crop(image: Tensor, area: float) -> Tensor:
    """The middle `area` of uint8 (B, 3, H, W), resized back: what a policy trained on random crops is shown (§1.2)."""
    side = math.sqrt(area)
    theta = torch.tensor([[side, 0, 0], [0, side, 0]], device=image.device).expand(len(image), 2, 3)
    return _uint8(
        F.grid_sample(image.float(), F.affine_grid(theta, list(image.shape), align_corners=True), align_corners=True)
    )


def random_brightness(images: list[Tensor], strength: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Multiply each sample by one factor in 1 ± strength; uint8 in, uint8 out."""
    batch = images[0].shape[0]
    draw = torch.rand(batch, 1, 1, 1, generator=generator, device=images[0].device)
    factor = 1 + strength * (2 * draw - 1)
    return [_uint8(image * factor) for image in images]


def random_color(images: list[Tensor], brightness: float, contrast: float, saturation: float, hue: float):
    """Add ±brightness (of 1), stretch contrast by 1 ± contrast about each channel's mean, then move in HSV."""
    shape, device = (4, len(images[0]), 1, 1, 1), images[0].device
    draw = 2 * torch.rand(shape, device=device) - 1
    return [
        _uint8(255 * adjust_color(image.float() / 255, draw[0] * brightness, 1 + draw[1] * contrast,
                                  1 + draw[2] * saturation, draw[3] * hue))
        for image in images
    ]  # fmt: skip


def adjust_color(image: Tensor, delta: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Image (B, 3, H, W) in [0, 1]; the others (B, 1, 1, 1); clipped to [0, 1] after every operation."""
    image = (image + delta).clamp(0, 1)
    mean = image.mean((2, 3), keepdim=True)
    image = ((image - mean) * contrast + mean).clamp(0, 1)
    h, s, v = rgb_to_hsv(image)
    return hsv_to_rgb((h + hue.squeeze(1)) % 1, (s * saturation.squeeze(1)).clamp(0, 1), v)


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] → hue, saturation, value, each (B, H, W) in [0, 1]."""
    r, g, b = image.unbind(1)
    value, low = image.amax(1), image.amin(1)
    span = value - low
    safe = span.clamp(min=1e-12)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    saturation = torch.where(value > 0, span / value.clamp(min=1e-12), torch.zeros_like(value))
    return torch.where(span > 0, hue / 6 % 1, torch.zeros_like(hue)), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv`: (B, 3, H, W)."""
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue * 6) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _uint8(image: Tensor) -> Tensor:
    return image.round_().clamp_(0, 255).to(torch.uint8)
