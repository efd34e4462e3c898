"""The LightningModule: L = L_vla + λ_inv · L_inv (IDL §3.3), optimiser, schedule.

Everything random in a step (augmentation, reversal, noise, dropout) is drawn after seeding torch with (seed, step,
rank), so a step is a function of those three and the weights, and a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import hashlib

import lightning as L
import torch
from torch import Tensor

from data.augment import augment
from data.instructions import Rewording
from vla.co_training import CoTraining
from vla.config import AugmentConfig, OptimConfig
from vla.errors import UserError
from vla.inverse_dynamics import InverseDynamics
from vla.optim import make_optimizer, make_schedule
from vla.policy import Policy, VisualTokens


class VLAModule(L.LightningModule):
    """Trains `policy`; `inverse_dynamics` is None for the vanilla baseline and is never exported.

    Args:
        cotrain: of batches with vision-language data in them. rewording: training instructions in other words.
    """

    def __init__(
        self,
        policy: Policy,
        inverse_dynamics: InverseDynamics | None,
        optim: OptimConfig,
        augment: AugmentConfig,
        *,
        max_steps: int,
        warmup_steps: int,
        seed: int,
        cotrain: CoTraining | None = None,
        rewording: Rewording | None = None,
    ):
        super().__init__()
        self.policy, self.inverse_dynamics = policy, inverse_dynamics
        self.optim, self.augment, self.seed = optim, augment, seed
        self.max_steps, self.warmup_steps = max_steps, warmup_steps
        self.cotrain, self.rewording = cotrain, rewording

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        key = f"{self.seed}/{self.global_step}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        if not torch.isfinite(losses["total"]):
            raise UserError(
                f"the loss is {losses['total'].item()} at step {self.global_step}; nothing was saved after the last "
                "checkpoint. Lower optim.lr, or look for bad actions in the data, then resume=auto"
            )
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(batch["actions"])
        )
        return losses["total"]

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The policy's losses, those of questions and of inverse dynamics where there are, and "total" of them all."""
        frames = [self.policy.prepare(batch[name]) for name in ("images", "future_images") if name in batch]
        frames = self.augmented(frames)
        visual = self.policy.encode_images({camera: torch.cat([f[camera] for f in frames]) for camera in frames[0]})

        def rows(start: int, stop: int | None) -> dict[str, VisualTokens]:
            return {camera: tokens.rows(slice(start, stop)) for camera, tokens in visual.items()}

        if self.rewording is not None:
            batch = batch | {"instruction": self.rewording(batch["instruction"])}
        losses = self.policy.loss(batch, rows(0, len(batch["actions"])))
        tokens = losses.pop("tokens", None)
        objective = losses["loss"]
        if self.cotrain is not None:
            said, count = self.cotrain.loss(self.policy, batch["vl"])
            losses["text_loss"] = said / count.clamp(min=1)
            if tokens is None:
                objective = objective + self.cotrain.cfg.weight * losses["text_loss"]
            else:  # one mean over all supervised tokens
                objective = (objective * tokens + said) / (tokens + count)
        if self.inverse_dynamics is None:
            return losses | {"total": objective}
        pairs = len(batch["future_valid"])
        current, future = rows(0, pairs), rows(pairs, None)
        inverse = self.inverse_dynamics(current, future, batch["actions"][:pairs], batch["future_valid"])
        total = objective + self.inverse_dynamics.weight * inverse["inverse_loss"]
        return losses | inverse | {"total": total}

    def augmented(self, frames: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The same draw for all frames of a sample's camera: `frames` is [current] or [current, future]."""
        out: list[dict[str, Tensor]] = [{} for _ in frames]
        for camera in frames[0]:
            images = augment([frame[camera] for frame in frames], camera, self.augment)
            for target, image in zip(out, images, strict=True):
                target[camera] = image
        return out

    def configure_optimizers(self) -> dict:
        optimizer = make_optimizer(self, self.optim)
        scheduler = make_schedule(optimizer, self.optim, self.warmup_steps, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        normalizer = self.policy.normalizer
        checkpoint["statistics"] = {"scheme": normalizer.scheme, **normalizer.statistics.to_dict()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        normalizer = self.policy.normalizer
        if checkpoint["statistics"] != {"scheme": normalizer.scheme, **normalizer.statistics.to_dict()}:
            raise UserError(
                "the checkpoint was trained with other action statistics than the data now gives; point data.path at "
                "the data it was trained on, or start a new run with resume=null"
            )
