"""Image augmentation on uint8 batches, one draw per sample shared by all images of that sample.

o_t and o_{t+H} must move together, or the inverse dynamics head would be shown camera motion that no action caused
(design: Data; the reference draws a shift per frame, fact sheet §3.6, which we take for an oversight).
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def random_brightness(images: list[Tensor], strength: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Multiply each sample by one factor in 1 ± strength; uint8 in, uint8 out."""
    batch = images[0].shape[0]
    draw = torch.rand(batch, 1, 1, 1, generator=generator, device=images[0].device)
    factor = 1 + strength * (2 * draw - 1)
    return [(image * factor).round_().clamp_(0, 255).to(torch.uint8) for image in images]
