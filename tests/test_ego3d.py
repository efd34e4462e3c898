"""The egocentric 3D encoding against the fact sheet (§5.2, §10, §14) and plain loops written here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

from vla.ego3d import Ego3D, encode_points, estimate_depth, metric_depth, patch_points, scaled_intrinsics

INTRINSICS = dict(fx=623.588, fy=623.588, cx=319.501, cy=239.545, width=640, height=480)


def test_intrinsics_scale_per_axis():
    """§10."""
    np.testing.assert_allclose(scaled_intrinsics(INTRINSICS, 224), [218.2558, 291.0077, 111.8254, 111.7877], atol=1e-4)


def test_constant_depth_is_a_plane():
    """§14.3: z is the depth, x grows linearly with the column, y with the row."""
    ego = Ego3D(INTRINSICS, 224, 14, 8)
    points = patch_points(torch.full((1, 224, 224), 2.5), ego.rays, 16)
    assert points.shape == (1, 256, 12)
    points = points.reshape(16, 16, 2, 2, 3)  # patch row, patch column, row, column within
    torch.testing.assert_close(points[..., 2], torch.full((16, 16, 2, 2), 2.5))
    x = points[..., 0].permute(0, 2, 1, 3).reshape(32, 32)
    y = points[..., 1].permute(0, 2, 1, 3).reshape(32, 32)
    steps = torch.arange(32)
    torch.testing.assert_close(x, ((7 * steps + 3.5 - 111.82535) * 2.5 / 218.2558).expand(32, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(y, ((7 * steps + 3.5 - 111.78767) * 2.5 / 291.0077)[:, None].expand(32, 32), atol=1e-5,
                               rtol=0)  # fmt: skip


def test_points_of_any_depth_by_loops():
    ego = Ego3D(INTRINSICS, 56, 14, 8)
    depth = torch.rand(2, 56, 56, generator=torch.Generator().manual_seed(0)) * 4
    points = patch_points(depth, ego.rays, 4)
    camera = np.array([[623.588 * 56 / 640, 0, 319.501 * 56 / 640], [0, 623.588 * 56 / 480, 239.545 * 56 / 480],
                       [0, 0, 1]])  # fmt: skip
    inverse = np.linalg.inv(camera)
    for b in range(2):
        for patch in range(16):
            expected = []
            for sub_row in range(2):
                for sub_col in range(2):
                    row, col = patch // 4 * 14 + sub_row * 7, patch % 4 * 14 + sub_col * 7
                    mean = depth[b, row : row + 7, col : col + 7].mean().item()
                    expected += list(inverse @ [col + 3.5, row + 3.5, 1] * mean)
            np.testing.assert_allclose(points[b, patch], expected, atol=1e-4)


def test_encoding_is_204_numbers_in_the_sheets_order():
    points = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0)) * 2
    encoded = encode_points(points)
    assert encoded.shape == (1, 3, 204)
    expected = []
    for index, coordinate in enumerate(points[0, 1].tolist()):
        x = (coordinate - (0, 0, 2)[index % 3]) / 2
        expected += [x, *(math.sin(2**k * x) for k in range(8)), *(math.cos(2**k * x) for k in range(8))]
    np.testing.assert_allclose(encoded[0, 1], expected, atol=2e-5)


def test_mlp_starts_small():
    """Xavier with gain 0.01 (§5.2): |w| ≤ 0.01·√(6/(in + out))."""
    ego = Ego3D(INTRINSICS, 224, 14, 64)
    linear, norm, _relu, out = ego.mlp
    assert isinstance(norm, nn.LayerNorm) and (linear.in_features, out.in_features, out.out_features) == (204, 64, 64)
    for layer in (linear, out):
        bound = 0.01 * math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert "rays" not in ego.state_dict()


def cubic(x: float) -> float:
    """Keys' kernel with a = −0.75, PyTorch's."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """A square image resized with its corners aligned, the border repeated."""
    weights = np.zeros((size, len(image)))
    for target in range(size):
        source = target * (len(image) - 1) / (size - 1)
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[target, min(max(tap, 0), len(image) - 1)] += cubic(source - tap)
    return weights @ image @ weights.T


def test_depth_is_padded_resized_and_cut_as_the_reference_does():
    """Reflect-padding, bicubic to ZoeDepth's size, (x − 0.5)/0.5; bicubic back and the margin cut off (§5.2.1)."""
    seen = {}

    def model(pixels):
        seen["pixels"] = pixels
        return SimpleNamespace(predicted_depth=pixels.mean(1)[:, ::2, ::2] + 3, domain_logits=None)

    model.config, model.dtype = SimpleNamespace(backbone_config=SimpleNamespace(image_size=40)), torch.float32
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    depth = estimate_depth(model, frames)
    margin = 12  # int(√(32/2) · 3)
    for b in range(2):
        inner = []
        for channel in range(3):
            padded = np.pad(frames[b, channel].numpy() / 255, margin, mode="reflect")
            inner.append((bicubic(padded, 40) - 0.5) / 0.5)
        np.testing.assert_allclose(seen["pixels"][b], np.stack(inner), atol=1e-4)
        back = bicubic(np.mean(inner, 0)[::2, ::2] + 3, 32 + 2 * margin)
        np.testing.assert_allclose(depth[b], back[margin:-margin, margin:-margin], atol=1e-4)


@pytest.mark.parametrize(("size", "margin"), [(224, 31), (56, 15)])
def test_margin(size, margin):
    """31 pixels at 224 (§5.2)."""
    shapes = []

    def model(pixels):
        shapes.append(pixels.shape)
        return SimpleNamespace(predicted_depth=torch.ones(1, 8, 8), domain_logits=None)

    model.config, model.dtype = SimpleNamespace(backbone_config=SimpleNamespace(image_size=size + 2 * margin)), None
    model.dtype = torch.float32
    frames = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    assert estimate_depth(model, frames).shape == (1, size, size)
    assert shapes == [(1, 3, size + 2 * margin, size + 2 * margin)]


def zoedepth(heads: int) -> ZoeDepthForDepthEstimation:
    """Random weights large enough for the depth to depend on the image."""
    bins = [dict(name=str(i), n_bins=8, min_depth=0.001, max_depth=10.0 * (i + 1)) for i in range(heads)]
    backbone = BeitConfig(
        image_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        use_relative_position_bias=True, reshape_hidden_states=False, out_features=[f"stage{i}" for i in range(1, 5)],
    )  # fmt: skip
    config = ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, bottleneck_features=8,
        num_relative_features=8, bin_embedding_dim=8, num_attractors=[8, 4, 2, 1], bin_configurations=bins,
        num_patch_transformer_layers=4, patch_transformer_hidden_size=128, patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ZoeDepthForDepthEstimation(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_every_image_chooses_its_own_metric_head():
    """In a batch as alone; transformers' own batch goes through one head."""
    model = zoedepth(2)
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bias = model(pixels).domain_logits.median(0).values  # so that both heads are chosen
    model.metric_head.mlp_classifier.linear2.bias.data -= bias
    chosen = model(pixels).domain_logits.argmax(-1)
    assert set(chosen.tolist()) == {0, 1}
    alone = torch.cat([model(image[None]).predicted_depth for image in pixels])
    torch.testing.assert_close(metric_depth(model, pixels), alone, atol=1e-4, rtol=0)
    outvoted = chosen != model(pixels).domain_logits.sum(0).argmax()
    assert outvoted.any() and torch.equal((model(pixels).predicted_depth - alone).abs().amax((1, 2)) > 5e-3, outvoted)
    one = zoedepth(1)
    torch.testing.assert_close(metric_depth(one, pixels), one(pixels).predicted_depth)
