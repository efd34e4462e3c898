"""Vision-language data beside robot data in every batch (GenVLA §III-C; fact sheet §8.3).

    In: <VLM_PROMPT> what is left of the mug?
    Out: a spoon

Half of a batch is robot data, half pictures with questions, evenly from each set in use. Where actions are tokens too
(bins, grid, text), there is one loss: the mean cross-entropy over all supervised tokens of the batch. Beside a flow or
a regression the text's mean cross-entropy is added with `weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vla.baselines.vlm4vla import VLM4VLA
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
        if cfg.released_label_mask and isinstance(getattr(policy, "base", policy), VLM4VLA):
            raise UserError(
                "cotrain.released_label_mask=true is of plain prompts; vlm4vla's chat has the picture in it"
            )
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
