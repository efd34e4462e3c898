"""Egocentric 3D position encoding: where in space each image patch is, from estimated depth (fact sheet §5.2).

ZoeDepth gives metric depth, a pinhole camera turns it into 2 × 2 points per patch, sines and cosines of their
coordinates go through an MLP whose output is added to the vision encoder's tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

from vla.errors import UserError
from vla.policy import sent

POINTS = 2
"""Sample points per side of a patch."""
FREQUENCIES = 8
CENTRE = (0.0, 0.0, 2.0)
"""Of the space the encoding spans, in metres in the camera's frame: x and y in ±2, z in 0 … 4."""


class Ego3D(nn.Module):
    """Depth (B, s, s) in metres → position embeddings (B, patches, width).

    Args:
        intrinsics: fx, fy, cx and cy in pixels of a `width` × `height` image, whatever the frames' own size.
        image_size: s, the side that images of that size are resized to.
        patch_size: side of a patch, in pixels of the resized image.
    """

    def __init__(self, intrinsics: dict[str, float], image_size: int, patch_size: int, width: int):
        super().__init__()
        self.grid = image_size // patch_size
        encoded = POINTS**2 * 3 * (1 + 2 * FREQUENCIES)
        self.mlp = nn.Sequential(nn.Linear(encoded, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(layer.weight, gain=0.01)
        rays = camera_rays(scaled_intrinsics(intrinsics, image_size), self.grid * POINTS, patch_size / POINTS)
        self.register_buffer("rays", rays, persistent=False)

    def forward(self, depth: Tensor) -> Tensor:
        return self.mlp(encode_points(patch_points(depth.float(), self.rays, self.grid)).to(self.mlp[0].weight.dtype))


def scaled_intrinsics(intrinsics: dict[str, float], size: int) -> tuple[float, float, float, float]:
    """(fx, fy, cx, cy) after the image was resized to `size` × `size`, each axis by its own factor."""
    x, y = size / intrinsics["width"], size / intrinsics["height"]
    return intrinsics["fx"] * x, intrinsics["fy"] * y, intrinsics["cx"] * x, intrinsics["cy"] * y


def camera_rays(intrinsics: tuple[float, float, float, float], points: int, stride: float) -> Tensor:
    """K⁻¹ [u, v, 1] (3, points, points) at pixel centres `stride` apart; a point is its ray times its depth."""
    fx, fy, cx, cy = intrinsics
    pixels = (torch.arange(points, dtype=torch.float32) + 0.5) * stride
    x = ((pixels - cx) / fx).expand(points, points)
    y = ((pixels - cy) / fy)[:, None].expand(points, points)
    return torch.stack([x, y, torch.ones_like(x)])


def patch_points(depth: Tensor, rays: Tensor, grid: int) -> Tensor:
    """(B, grid², 12): a patch's 2 × 2 points row by row, x, y and z of each, from depth (B, s, s) averaged there."""
    averaged = F.interpolate(depth[:, None], size=rays.shape[1:], mode="area")
    points = (rays * averaged).unflatten(3, (grid, POINTS)).unflatten(2, (grid, POINTS))
    return points.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def encode_points(points: Tensor) -> Tensor:
    """(B, P, 12) → (B, P, 204): of every coordinate itself, then sin(2ᵏx) and cos(2ᵏx), k = 0 … 7 (NeRF's encoding)."""
    centre = sent(CENTRE, points.device).repeat(points.shape[-1] // 3)
    scaled = ((points - centre) / 2)[..., None]
    angles = scaled * 2.0 ** torch.arange(FREQUENCIES, device=points.device)
    return torch.cat([scaled, angles.sin(), angles.cos()], dim=-1).flatten(2)


@torch.no_grad()
def estimate_depth(model: ZoeDepthForDepthEstimation, frames: Tensor) -> Tensor:
    """Metric depth float32 (B, s, s) of uint8 frames (B, 3, s, s): ZoeDepth on the reflect-padded, enlarged frame."""
    size, margin = frames.shape[-1], int((frames.shape[-1] / 2) ** 0.5 * 3)
    pixels = F.pad(frames.float() / 255, (margin,) * 4, mode="reflect")
    inner = model.config.backbone_config.image_size
    pixels = F.interpolate(pixels, size=(inner, inner), mode="bicubic", align_corners=True)
    depth = metric_depth(model, ((pixels - 0.5) / 0.5).to(model.dtype)).float()
    padded = (size + 2 * margin,) * 2
    depth = F.interpolate(depth[:, None], size=padded, mode="bicubic", align_corners=True)[:, 0]
    return depth[:, margin:-margin, margin:-margin]


def metric_depth(model: ZoeDepthForDepthEstimation, pixels: Tensor) -> Tensor:
    """ZoeDepth's (B, h, w), each image through the metric head that its own classifier chooses (indoor or outdoor).

    transformers' model lets the batch vote and sends all of it through one head: then an image's depth, and with it the
    policy's actions, would depend on what else is in the batch.
    """
    output = model(pixels)
    depth = output.predicted_depth
    if output.domain_logits is None:
        return depth
    chosen = output.domain_logits.argmax(-1)
    heads = chosen.unique()
    if len(heads) > 1:
        depth = depth.clone()
        for head in heads:
            depth[chosen == head] = model(pixels[chosen == head]).predicted_depth
    return depth


def random_depth(config: dict) -> ZoeDepthForDepthEstimation:
    backbone = {key: value for key, value in config["backbone_config"].items() if key != "model_type"}
    return ZoeDepthForDepthEstimation(ZoeDepthConfig(**config | {"backbone_config": BeitConfig(**backbone)}))


def load_depth(pretrained: str) -> ZoeDepthForDepthEstimation:
    try:
        return ZoeDepthForDepthEstimation.from_pretrained(pretrained, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"policy.pretrained_depth={pretrained} cannot be loaded: {error}") from error
