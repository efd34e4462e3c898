"""Vision towers of the Qwen3-VL baselines: the model's own, and a small convolutional one for the laptop.

Both take uint8 frames and return VisualTokens, so the policy behind them does not know which it has.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, eager_attention_forward
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vla.errors import UserError
from vla.policy import VisualTokens, resize, sent


def attend_by_frame(attend, module, query, key, value, *, frames: int, **kwargs) -> tuple[Tensor, None]:
    """Attention of each frame's patches among themselves, frames of one size in one call.

    transformers packs all patches into one sequence and, without flash attention, attends frame after frame, each
    layer asking the device for their lengths.

    Args:
        attend: attention of a batch, as transformers has it.
        query, key, value: (1, heads, frames · patches, width).
    """
    one_each = [t[0].unflatten(1, (frames, -1)).transpose(0, 1) for t in (query, key, value)]
    return attend(module, *one_each, **kwargs)[0].flatten(0, 1)[None], None


BY_FRAME = {"sdpa": "by_frame_sdpa", "eager": "by_frame_eager"}
ALL_ATTENTION_FUNCTIONS.register(BY_FRAME["sdpa"], partial(attend_by_frame, sdpa_attention_forward))
ALL_ATTENTION_FUNCTIONS.register(BY_FRAME["eager"], partial(attend_by_frame, eager_attention_forward))


def parse_tap(tap: str, depth: int) -> int | str:
    """The tap "pre_projector" or "post_projector" as it is, "layer:k" as the block index k in 0 … depth-1."""
    if tap in ("pre_projector", "post_projector"):
        return tap
    kind, _, index = tap.partition(":")
    if kind != "layer" or not index.isdigit() or int(index) >= depth:
        raise UserError(
            f"inverse_dynamics.tap={tap} is not known; "
            f"choose pre_projector, post_projector or layer:0 … layer:{depth - 1}"
        )
    return int(index)


class QwenVision(nn.Module):
    """Qwen3-VL's vision tower on the reference's image path (fact sheet §3.2).

    The 224 × 224 frame is upsampled to `vision_size` = 448, because the reference's processor asks for at least 200 704
    pixels: grid (1, 28, 28), 784 patches, 196 merged tokens. Taps: pre_projector = last block before the merger
    (784 tokens, in 2 × 2 blocks, not raster order), post_projector = merged tokens, layer:k = output of block k.
    """

    def __init__(
        self, config: Qwen3VLVisionConfig, vision_size: int, tap: str, model: Qwen3VLVisionModel | None = None
    ):
        super().__init__()
        self.model = Qwen3VLVisionModel(config) if model is None else model
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        self.temporal = config.temporal_patch_size
        if vision_size % (self.patch * self.merge):
            raise UserError(f"policy.vision_size={vision_size} must be a multiple of {self.patch * self.merge}")
        self.size, self.tap = vision_size, parse_tap(tap, config.depth)
        with torch.device("cpu"):  # of one frame, made once: made on the device, the host would wait for each of them
            grid = torch.tensor([[1, vision_size // self.patch, vision_size // self.patch]])
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid, self.model.num_grid_per_side, self.model.interpolation_mode,
                self.model.interpolation_align_corners, self.merge,
            )  # fmt: skip
            self.places = indices, weights, get_vision_position_ids(grid, self.merge)

    def set_attention(self, attention: str) -> None:
        """`attention`: transformers' name, as in VLM4VLA.build."""
        self.model.set_attn_implementation(BY_FRAME.get(attention, attention))

    def forward(self, frames: Tensor) -> VisualTokens:
        batch, patches = len(frames), len(self.places[0])
        by_frame = self.model.config._attn_implementation in BY_FRAME.values()
        step, where = (batch * patches, "cpu") if by_frame else (patches, frames.device)
        ends = torch.arange(0, batch * patches + 1, step, dtype=torch.int32, device=where)
        indices, weights, positions = (sent(of_one, frames.device).repeat(batch, 1) for of_one in self.places)
        output = self.model(
            self.patches(frames).to(self.model.dtype),
            grid_thw=None,
            interp_indices=indices,
            interp_weights=weights,
            position_ids=positions,
            cu_seqlens=ends,
            max_seqlen=patches,
            output_hidden_states=isinstance(self.tap, int),
            **({"frames": batch} if by_frame else {}),
        )
        embeds = output.pooler_output.unflatten(0, (batch, -1))
        taps = {"pre_projector": output.last_hidden_state, "post_projector": output.pooler_output}
        tap = taps[self.tap] if isinstance(self.tap, str) else output.hidden_states[self.tap + 1]
        deepstack = tuple(layer.unflatten(0, (batch, -1)) for layer in output.deepstack_features)
        return VisualTokens(embeds, tap.unflatten(0, (batch, -1)), deepstack)

    def patches(self, frames: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) → (B · patches, 3 · temporal · patch²), 2 × 2 blocks together, pixels in [-1, 1]."""
        if frames.shape[-1] != self.size:
            frames = resize(frames, (self.size, self.size))
        pixels = frames.float() / 127.5 - 1
        blocks, m, p = self.size // self.patch // self.merge, self.merge, self.patch
        pixels = pixels.reshape(-1, 3, blocks, m, p, blocks, m, p)
        pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, block row, block col, row, col, channel, y, x
        pixels = pixels.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.temporal, -1, -1)
        return pixels.reshape(-1, 3 * self.temporal * p * p)


class ConvTower(nn.Module):
    """A stride-4 and three stride-2 convolutions, two residual blocks: a 128 × 128 frame becomes 16 tokens.

    Stands in for the ViT at size `tiny` only: from random weights and within minutes a ViT learns no useful features
    (facts demo §2). Batch normalisation, because it learns twice as fast here as group normalisation or none (after 200
    steps 0.18 against 0.27 mean error of held-out actions); while training, a frame's tokens depend on its batch.
    Taps: pre_projector = tokens before the last projection, post_projector = after it.
    """

    def __init__(self, width: int, out_hidden_size: int, tap: str):
        super().__init__()
        stem: list[nn.Module] = []
        narrow = 3
        for wide, kernel, stride in ((width, 8, 4), (2 * width, 3, 2), (4 * width, 3, 2), (4 * width, 3, 2)):
            padding = (kernel - stride + 1) // 2
            stem += [nn.Conv2d(narrow, wide, kernel, stride, padding, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            narrow = wide
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.ModuleList(_Residual(narrow) for _ in range(2))
        self.projector = nn.Linear(narrow, out_hidden_size)
        self.position = nn.Parameter(torch.zeros(1, 16, out_hidden_size))
        self.tap = parse_tap(tap, len(self.blocks))

    def forward(self, frames: Tensor) -> VisualTokens:
        hidden = self.stem((frames.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
        layers = []
        for block in self.blocks:
            hidden = block(hidden)
            layers.append(hidden)
        before = hidden.flatten(2).transpose(1, 2)
        after = self.projector(before) + self.position
        if isinstance(self.tap, int):
            tap = layers[self.tap].flatten(2).transpose(1, 2)
        else:
            tap = before if self.tap == "pre_projector" else after
        return VisualTokens(after, tap)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden + self.body(hidden))
