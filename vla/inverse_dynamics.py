"""Inverse dynamics on the vision encoder, with pseudo time reversal (IDL §3 and A.1).

From the visual tokens of o_t and o_{t+H} a light head predicts the action chunk between them. Its loss trains the
vision encoder and the head, nothing else; the head belongs to the training module and never reaches an exported policy.

The paper leaves open, and we choose (fact sheet §1.3): both MLPs are Linear, GELU, Linear; one head shared by all
cameras; targets normalised as the policy's; motion negated in physical units by default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.normalization import ActionNormalizer
from vla.policy import GRIPPER, VisualTokens, sent


class InverseDynamicsHead(nn.Module):
    """(Z_cur, Z_fut), each (B, P, C) → normalised motion and a gripper logit, (B, H, 7) (A.1)."""

    def __init__(self, tokens: int, channels: int, dim: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.fusion = nn.Sequential(nn.Linear(3 * channels, dim), nn.GELU(), nn.Linear(dim, dim))
        self.action = nn.Sequential(nn.Linear(tokens * dim, dim), nn.GELU(), nn.Linear(dim, chunk * 7))

    def forward(self, current: Tensor, future: Tensor) -> Tensor:
        fused = self.fusion(torch.cat([current, future, future - current], dim=-1))
        return self.action(fused.flatten(1)).unflatten(1, (self.chunk, 7))


def reverse_actions(actions: Tensor) -> Tensor:
    """a† of §3.2 for a chunk (…, H, 7): order reversed, the six motion offsets negated, the gripper kept."""
    sign = sent([-1.0] * GRIPPER + [1.0], actions.device).to(actions.dtype)
    return actions.flip(-2) * sign


def pseudo_time_reversal(current: Tensor, future: Tensor, actions: Tensor, reverse: Tensor):
    """Swap the pair and reverse the chunk where `reverse` (bool (B,)) holds; twice is the identity.

    The encoder sees each frame alone, so swapping its tokens is swapping the images.
    """
    swap = reverse[:, None, None]
    return (
        torch.where(swap, future, current),
        torch.where(swap, current, future),
        torch.where(swap, reverse_actions(actions), actions),
    )


class InverseDynamics(nn.Module):
    """The auxiliary objective: L_inv = L1(motion) + λ_g · BCE(gripper), averaged over cameras.

    Args:
        reverse_prob: p_rev, per sample; 0 is the "+ AUX" row.
        reverse_space: "physical" negates before normalising (q01 ≠ −q99 in general), "normalised" after.
        weight: λ_inv; applied by the module that owns this one.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        chunk: int,
        normalizer: ActionNormalizer,
        *,
        dim: int,
        weight: float,
        gripper_weight: float,
        reverse_prob: float,
        reverse_space: str,
    ):
        super().__init__()
        self.head = InverseDynamicsHead(tokens, channels, dim, chunk)
        self.normalizer, self.weight, self.gripper_weight = normalizer, weight, gripper_weight
        self.reverse_prob, self.reverse_space = reverse_prob, reverse_space

    def forward(
        self,
        current: dict[str, VisualTokens],
        future: dict[str, VisualTokens],
        actions: Tensor,
        valid: Tensor,
        reverse: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """L_inv under "inverse_loss", with its parts.

        Args:
            actions: (B, H, 7) physical units, gripper {0, 1}.
            valid: bool (B,); False where t+H runs past the episode: such a sample does not count.
            reverse: bool (B,), drawn with `reverse_prob` when not given.
        """
        if reverse is None:
            reverse = torch.rand(len(actions), device=actions.device) < self.reverse_prob
        if self.reverse_space == "normalised":
            actions = self.normalizer.normalize(actions)
        weight = valid.float() / valid.sum().clamp(min=1)
        motion_loss = gripper_loss = 0.0
        for camera in current:
            before, after, target = pseudo_time_reversal(current[camera].tap, future[camera].tap, actions, reverse)
            if self.reverse_space == "physical":
                target = self.normalizer.normalize(target)
            predicted = self.head(before, after).float()
            l1 = (predicted[..., :GRIPPER] - target[..., :GRIPPER]).abs().mean((1, 2))
            bce = F.binary_cross_entropy_with_logits(predicted[..., GRIPPER], target[..., GRIPPER], reduction="none")
            motion_loss = motion_loss + (l1 * weight).sum() / len(current)
            gripper_loss = gripper_loss + (bce.mean(1) * weight).sum() / len(current)
        loss = motion_loss + self.gripper_weight * gripper_loss
        return {"inverse_loss": loss, "inverse_l1": motion_loss, "inverse_bce": gripper_loss}
