"""FLOWER: Florence-2's encoder reads the images and the prompt, a flow transformer turns noise into an action chunk
(fact sheet §4; IDL A.3.1, table 7).

Florence-2 comes from transformers, without its text decoder. Encoder sequence: 50 tokens per camera, the fixed `<Flow>`
vector, the prompt. What the encoder makes of it, after dropout, is what the flow transformer (vla/dit.py) attends to.
The gripper is regressed in the action vector as ±1, +1 = open.

Text pads: the reference pads a batch's prompts to the longest (at most 77 tokens) and attends to the pads, in the
encoder and in cross-attention. `attend_padding` (the default) does so in training, at the price that a sample's loss
depends a little on the longest prompt of its batch. `predict` always masks pads: that is the reference's rollout, whose
batch is one prompt without any, and a prediction does not depend on what else is in the batch.

Departures from the public code, each on purpose:
- `<Flow>` is a buffer, saved and loaded with the weights; the public code makes it anew on every start. Here it starts
  as the mean of the token embeddings, as newer transformers initialise an added token (§0a.3).
- Steps past an episode's end do not count in the loss. They cannot reach the others, for attention is causal. With
  data.tail=whole, the default for this baseline, there are none, as in the reference.
- The "beta" times are π0's, 0.999·Beta(1.5, 1) + 0.001, where FLOWER clamps at 0.999; not used by any of its results.
- Of the flow transformer what nothing reads is left out: see vla/dit.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Model,
    PreTrainedTokenizerBase,
)

from data.normalization import ActionNormalizer
from vla.dit import FlowTransformer
from vla.dual_encoder import Frozen, beside, mixer
from vla.errors import UserError
from vla.flow import beta_times, euler, initial_noise, interpolate, logit_normal_times, stratified_times
from vla.flow_sampler import FlowSampler
from vla.policy import GRIPPER, Policy, VisualTokens, actions_from_normalized, of_cameras, sent
from vla.tokenizer import byte_tokenizer
from vla.vision import parse_tap

ACTION_DIM = 7
TIMES = {"stratified": stratified_times, "logit_normal": logit_normal_times, "beta": beta_times}
# CLIP's, not Florence's (§4.5).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Flower(Policy):
    """See the module's docstring; attributes as in Policy.

    Args:
        florence: transformers' model; its decoder is dropped.
        prompt: template with `{instruction}`.
        max_text_tokens: longer prompts are cut.
        dit_config: arguments of FlowTransformer.
        flow_steps: Euler steps from noise to actions.
        times: how training draws the flow's time, a key of TIMES.
        draws: of time and noise per sample and step; the reference's 1. The encoder, which costs most, runs once.
        token_dropout: of single features of the encoder's output.
        attend_padding: see the module's docstring.
    """

    compiled_parts = ("encode_images", "sample")

    def __init__(
        self,
        florence: Florence2Model,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ActionNormalizer,
        *,
        chunk: int,
        cameras: list[str],
        image_size: int,
        tap: str,
        prompt: str,
        max_text_tokens: int,
        dit_config: dict,
        flow_steps: int,
        times: str,
        draws: int,
        token_dropout: float,
        attend_padding: bool,
    ):
        super().__init__(chunk, cameras, image_size, tap, normalizer)
        if "{instruction}" not in prompt:
            raise UserError(f"policy.prompt must hold {{instruction}}; it is {prompt!r}")
        if times not in TIMES:
            raise UserError(f"policy.times={times} is not known; choose one of {', '.join(TIMES)}")
        if normalizer.scheme == "zscore":
            raise UserError(
                "flower's actions are clamped to [-1, 1]; normalization=zscore leaves it, choose none or q99"
            )
        self.vision_tower, self.projector = florence.vision_tower, florence.multi_modal_projector
        self.encoder, self.tokenizer = florence.language_model.encoder, tokenizer
        self.tap_layer = parse_tap(tap, sum(self.vision_tower.config.depths))
        embeddings = self.encoder.embed_tokens.weight.detach()
        self.register_buffer("flow", embeddings[: len(tokenizer)].mean(0))
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.token_dropout = nn.Dropout(token_dropout)
        self.dit = FlowTransformer(ACTION_DIM, embeddings.shape[1], **dit_config)
        if chunk > self.dit.max_length:
            raise UserError(f"chunk={chunk} is longer than policy.dit_config.max_length={self.dit.max_length}")
        self.prompt, self.max_text_tokens = prompt, max_text_tokens
        self.flow_steps, self.draw_times, self.draws = flow_steps, TIMES[times], draws
        self.attend_padding = attend_padding

    @classmethod
    def build(
        cls,
        normalizer: ActionNormalizer,
        *,
        pretrained: str | None = None,
        vision_config: dict | None = None,
        text_config: dict | None = None,
        attention: str = "sdpa",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **arguments,
    ) -> Flower:
        """A random flow transformer on a released Florence-2 (`pretrained`, a hub id or a folder) or on a random one.

        Args:
            attention: Florence's attn_implementation (sdpa, eager).

        Raises:
            UserError: `pretrained` cannot be loaded.
        """
        if pretrained is not None:
            florence, tokenizer = load_florence(pretrained, attention)
        else:
            tokenizer = tokenizer or byte_tokenizer()
            text = {"model_type": "bart", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            text |= text_config | {"decoder_layers": 0}
            vision = vision_config | {"projection_dim": text["d_model"]}
            florence = Florence2Model(Florence2Config(vision_config=vision, text_config=text))
            florence.set_attn_implementation(attention)
        return cls(florence, tokenizer, normalizer, **arguments)

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        return {
            "pretrained": None,
            "vision_config": self.vision_tower.config.to_diff_dict(),
            "text_config": self.encoder.config.to_diff_dict(),
        }

    def vision_modules(self) -> list[nn.Module]:
        return [self.vision_tower] + ([self.projector] if self.tap_layer == "post_projector" else [])

    def prepare(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bilinear, antialiased, as torchvision's Resize in the reference."""
        size = (self.image_size, self.image_size)
        return {
            camera: frames if frames.shape[-2:] == size else resize_bilinear(frames, size)
            for camera, frames in images.items()
            if camera in self.cameras
        }

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        """Taps: pre_projector = DaViT's last feature map, post_projector = its mean and its positions, projected."""
        frames = torch.cat([*images.values()])
        tower = self.vision_tower(self.pixels(frames), output_hidden_states=isinstance(self.tap_layer, int))
        embeds = tap = self.projector(tower.last_hidden_state)
        if self.tap_layer == "pre_projector":
            tap = tower.last_hidden_state.flatten(2).transpose(1, 2)
        elif self.tap_layer != "post_projector":
            tap = tower.hidden_states[self.tap_layer + 1].flatten(2).transpose(1, 2)
        return of_cameras(VisualTokens(embeds, tap, frames=frames if self.dual else None), images)

    def pixels(self, frames: Tensor) -> Tensor:
        return (frames.float() / 255 - self.mean) / self.std

    def make_dual(self) -> None:
        self.dual = True
        self.frozen_tower, self.frozen_projector = Frozen(self.vision_tower), Frozen(self.projector)
        self.mixer = mixer(self.encoder.config.d_model)

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        if tokens.frames is None:
            return tokens
        frozen = self.frozen_projector(self.frozen_tower(self.pixels(tokens.frames)).last_hidden_state)
        return VisualTokens(self.mixer(beside(frozen, tokens.embeds)), tokens.tap)

    def context(
        self, visual: dict[str, VisualTokens], instructions: list[str], attend_padding: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the flow transformer attends to, (B, L, dim), and which of it counts, bool (B, L); None for all."""
        ids, valid = self.tokenize(instructions, self.flow.device)
        text = self.encoder.embed_tokens(ids)
        images = torch.cat([self.fused(visual[camera]).embeds for camera in self.cameras], dim=1).to(text.dtype)
        embeds = torch.cat([images, self.flow.expand(len(ids), 1, -1), text], dim=1)
        valid = F.pad(valid, (embeds.shape[1] - ids.shape[1], 0), value=True)
        mask = None if attend_padding else valid
        hidden = self.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return self.dit.context(self.token_dropout(hidden)), mask

    def tokenize(self, instructions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and validity (bool), both (B, L), padded on the right to the longest."""
        texts = [self.prompt.replace("{instruction}", instruction.strip()) for instruction in instructions]
        encoded = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_text_tokens,
        )
        return sent(encoded["input_ids"], device), sent(encoded["attention_mask"].bool(), device)

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Mean squared error of the velocity over valid steps × 7 dims (§4.4)."""
        actions, valid = self.normalizer.normalize(batch["actions"]), batch["action_valid"]
        actions = torch.cat([actions[..., :GRIPPER], 2 * actions[..., GRIPPER:] - 1], dim=-1)
        context, mask = self.context(visual, batch["instruction"], self.attend_padding)
        actions, valid, context = (
            part.repeat(self.draws, *[1] * (part.dim() - 1)) for part in (actions, valid, context)
        )
        mask = None if mask is None else mask.repeat(self.draws, 1)
        t = self.draw_times(len(actions), actions.device)
        x, target = interpolate(actions, torch.randn_like(actions), t)
        velocity = self.dit(x, t, context, mask)
        error = (velocity.float() - target).square().mean(-1)
        return {"loss": (error * valid).sum() / valid.sum()}

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        visual = self.encode_images(self.prepare(observation["images"]))
        context, mask = self.context(visual, observation["instruction"], attend_padding=False)
        noise = initial_noise(observation, (self.chunk, ACTION_DIM), self.flow.device)
        actions = self.sample(context, mask, noise).clamp(-1, 1)
        return actions_from_normalized(actions[..., :GRIPPER], actions[..., GRIPPER] > 0, self.normalizer)

    def sample(self, context: Tensor, mask: Tensor | None, noise: Tensor) -> Tensor:
        """Normalised actions (B, H, 7) from noise, in `flow_steps` Euler steps."""
        if self.fast and context.dtype == torch.float32:
            return FlowSampler(self.dit, context, mask, self.chunk, self.flow_steps).sample(noise)
        return euler(lambda x, t: self.dit(x, t, context, mask).float(), noise, self.flow_steps)


def load_florence(pretrained: str, attention: str) -> tuple[Florence2Model, PreTrainedTokenizerBase]:
    """Florence-2 in float32 and its tokenizer, from transformers' own format."""
    try:
        florence, info = Florence2ForConditionalGeneration.from_pretrained(
            pretrained, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"policy.pretrained={pretrained} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        raise UserError(
            f"policy.pretrained={pretrained} is not in transformers' own format ({len(info['missing_keys'])} weights "
            "missing); florence-community/Florence-2-large is"
        )
    return florence.model, tokenizer


def resize_bilinear(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, h, w) → uint8 (B, 3, *size)."""
    frames = F.interpolate(frames.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return frames.round_().clamp_(0, 255).to(torch.uint8)
