"""The contract every baseline meets.

A policy turns images and an instruction into an action chunk. Its vision encoding is a separate call, so that the
training module can encode current and future frames in one pass and hand the same tokens to the policy's loss and to
the inverse dynamics head (design: The contract). The policy never sees the future frame and never knows of that head.

Adding a backbone: one file in vla/baselines/ with a class that fills in `encode_images`, `loss` and `predict`, one YAML
in conf/baseline/, and tests/test_contract.py passing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data.normalization import ActionNormalizer
from vla.errors import UserError

GRIPPER = 6
IGNORED = -100
"""Label that F.cross_entropy leaves out."""


@dataclass(frozen=True)
class VisualTokens:
    """What a vision encoder makes of one camera's frames.

    Attributes:
        embeds: (B, P, D) tokens that the policy's own decoder reads.
        tap: (B, P', C) tokens that inverse dynamics and the probes read.
        deepstack: further (B, P, D) tensors that some decoders add at deeper layers.
        frames: uint8 (B, 3, h, w), where the policy's own decoder needs them again (SpatialVLA's depth, and the frozen
            tower of a dual encoder; `Policy.fused` puts that one's features in).
    """

    embeds: Tensor
    tap: Tensor
    deepstack: tuple[Tensor, ...] = ()
    frames: Tensor | None = None

    def rows(self, rows: slice) -> VisualTokens:
        frames = None if self.frames is None else self.frames[rows]
        return VisualTokens(self.embeds[rows], self.tap[rows], tuple(layer[rows] for layer in self.deepstack), frames)


def sent(values: Any, device: torch.device) -> Tensor:
    """Host values as a tensor on `device`, whose work before it the host does not wait for, unlike torch.tensor's."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def of_cameras(tokens: VisualTokens, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
    """Each camera's part of the tokens of all `images`' frames, read in one pass one camera after another."""
    ends = itertools.accumulate(len(frames) for frames in images.values())
    return {c: tokens.rows(slice(end - len(images[c]), end)) for c, end in zip(images, ends, strict=True)}


class Policy(nn.Module):
    """A vision-language-action policy.

    Attributes:
        chunk: H, actions predicted at a time.
        cameras: names of the cameras it reads, in order.
        image_size: frames are resized to this before augmentation and encoding.
        tap: which visual tokens `VisualTokens.tap` holds: pre_projector, post_projector or layer:k (k = block index).
        normalizer: physical ↔ normalised actions.
        tokenizer: saved beside the weights.
        ensemble: temperature of the temporal ensembling its paper rolls it out with, None for none (vla/ensemble.py).
        dual: a frozen encoder stands beside the trained one (vla/dual_encoder.py).
        speaks: its language model is trained to say text (string actions, co-training).
        fast: it acts by this project's samplers and decoders where it has them, else as its reference does, which is
            slower and equal to rounding (scripts/bench.py latency compares the two).
        compiled_parts: methods that vla/compiled.py compiles.
    """

    tokenizer: PreTrainedTokenizerBase
    ensemble: float | None = None
    dual: bool = False
    speaks: bool = False
    fast: bool = True
    compiled_parts: ClassVar[tuple[str, ...]] = ("encode_images",)
    of_the_run: ClassVar[tuple[str, ...]] = ("chunk", "cameras", "tap")
    """Arguments of `build` that a run which starts from another policy's weights decides itself (init_from)."""

    def __init__(self, chunk: int, cameras: list[str], image_size: int, tap: str, normalizer: ActionNormalizer):
        super().__init__()
        self.chunk, self.cameras, self.image_size, self.tap = chunk, list(cameras), image_size, tap
        self.normalizer = normalizer

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        """Camera → visual tokens of each camera given: uint8 (B, 3, image_size, image_size) frames from `prepare`."""
        raise NotImplementedError

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """The baseline's own objective under "loss", and what it is made of under other names (scalars). Where the loss
        is a mean cross-entropy, "tokens" is over how many.

        `batch` is that of data/sampler.py; the future frames in it are not to be read, and what `actions` hold where
        `action_valid` is False does not matter.
        """
        raise NotImplementedError

    def predict(self, observation: dict) -> Tensor:
        """(B, H, 7) actions in physical units, gripper in {0, 1}, 1 = open.

        Args:
            observation: {"images": {camera: uint8 (B, 3, H, W)}, "state": (B, S), "instruction": list of B str}; in
                rollouts also "seed" and "step" (B,), from which a sampling policy draws its noise (vla/flow.py)
        """
        raise NotImplementedError

    @classmethod
    def build(cls, normalizer: ActionNormalizer, **arguments) -> Policy:
        """A policy from what a configuration holds; `tokenizer=` comes with an exported one."""
        raise NotImplementedError

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        raise NotImplementedError

    def fit_to(self, actions: Tensor) -> None:
        """What a fresh policy still has to learn of the training actions (N, 7), physical units (SpatialVLA's grid)."""

    def vision_modules(self) -> list[nn.Module]:
        """The modules behind the tap, so that a tap with nothing to train behind it can be refused."""
        raise NotImplementedError

    def make_dual(self) -> None:
        """Put a frozen copy of the vision encoder, as it is now, beside it; what the policy computes stays the same.

        Raises:
            UserError: the tap lies behind both encoders, where inverse dynamics would train on the frozen one too.
        """
        raise NotImplementedError

    def make_speaking(self, language_head: str) -> None:
        """Make all that saying text needs trainable. `language_head`: of VLM4VLA (vla/policy_configs.py).

        Raises:
            UserError: there is no language decoder.
        """
        raise UserError(
            f"{type(self).__name__} has no language decoder, which string actions and co-training need; "
            "choose baseline=openvla, pi0, vlm4vla or spatialvla"
        )

    def drop_action_head(self) -> None:
        """Take off what only the baseline's own actions need; a policy that speaks then says them as text."""
        raise NotImplementedError

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        """The tokens with the features of the frozen encoder in their `embeds`; as they are where there is none, or
        where they are in already."""
        return tokens

    def prepare(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize uint8 (B, 3, h, w) frames to the policy's size; the same call in training and in `predict`."""
        size = (self.image_size, self.image_size)
        return {
            camera: frames if frames.shape[-2:] == size else resize(frames, size)
            for camera, frames in images.items()
            if camera in self.cameras
        }

    def prepare_to_act(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Frames as `predict` encodes them: prepared and, for a policy trained on random crops, cut to the middle."""
        return self.prepare(images)

    @torch.no_grad()
    def tap_shape(self) -> tuple[int, int]:
        """(P', C) of one frame's tap."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=device)
        tokens = self.encode_images({camera: blank for camera in self.cameras})[self.cameras[0]].tap
        self.train(training)
        return tokens.shape[1], tokens.shape[2]


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, uint8 to uint8. On a CPU within one grey level of Pillow's; CUDA has no integer kernel."""
    if frames.device.type == "cpu":
        frames = frames.contiguous(memory_format=torch.channels_last)
        return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)
    frames = F.interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return frames.round_().clamp_(0, 255).to(torch.uint8)


def actions_from_normalized(motion: Tensor, gripper_open: Tensor, normalizer: ActionNormalizer) -> Tensor:
    """Physical (B, H, 7) from normalised motion (B, H, 6) and a boolean "open" (B, H)."""
    actions = torch.cat([motion.float(), gripper_open.float()[..., None]], dim=-1)
    return normalizer.unnormalize(actions)


def hold_last(actions: Tensor, valid: Tensor) -> Tensor:
    """Actions (B, H, 7) with every step that is not `valid` (B, H) replaced by the last valid one before it."""
    steps = torch.arange(actions.shape[1], device=actions.device)
    last = torch.where(valid, steps, torch.zeros_like(steps)).amax(1, keepdim=True)
    return actions.gather(1, torch.minimum(steps, last)[..., None].expand_as(actions))
