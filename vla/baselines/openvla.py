"""OpenVLA: a vision-language model that says its action in seven tokens (fact sheet §6; GenVLA §IV for the baseline).

DINOv2 (with registers) and SigLIP see the same frame, each with its own normalisation; their patch tokens after the
second-to-last block are concatenated (DINO first), projected, and put behind BOS into Llama's input:
[BOS][patches][prompt][space][7 action tokens][EOS], causal, cross-entropy on the last eight. All of it is trained.

Departures from the public code, each on purpose:
- The towers' last blocks and final norms, which nothing reads, are deleted: less to compute and no parameter without a
  gradient. `num_hidden_layers` counts them all the same.
- Row 0 of DINO's position embeddings has no counterpart in the reference's ViT: it is zero in converted weights and
  trains together with the CLS token it is added to.
- Decoding goes on for seven tokens whatever they are (the reference stops at EOS and then reads tokens of the prompt),
  and works on a batch: padding is masked, positions count real tokens.
- `chunk` > 1 says 7 · H tokens, one action after the other; the paper's model has H = 1. Steps past the episode's end
  are not supervised.
- Frames are resized once, bicubically (§1.6 has TensorFlow's Lanczos before it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from data.augment import centre_crop
from data.normalization import ActionNormalizer
from vla.action_tokens.bins import UniformBins
from vla.dual_encoder import require_own_tap
from vla.errors import UserError
from vla.fast_decode import likeliest_tokens, plain_tokens
from vla.policy import GRIPPER, IGNORED, Policy, VisualTokens, actions_from_normalized, hold_last, sent
from vla.released.openvla import read
from vla.released.source import resolve
from vla.tokenizer import byte_tokenizer
from vla.vision import parse_tap

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_AREA = 0.9
DIMS = GRIPPER + 1
TOWERS = ("dino", "siglip")


class OpenVLA(Policy):
    """See the module's docstring; attributes as in Policy.

    Taps: pre_projector = both towers' tokens as the projector gets them, post_projector = after it, layer:k = both
    towers' patch tokens after block k, DINO's first; k up to the second-to-last block of the shallower tower.

    Args:
        prompt: template with `{instruction}`, which is put in in lower case.
        space_id: Llama-2's tokeniser has a token for a space before a character that starts no word, 29871: it stands
            before the action tokens of the training texts and has to be appended to a prompt. None: no such token.
        bins_end: the action tokens are the 256 ids before this one.
        center_crop: what a policy trained on random crops is to be shown (§1.2); in `predict` only.
        frozen_tower: which of the two a dual encoder freezes, siglip (the public GenVLA code) or dino.
    """

    def __init__(
        self,
        dino: Dinov2WithRegistersModel,
        siglip: SiglipVisionModel,
        language_model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ActionNormalizer,
        *,
        chunk: int,
        cameras: list[str],
        image_size: int,
        tap: str,
        prompt: str,
        space_id: int | None,
        bins_end: int,
        center_crop: bool,
        frozen_tower: str = "siglip",
    ):
        super().__init__(chunk, cameras, image_size, tap, normalizer)
        if len(cameras) != 1:
            raise UserError(f"openvla reads one camera, not {cameras}; set cameras=[static]")
        if prompt.count("{instruction}") != 1:
            raise UserError(f"policy.prompt must hold {{instruction}} once; it is {prompt!r}")
        if not UniformBins(bins_end).count <= bins_end <= language_model.config.vocab_size:
            raise UserError(
                f"policy.bins_end={bins_end} leaves no 256 ids below it in a vocabulary of "
                f"{language_model.config.vocab_size}; it is 32000 with Llama-2's tokeniser"
            )
        self.dino, self.siglip = without_last_block(dino), without_last_block(siglip)
        width, hidden = dino.config.hidden_size + siglip.config.hidden_size, language_model.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model, self.tokenizer = language_model, tokenizer
        self.tap_layer = parse_tap(tap, min(m.config.num_hidden_layers for m in (dino, siglip)) - 1)
        self.prompt, self.space_id, self.center_crop = prompt, space_id, center_crop
        self.bins = UniformBins(bins_end)
        if frozen_tower not in TOWERS:
            raise UserError(f"policy.frozen_tower={frozen_tower} is not known; choose {' or '.join(TOWERS)}")
        self.frozen_tower = frozen_tower

    @classmethod
    def build(
        cls,
        normalizer: ActionNormalizer,
        *,
        pretrained: str | None = None,
        dino_config: dict | None = None,
        siglip_config: dict | None = None,
        text_config: dict | None = None,
        image_size: int,
        bins_end: int | None = None,
        attention: str = "sdpa",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **arguments,
    ) -> OpenVLA:
        """From what the authors published (`pretrained`, as vla/released/openvla.py reads it), or random weights.

        Args:
            dino_config, siglip_config, text_config: of transformers' classes; without a vocab_size the tokeniser's
                vocabulary and 256 ids for the actions.
            bins_end: None for the end of the vocabulary.
            attention: transformers' attn_implementation (sdpa, eager, flash_attention_2).

        Raises:
            UserError: `pretrained` cannot be loaded.
        """
        if pretrained is not None:
            dims = dict(dino_config=dino_config, siglip_config=siglip_config, text_config=text_config)
            own = dict(image_size=image_size, bins_end=bins_end, attention=attention, **arguments)
            return cls._released(normalizer, pretrained, own | dims)
        if tokenizer is None:
            tokenizer = byte_tokenizer()
            tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
        text = LlamaConfig(**{"vocab_size": len(tokenizer) + 256} | text_config)
        dino = Dinov2WithRegistersConfig(**dino_config | {"image_size": image_size})
        siglip = {"hidden_act": "gelu"} | siglip_config  # transformers' default is the tanh approximation (§0a.8)
        siglip = SiglipVisionConfig(**siglip | {"image_size": image_size, "vision_use_head": False})
        models = Dinov2WithRegistersModel(dino), SiglipVisionModel(siglip), LlamaForCausalLM(text)
        for model in models:
            model.set_attn_implementation(attention)
        end = text.vocab_size if bins_end is None else bins_end
        return cls(*models, tokenizer, normalizer, image_size=image_size, bins_end=end, **arguments)

    @classmethod
    def _released(cls, normalizer: ActionNormalizer, pretrained: str, arguments: dict) -> OpenVLA:
        try:
            found, weights, tokenizer = read(resolve(pretrained), arguments, base=None)
            policy = cls.build(normalizer, **arguments | found, tokenizer=tokenizer)
            policy.load_state_dict(weights)
        except (UserError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"policy.pretrained={pretrained} cannot be loaded: {reason}; or start from a converted policy "
                "(scripts/convert_weights.py) with init_from=DIR, or from random weights with policy.pretrained=null"
            ) from error
        return policy

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        return {
            "pretrained": None,
            "dino_config": self.dino.config.to_diff_dict(),
            "siglip_config": self.siglip.config.to_diff_dict(),
            "text_config": self.language_model.config.to_diff_dict(),
            "image_size": self.image_size,
        }

    def vision_modules(self) -> list[nn.Module]:
        if self.dual:
            return [self.trained_tower]
        return [self.dino, self.siglip] + ([self.projector] if self.tap_layer == "post_projector" else [])

    def make_speaking(self, language_head: str) -> None:
        self.speaks = True

    def drop_action_head(self) -> None:
        """Its actions are tokens of the vocabulary, which stay there unused."""

    def make_dual(self) -> None:
        """Of its two towers one is frozen from here on (`frozen_tower`), the other trained."""
        require_own_tap(self.tap_layer)
        self.dual = True
        getattr(self, self.frozen_tower).requires_grad_(False).eval()

    @property
    def trained_tower(self) -> nn.Module:
        return self.siglip if self.frozen_tower == "dino" else self.dino

    def train(self, mode: bool = True) -> OpenVLA:
        super().train(mode)
        if self.dual:
            getattr(self, self.frozen_tower).eval()
        return self

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        """Under a dual encoder `embeds` and the tap are the trained tower's alone until `fused`."""
        camera = self.cameras[0]
        frames = images[camera]
        if self.dual:
            tokens, tap = self.tower("siglip" if self.frozen_tower == "dino" else "dino", frames)
            return {camera: VisualTokens(tokens, tap, frames=frames)}
        fused, tap = (torch.cat(both, dim=-1) for both in zip(*(self.tower(t, frames) for t in TOWERS), strict=True))
        embeds = self.projector(fused)
        return {camera: VisualTokens(embeds, embeds if self.tap_layer == "post_projector" else tap)}

    def tower(self, name: str, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, P, C) of uint8 frames from "dino" or "siglip": the last, and those of the tap's layer."""
        pixels, model = frames.float() / 255, getattr(self, name)
        if name == "dino":
            mean, std = (sent(x, pixels.device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
            pixels, prefix = (pixels - mean) / std, 1 + self.dino.config.num_register_tokens  # CLS and registers
        else:
            pixels, prefix = 2 * pixels - 1, 0
        layers = isinstance(self.tap_layer, int)
        output = model(pixels, output_hidden_states=layers)
        tap = output.hidden_states[self.tap_layer + 1] if layers else output.last_hidden_state
        return output.last_hidden_state[:, prefix:], tap[:, prefix:]

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        if tokens.frames is None:
            return tokens
        with torch.no_grad():
            frozen, _ = self.tower(self.frozen_tower, tokens.frames)
        towers = {self.frozen_tower: frozen}
        both = torch.cat([towers.get(name, tokens.embeds) for name in TOWERS], dim=-1)
        return VisualTokens(self.projector(both), tokens.tap)

    def tokenize(self, instructions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of BOS, the prompt and the space token, padded on the right with 0, and their lengths (B,)."""
        rows = []
        for instruction in instructions:
            text = self.prompt.replace("{instruction}", instruction.lower())
            ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]
            if self.space_id is not None and ids[-1] != self.space_id:
                ids.append(self.space_id)
            rows.append(ids)
        longest = max(map(len, rows))
        ids = sent([row + [0] * (longest - len(row)) for row in rows], device)
        return ids, sent([len(row) for row in rows], device)

    def embed(self, visual: dict[str, VisualTokens], ids: Tensor) -> Tensor:
        """Input embeddings (B, P + T, D) of ids (B, T), the P visual tokens behind BOS."""
        text = self.language_model.model.embed_tokens(ids)
        return torch.cat([text[:, :1], self.fused(visual[self.cameras[0]]).embeds.to(text.dtype), text[:, 1:]], dim=1)

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Cross-entropy on the action tokens and EOS (§6.2), and the share of action tokens that are right."""
        valid = batch["action_valid"]
        actions = self.bins.encode(self.normalizer.normalize(hold_last(batch["actions"], valid)))
        targets = F.pad(actions.flatten(1), (0, 1), value=self.tokenizer.eos_token_id)
        ids, lengths = self.tokenize(batch["instruction"], targets.device)
        count = targets.shape[1]
        places = lengths[:, None] + torch.arange(count, device=ids.device)
        ids = F.pad(ids, (0, count)).scatter(1, places, targets)
        embeds = self.embed(visual, ids)  # no mask: causal, and padding comes last
        hidden = self.language_model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        places = places + embeds.shape[1] - ids.shape[1] - 1  # what predicts a token stands before it
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.language_model.lm_head(hidden).float()
        counted = F.pad(valid.repeat_interleave(DIMS, dim=1), (0, 1), value=True)
        loss = F.cross_entropy(logits.transpose(1, 2), targets.masked_fill(~counted, IGNORED))
        said, right = counted[:, :-1], (logits.argmax(-1) == targets)[:, :-1]
        return {"loss": loss, "token_accuracy": (right & said).sum() / said.sum(), "tokens": counted.sum()}

    def prepare_to_act(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        images = self.prepare(images)
        if self.center_crop:
            images = {camera: centre_crop(frames, CROP_AREA) for camera, frames in images.items()}
        return images

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        images = self.prepare_to_act(observation["images"])
        values = self.bins.decode(self.generate(self.encode_images(images), observation["instruction"]))
        values = values.unflatten(1, (self.chunk, DIMS))
        return actions_from_normalized(values[..., :GRIPPER], values[..., GRIPPER] > 0.5, self.normalizer)

    def generate(self, visual: dict[str, VisualTokens], instructions: list[str]) -> Tensor:
        """The 7 · H likeliest ids (B, 7 · H), one after the other."""
        ids, lengths = self.tokenize(instructions, self.language_model.device)
        embeds = self.embed(visual, ids)
        position = lengths + embeds.shape[1] - ids.shape[1] - 1  # of the last token that is no padding
        output = self.language_model.model(inputs_embeds=embeds, use_cache=True)
        seen = torch.arange(embeds.shape[1], device=ids.device) <= position[:, None]
        hidden = output.last_hidden_state[torch.arange(len(ids), device=ids.device), position]
        model, head = self.language_model.model, self.language_model.lm_head
        generate = likeliest_tokens if self.fast else plain_tokens
        return generate(model, head, hidden, output.past_key_values, seen, position + 1, DIMS * self.chunk)


def without_last_block(tower: Dinov2WithRegistersModel | SiglipVisionModel) -> nn.Module:
    """The tower so that its last_hidden_state is its second-to-last block's output, and without what is then unread."""
    if tower.config.num_hidden_layers < 2:
        raise UserError("openvla reads a tower's second-to-last block; set num_hidden_layers to 2 or more")
    if isinstance(tower, Dinov2WithRegistersModel):
        del tower.encoder.layer[-1]
        tower.layernorm, tower.embeddings.mask_token = nn.Identity(), None
    else:
        del tower.encoder.layers[-1]
        tower.post_layernorm = nn.Identity()
    return tower
