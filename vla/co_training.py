"""Vision-language data beside robot data in every batch (GenVLA §III-C; fact sheet §8.3).

    In: <VLM_PROMPT> what is left of the mug?
    Out: a spoon

Half of a batch is robot data, half pictures with questions, evenly from each set in use. Where actions are tokens too
(bins, grid, text), there is one loss: the mean cross-entropy over all supervised tokens of the batch. Beside a flow or
a regression the text's mean cross-entropy is added with `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.sampler import PairDataset, StatelessBatches
from data.vision_language import Mixture, open_set
from vla.config import CoTrainConfig
from vla.errors import UserError
from vla.generation import TextModel
from vla.policy import Policy
from vla.string_policy import speaker
from vla.text_loss import TextTargets, cross_entropy


class CoTraining:
    """The text loss of a batch's questions.

    Args:
        policy: one that speaks.
    """

    def __init__(self, policy: Policy, cfg: CoTrainConfig):
        if not policy.speaks:
            raise UserError("cotrain.enabled=true needs policy.speaks=true (ablation=cotrain sets both)")
        if cfg.prompt.count("{question}") != 1:
            raise UserError(f"cotrain.prompt must hold {{question}} once; it is {cfg.prompt!r}")
        self.cfg = cfg

    def loss(self, policy: Policy, batch: dict) -> tuple[Tensor, Tensor]:
        """(sum of cross-entropies, tokens) of {"images", "question", "answer"}, data/vision_language.py's batch.

        An example of more than `max_tokens` ids is left out, as in the public code's collator.
        """
        model, space = speaker(policy)
        pairs = [self.ids(model, space, q, a) for q, a in zip(batch["question"], batch["answer"], strict=True)]
        kept = [row for row, (asked, said, _) in enumerate(pairs) if len(asked) + len(said) <= self.cfg.max_tokens]
        if not kept:
            zero = batch["images"].new_zeros((), dtype=torch.float32)
            return zero, zero
        frames = {policy.cameras[0]: batch["images"][kept]}
        tokens = policy.fused(policy.encode_images(frames)[policy.cameras[0]])
        prefix = model.read_ids(tokens, [pairs[row][0] for row in kept])
        targets = TextTargets([pairs[row][1] for row in kept], [pairs[row][2] for row in kept])
        total, count, _ = cross_entropy(model, prefix, targets)
        return total, count

    def ids(self, model: TextModel, space: str, question: str, answer: str) -> tuple[list[int], list[int], list[bool]]:
        """(ids of the prompt, ids said after it, which of those count).

        The public code counts as many last tokens as the answer has bytes, and one: what it so reaches of the prompt is
        said too.
        """
        text = model.template.replace("{prompt}", self.cfg.prompt.replace("{question}", question))
        prompt, whole = model.encode(text), model.encode(text + space + answer)
        shared = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        said = whole[shared:] + model.stop[:1]
        extra = 0
        if self.cfg.released_label_mask:
            extra = min(max(0, len(answer.encode()) + 1 - len(said)), shared - 1)
        return whole[: shared - extra], whole[shared - extra : shared] + said, [True] * (extra + len(said))


class CoTrainingDataset(Dataset):
    """Robot batches with questions in them; indices come from `CoTrainingBatches`."""

    def __init__(self, robot: PairDataset, mixture: Mixture):
        self.robot, self.mixture = robot, mixture

    def __getitems__(self, indices: tuple[np.ndarray, np.ndarray]) -> dict:
        steps, examples = indices
        return self.robot.__getitems__(steps) | {"vl": self.mixture.batch(examples)}


class CoTrainingBatches:
    """(robot steps, numbers of the vision-language stream) of each optimiser step: both go on exactly on resume."""

    def __init__(self, robot: StatelessBatches, examples: int):
        self.robot, self.examples = robot, examples

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        robot = self.robot
        for step, steps in enumerate(robot, start=robot.first_step):
            start = (step * robot.world + robot.rank) * self.examples
            yield steps, np.arange(start, start + self.examples)


def split(batch_size: int, share: float) -> tuple[int, int]:
    """(robot samples, vision-language examples) of a batch."""
    examples = round(batch_size * share)
    if not 0 < examples < batch_size:
        raise UserError(f"cotrain.share={share} of batch_size={batch_size} leaves one kind of data out; change either")
    return batch_size - examples, examples


def mixture(cfg: CoTrainConfig, size: int, seed: int) -> Mixture:
    """The stream of the sets in use.

    Raises:
        UserError: an unknown set, or one that cannot be read.
    """
    if unknown := set(cfg.use) - set(cfg.sets):
        raise UserError(f"cotrain.use={sorted(unknown)} is not known; choose among {', '.join(cfg.sets)}")
    sets = [(name, cfg.sets[name]) for name in cfg.use]
    if incomplete := [name for name, of in sets if not of.get("annotations")]:
        raise UserError(
            f"cotrain.sets.{incomplete[0]} has no annotations; set cotrain.sets.{incomplete[0]}.annotations"
        )
    return Mixture([open_set(of["annotations"], of.get("images"), name) for name, of in sets], size, seed)
