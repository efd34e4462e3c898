"""The LightningModule: L = L_vla + λ_inv · L_inv (IDL §3.3), optimiser, schedule.

Everything random in a step (augmentation, reversal, noise, dropout) is drawn after seeding torch with (seed, step,
part), so a step is a function of those three and the weights, and a resumed run repeats an uninterrupted one exactly.
The parts of a step's batch are those of all processes and backward passes (data/sampler.py).

Losses are means over what is valid in a part: action steps, pairs, tokens. Where there are several parts, each mean is
weighted by its share of the whole batch's count, so that their mean, which is what is optimised and logged, is the mean
over the whole batch. The counts of steps and pairs are the sampler's; those of tokens are summed over the processes of
a backward pass, and of several passes every one weighs the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from data.augment import augment
from vla.config import AugmentConfig, OptimConfig
from vla.errors import UserError
from vla.inverse_dynamics import InverseDynamics
from vla.nonfinite import clip_to_norm, drop_gradients, running_statistics, write_down
from vla.optim import make_optimizer, make_schedule
from vla.policy import Policy, VisualTokens

if TYPE_CHECKING:
    from data.instructions import Rewording
    from vla.co_training import CoTraining


class VLAModule(L.LightningModule):
    """Trains `policy`; `inverse_dynamics` is None for the vanilla baseline and is never exported.

    Attributes:
        whole: optimiser step → (valid action steps, valid pairs) of its whole batch; to be set where it has parts.

    Args:
        cotrain: of batches with vision-language data in them. rewording: training instructions in other words.
        on_nan, max_skipped: what a step does whose loss or gradient is not finite (vla/nonfinite.py).
    """

    whole: Callable[[int], tuple[int, int]] | None = None

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
        on_nan: str = "stop",
        max_skipped: int = 0,
    ):
        super().__init__()
        self.policy, self.inverse_dynamics = policy, inverse_dynamics
        self.optim, self.augment, self.seed = optim, augment, seed
        self.max_steps, self.warmup_steps = max_steps, warmup_steps
        self.cotrain, self.rewording = cotrain, rewording
        self.world = self.passes = 1
        self.seen: list[dict[str, Tensor]] = []  # the losses of each pass of this step
        self.on_nan, self.max_skipped = on_nan, max_skipped
        self.skipped, self.skipped_step = 0, -1  # how many so far, the latest of them

    def on_fit_start(self) -> None:
        self.world, self.passes = self.trainer.world_size, self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        part = batch_idx % self.passes * self.world + self.global_rank
        self.key = f"{self.seed}/{self.global_step}/{part}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:7], "big"))
        if self.on_nan == "skip" and not self.seen:
            self.before = [buffer.clone() for buffer in running_statistics(self)]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.seen.append({name: value.detach() for name, value in losses.items()})
        if len(self.seen) == self.passes:
            self.log_dict({f"train/{name}": value for name, value in self.means().items()}, batch_size=1)
        return losses["total"]

    def means(self) -> dict[str, Tensor]:
        """The step's losses: the mean of those of all passes and processes, asked for together."""
        if self.world * self.passes == 1:
            return self.seen[0]
        mean = sum(torch.stack([value.float() for value in of.values()]) for of in self.seen)
        if self.world > 1:
            torch.distributed.all_reduce(mean)
        return dict(zip(self.seen[0], mean / (self.world * self.passes), strict=True))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and take no step whose loss or gradient is not finite, on no process where it is so on one.

        This is where a step waits for the device, once.
        """
        norm = clip_to_norm(optimizer, gradient_clip_val)
        seen, self.seen = self.seen, []
        checked = [of["total"].float() for of in seen]
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # fp16's overflows and skips by design
            checked.append(norm.float())
        finite = bool(torch.stack(checked).isfinite().all())
        if self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        folder = write_down(self.trainer, self, seen, norm)
        self.skipped, self.skipped_step = self.skipped + 1, self.global_step
        if self.on_nan == "skip" and self.skipped <= self.max_skipped:
            drop_gradients(optimizer)
            for buffer, before in zip(running_statistics(self), self.before, strict=True):
                buffer.copy_(before)
            return
        raise UserError(
            f"the loss is {seen[-1]['total'].item()} at step {self.global_step}, the norm of its gradient "
            f"{norm.item()}; nothing was saved after the last checkpoint. python scripts/replay_nan.py {folder} "
            "repeats the step. Lower optim.lr, look for bad actions in the data or set trainer.on_nan=skip (at most "
            f"trainer.max_skipped={self.max_skipped} steps), then resume=auto"
        )

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
        steps, whole_pairs = (None, None) if self.world * self.passes == 1 else self.whole(self.global_step)
        if tokens is None:
            losses = {name: self.weighted(value, batch["action_valid"].sum(), steps) for name, value in losses.items()}
        alone, objective = losses["loss"], losses["loss"]
        if tokens is not None:
            objective = losses["loss"] = self.weighted(alone, tokens)
        if self.cotrain is not None:
            said, count = self.cotrain.loss(self.policy, batch["vl"])
            losses["text_loss"] = self.weighted(said / count.clamp(min=1), count)
            if tokens is None:
                objective = objective + self.cotrain.cfg.weight * losses["text_loss"]
            else:  # one mean over all supervised tokens
                objective = self.weighted((alone * tokens + said) / (tokens + count), tokens + count)
        if self.inverse_dynamics is None:
            return losses | {"total": objective}
        pairs = len(batch["future_valid"])
        current, future = rows(0, pairs), rows(pairs, None)
        inverse = self.inverse_dynamics(current, future, batch["actions"][:pairs], batch["future_valid"])
        inverse = {n: self.weighted(v, batch["future_valid"].sum(), whole_pairs) for n, v in inverse.items()}
        total = objective + self.inverse_dynamics.weight * inverse["inverse_loss"]
        return losses | inverse | {"total": total}

    def weighted(self, mean: Tensor, count: Tensor, whole: int | None = None) -> Tensor:
        """A part's mean over `count` things, so that the mean of all parts' is that over the `whole` batch's.

        `whole` None: as many as all processes have in this pass, which they ask each other.
        """
        parts = self.world * self.passes
        if whole is None:
            if self.world == 1:
                return mean
            parts, whole = self.world, count.float().clone()
            torch.distributed.all_reduce(whole)  # Lightning's own reduction waits at a barrier first
        return mean * (count * parts / max(whole, 1))

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
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        # Where the run stopped, in passes of now: Lightning tells the last one of a step by counting them.
        for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(counts, dict):
                counts.update(dict.fromkeys(counts, checkpoint["global_step"] * self.trainer.accumulate_grad_batches))
        normalizer = self.policy.normalizer
        if checkpoint["statistics"] != {"scheme": normalizer.scheme, **normalizer.statistics.to_dict()}:
            raise UserError(
                "the checkpoint was trained with other action statistics than the data now gives; point data.path at "
                "the data it was trained on, or start a new run with resume=null"
            )
        self.skipped = checkpoint["skipped"]
