"""A baseline that says its actions as text (GenVLA §III-B; fact sheet §8.2) instead of with its own head.

    In: <VLA_PROMPT> What action should the robot take to put the bowl on the plate?
    Out: 0.0312,-0.1,0.25,0.0,-0.0077,0.0,1.0,

The baseline's bins, grid, flow expert or MLP head are gone; its vision encoding, preparation of frames and
normalisation stay. The loss is the cross-entropy of the text's characters and of the end token. `<VLA_PROMPT>` is
written out in ordinary tokens, where the public code adds three to the vocabulary: tokenisers and embeddings stay the
released ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.action_tokens.constrained import character_ids, decode
from vla.action_tokens.strings import ALPHABET, DIMS, Grammar, read, write
from vla.baselines.vlm4vla import VLM4VLA
from vla.errors import UserError
from vla.generation import TextModel, greedy, text_model
from vla.policy import GRIPPER, Policy, VisualTokens, actions_from_normalized, hold_last
from vla.policy_configs import StringConfig
from vla.text_loss import TextTargets, cross_entropy

TEMPLATE = "In: {prompt}\nOut:"
"""OpenVLA's and, in the public code, π0's (§8.2); a model with a chat format keeps that."""


def speaker(policy: Policy) -> tuple[TextModel, str]:
    """The policy's language model with the text around a prompt, and what stands between that and what is said."""
    base = getattr(policy, "base", policy)
    if isinstance(base, VLM4VLA):
        return text_model(base), ""  # a chat's answer begins on its own line
    return text_model(base, template=TEMPLATE), " "


class StringPolicy(Policy):
    """`base` with its actions as text; what is not said here is the base's.

    Args:
        base: its action head is taken off.
        strings: form, prompt, whether decoding is constrained, what the loss counts.

    Attributes:
        malformed: texts that were no action, of `decoded` in all (without the constraint only).
    """

    def __init__(self, base: Policy, strings: StringConfig):
        super().__init__(base.chunk, base.cameras, base.image_size, base.tap, base.normalizer)
        if strings.prompt.count("{instruction}") != 1:
            raise UserError(f"policy.string.prompt must hold {{instruction}} once; it is {strings.prompt!r}")
        if not base.normalizer.scheme.startswith(("q99", "clip065")):
            raise UserError(
                f"normalization={base.normalizer.scheme} exceeds ±1, which policy.actions=string writes; choose q99"
            )
        base.drop_action_head()
        self.base, self.strings = base, strings
        self.tokenizer, self.dual, self.speaks, self.ensemble = base.tokenizer, base.dual, True, base.ensemble
        self.grammar, self.characters = Grammar(strings.form), character_ids(base.tokenizer)
        self.malformed = self.decoded = 0
        self._gripper: dict[int, float] = {}

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        return self.base.encode_images(images)

    def prepare(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.base.prepare(images)

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        return self.base.fused(tokens)

    def vision_modules(self) -> list[nn.Module]:
        return self.base.vision_modules()

    def make_dual(self) -> None:
        self.base.make_dual()
        self.dual = True

    def architecture(self) -> dict:
        return self.base.architecture()

    def prompts(self, instructions: list[str]) -> tuple[TextModel, list[list[int]]]:
        """The language model, and the ids of the prompts up to where the action's text begins."""
        model, space = speaker(self)
        asked = (self.strings.prompt.replace("{instruction}", text.strip().lower()) for text in instructions)
        return model, [model.encode(model.template.replace("{prompt}", prompt) + space) for prompt in asked]

    def seen_by(self, visual: dict[str, VisualTokens]) -> VisualTokens:
        """All cameras' tokens in a row, as the language model reads them."""
        tokens = [self.fused(visual[camera]) for camera in self.cameras]
        if len(tokens) == 1:
            return tokens[0]
        return VisualTokens(torch.cat([t.embeds for t in tokens], dim=1), tokens[0].tap)

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Mean cross-entropy over the characters of valid steps and the end token, and how many those were."""
        (model, prompts), valid = self.prompts(batch["instruction"]), batch["action_valid"]
        values = self.normalizer.normalize(hold_last(batch["actions"], valid)).clamp(-1, 1).cpu().numpy()
        early = int(self.strings.released_label_mask)  # the prompt's last token is said too
        rows = []
        for prompt, steps, real in zip(prompts, values, valid.tolist(), strict=True):
            text, counted = prompt[len(prompt) - early :], [True] * early
            for step, said in zip(steps, real, strict=True):
                characters = [self.characters[ALPHABET.index(c)] for c in write(step, self.strings.form)]
                text += characters
                counted += [said] * len(characters)
            rows.append((text + model.stop[:1], [*counted, True]))
        targets = TextTargets([ids for ids, _ in rows], [counted for _, counted in rows])
        prefix = model.read_ids(self.seen_by(visual), [prompt[: len(prompt) - early] for prompt in prompts])
        total, count, right = cross_entropy(model, prefix, targets)
        return {"loss": total / count, "token_accuracy": right / count, "tokens": count}

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        (model, prompts), images = self.prompts(observation["instruction"]), observation["images"]
        prefix = model.read_ids(self.seen_by(self.encode_images(self.base.prepare_to_act(images))), prompts)
        count = DIMS * self.chunk
        if self.strings.constrained:
            said = decode(model, prefix, self.grammar, self.characters, self.chunk)
        else:
            said = self.unconstrained(model, prefix)
        values = [read(text, count) for text in said]
        self.decoded += len(values)
        wrong = [row for row, value in enumerate(values) if value is None]
        filled = [[0.0] * count if value is None else value.tolist() for value in values]
        actions = torch.tensor(filled, device=prefix.hidden.device).unflatten(1, (self.chunk, DIMS))
        actions = actions_from_normalized(actions[..., :GRIPPER], actions[..., GRIPPER] > 0.5, self.normalizer)
        return self._fall_back(actions, wrong, observation)

    def unconstrained(self, model: TextModel, prefix) -> list[str]:
        """Greedy text until the end token, at most as long as an action can be."""
        names = dict(zip(self.characters, ALPHABET, strict=True))
        rows = greedy(model, prefix, self.grammar.longest * self.chunk + 1)
        return ["".join(names.get(token, "?") for token in row) for row in rows]

    def _fall_back(self, actions: Tensor, wrong: list[int], observation: dict) -> Tensor:
        """Stand still with the gripper as it was (§8.2) where the text was no action; counted."""
        self.malformed += len(wrong)
        seeds, steps = (observation.get(key, torch.zeros(len(actions))).tolist() for key in ("seed", "step"))
        for row, (seed, step) in enumerate(zip(seeds, steps, strict=True)):
            if step == 0:
                self._gripper.pop(seed, None)
            if row in wrong:
                actions[row, :, :GRIPPER], actions[row, :, GRIPPER] = 0.0, self._gripper.get(seed, 1.0)
            self._gripper[seed] = float(actions[row, -1, GRIPPER])
        return actions
