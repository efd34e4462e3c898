"""VLM4VLA: a pretrained VLM, one learned action query, a fully connected decoder (fact sheet §3; IDL A.3.2, A.5).

Qwen3-VL comes from transformers. Sequence: prompt with the image's tokens in it, right-padded, then the query at the
very end (after the pads, as in the reference). The head reads the query's last hidden state and predicts H actions.

Departures from the public code, each on purpose: DeepStack is on (the public class loses it silently, fact sheet §0a.6;
`deepstack: false` gives the public behaviour), and o_t and o_{t+H} share one augmentation draw.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from data.normalization import ActionNormalizer
from vla.dual_encoder import Frozen, beside, mixer
from vla.errors import UserError
from vla.policy import GRIPPER, Policy, VisualTokens, actions_from_normalized, sent
from vla.tokenizer import byte_tokenizer
from vla.vision import ConvTower, QwenVision

KEPT = "kept"
"""`language_head` of an exported policy that has its own."""
IMAGE = "<|image_pad|>"


class FCDecoder(nn.Module):
    """Query state (B, D) → tanh-bounded motion (B, H, 6) and gripper logits (B, H) (fact sheet §3.4)."""

    def __init__(self, hidden: int, width: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.trunk = _mlp([hidden, hidden // 2, width])
        self.motion = _mlp([width, width, width // 2, width // 4, GRIPPER * chunk])
        self.gripper = _mlp([width, width, width // 2, width // 4, chunk])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.trunk(query)
        return self.motion(trunk).tanh().unflatten(-1, (self.chunk, GRIPPER)), self.gripper(trunk)


def causal(counts: Tensor) -> Tensor:
    """What each position may look at, bool (B, 1, L, L): itself and what of `counts` (B, L) stands before it.

    As transformers makes it of `counts`; but it asks the device first whether all do.
    """
    length = counts.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=counts.device).tril() & counts.bool()[:, None, None]


def add_rows(hidden: Tensor, rows: Tensor, embeds: Tensor) -> Tensor:
    """hidden (B, L, D) with `embeds` (N, D) added at `rows` (N,), positions counted over B · L: DeepStack's step.

    In place of transformers' own, which is told a mask and asks the device where it holds.
    """
    return hidden.flatten(0, 1).index_add(0, rows, embeds.to(hidden.dtype)).view_as(hidden)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VLM4VLA(Policy):
    """See the module's docstring; attributes as in Policy.

    Args:
        visual: maps uint8 frames to VisualTokens whose embeds are as wide as the language model.
        language_model: Qwen3-VL's text model, without its lm_head (it would never get a gradient).
        prompt: template with one `<|image_pad|>` and `{instruction}`.
    """

    def __init__(
        self,
        visual: nn.Module,
        language_model: Qwen3VLTextModel,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ActionNormalizer,
        *,
        chunk: int,
        cameras: list[str],
        image_size: int,
        tap: str,
        prompt: str,
        deepstack: bool,
        head_width: int,
        huber_delta: float,
        gripper_weight: float,
    ):
        super().__init__(chunk, cameras, image_size, tap, normalizer)
        if list(cameras) != ["static"]:
            raise UserError(f"vlm4vla reads the static camera only, not {cameras}; set benchmark.cameras=[static]")
        if prompt.count(IMAGE) != 1 or "{instruction}" not in prompt:
            raise UserError(f"policy.prompt must hold {IMAGE} once and {{instruction}}; it is {prompt!r}")
        self.visual, self.language_model, self.tokenizer = visual, language_model, tokenizer
        language_model._deepstack_process = add_rows
        hidden = language_model.config.hidden_size
        self.query = nn.Parameter(torch.zeros(hidden))
        self.lm_head = None
        self.head = FCDecoder(hidden, head_width, chunk)
        self.prompt, self.deepstack = prompt, deepstack
        self.huber_delta, self.gripper_weight = huber_delta, gripper_weight
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def build(
        cls,
        normalizer: ActionNormalizer,
        *,
        pretrained: str | None = None,
        vision: str = "qwen",
        vision_config: dict | None = None,
        text_config: dict | None = None,
        vision_size: int = 448,
        attention: str = "sdpa",
        tap: str = "post_projector",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **arguments,
    ) -> VLM4VLA:
        """From released weights (`pretrained`, a hub id or a folder), or random ones of the given dimensions.

        Args:
            attention: transformers' attn_implementation (sdpa, eager, flash_attention_2).

        Raises:
            UserError: `pretrained` cannot be loaded, or `vision` is neither "qwen" nor "conv".
        """
        if pretrained is not None:
            try:
                vlm = Qwen3VLForConditionalGeneration.from_pretrained(
                    pretrained, dtype=torch.float32, attn_implementation=attention
                )
                tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise UserError(f"policy.pretrained={pretrained} cannot be loaded: {error}") from error
            visual = QwenVision(vlm.config.vision_config, vision_size, tap, vlm.model.visual)
            visual.set_attention(attention)
            return cls(visual, vlm.model.language_model, tokenizer, normalizer, tap=tap, **arguments)

        tokenizer = tokenizer or byte_tokenizer()
        if vision == "conv":
            visual = ConvTower(**vision_config, tap=tap)
        elif vision == "qwen":
            visual = QwenVision(Qwen3VLVisionConfig(**vision_config), vision_size, tap)
            visual.set_attention(attention)
        else:
            raise UserError(f"policy.vision={vision} is not known; choose qwen or conv")
        text = Qwen3VLTextConfig(**{"vocab_size": len(tokenizer), **text_config})
        language_model = Qwen3VLTextModel(text)
        language_model.set_attn_implementation(attention)
        return cls(visual, language_model, tokenizer, normalizer, tap=tap, **arguments)

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        vision = self.visual.model.config.to_diff_dict() if isinstance(self.visual, QwenVision) else None
        text = self.language_model.config.to_diff_dict()
        own = {"language_head": KEPT} if self.lm_head is not None else {}
        return {"pretrained": None, "text_config": text} | own | ({"vision_config": vision} if vision else {})

    def vision_modules(self) -> list[nn.Module]:
        return [self.visual]

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        visual = {camera: self.visual(frames) for camera, frames in images.items()}
        return {c: replace(tokens, frames=images[c]) for c, tokens in visual.items()} if self.dual else visual

    def make_speaking(self, language_head: str) -> None:
        from vla.generation import TIED, read_head

        self.speaks = True
        if language_head != TIED:
            shape = self.language_model.embed_tokens.weight.shape
            self.lm_head = nn.Linear(shape[1], shape[0], bias=False)
            if language_head != KEPT:
                self.lm_head.weight.data.copy_(read_head(language_head, tuple(shape), "policy.language_head"))

    def drop_action_head(self) -> None:
        self.query = self.head = None

    def make_dual(self) -> None:
        self.dual, self.frozen = True, Frozen(self.visual)
        width, layers = self.language_model.config.hidden_size, 1
        if isinstance(self.visual, QwenVision) and self.deepstack:
            layers += len(self.visual.model.deepstack_visual_indexes)
        self.mixers = nn.ModuleList(mixer(width) for _ in range(layers))

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        """The mean of both towers' tokens to start with, at the decoder's input and at each layer of the deepstack."""
        if tokens.frames is None:
            return tokens
        frozen = self.frozen(tokens.frames)
        embeds, *deepstack = (
            mix(beside(a, b))
            for mix, a, b in zip(
                self.mixers, (frozen.embeds, *frozen.deepstack), (tokens.embeds, *tokens.deepstack), strict=False
            )
        )
        return VisualTokens(embeds, tokens.tap, tuple(deepstack))

    def decode(self, visual: dict[str, VisualTokens], instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Normalised motion (B, H, 6) in (-1, 1) and gripper logits (B, H)."""
        tokens = self.fused(visual["static"])
        device = tokens.embeds.device
        ids, mask = self.tokenize(instructions, tokens.embeds.shape[1], torch.device("cpu"))
        mask, is_image = F.pad(mask, (0, 1), value=1), F.pad(ids == self.image_id, (0, 1), value=False)
        rows = is_image.flatten().nonzero()[:, 0]  # found here: the host would have to wait for the device's answer
        ids, mask, rows = (sent(host, device) for host in (ids, mask, rows))
        embeds = self.language_model.embed_tokens(ids)
        query = self.query.to(embeds.dtype).expand(len(ids), 1, -1)
        embeds = torch.cat([embeds, query], dim=1)
        pictures = tokens.embeds.flatten(0, 1).to(embeds.dtype)
        embeds = embeds.flatten(0, 1).index_copy(0, rows, pictures).view_as(embeds)
        # Plain positions on all three M-RoPE axes, pads counted (§3.3): the query stands at the padded length.
        positions = torch.arange(embeds.shape[1], device=device).expand(3, len(ids), -1)
        deepstack = [layer.flatten(0, 1) for layer in tokens.deepstack] if self.deepstack else []
        hidden = self.language_model(
            inputs_embeds=embeds,
            attention_mask=causal(mask) if self.language_model.config._attn_implementation == "sdpa" else mask,
            position_ids=positions,
            visual_pos_masks=rows if deepstack else None,
            deepstack_visual_embeds=deepstack or None,
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[:, -1])

    def tokenize(self, instructions: list[str], image_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, L), right-padded to the longest, one id per visual token."""
        texts = [
            self.prompt.replace(IMAGE, IMAGE * image_tokens).replace("{instruction}", instruction.strip())
            for instruction in instructions
        ]
        encoded = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        return sent(encoded["input_ids"], device), sent(encoded["attention_mask"], device)

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Huber(δ) over valid steps × 6 motion dims + gripper_weight · BCE over valid steps (§3.5)."""
        motion, gripper = self.decode(visual, batch["instruction"])
        target, valid = self.normalizer.normalize(batch["actions"]), batch["action_valid"].float()
        huber = F.huber_loss(motion.float(), target[..., :GRIPPER], delta=self.huber_delta, reduction="none").mean(-1)
        bce = F.binary_cross_entropy_with_logits(gripper.float(), target[..., GRIPPER], reduction="none")
        huber, bce = (huber * valid).sum() / valid.sum(), (bce * valid).sum() / valid.sum()
        return {"loss": huber + self.gripper_weight * bce, "huber": huber, "gripper_bce": bce}

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        visual = self.encode_images(self.prepare(observation["images"]))
        motion, gripper = self.decode(visual, observation["instruction"])
        return actions_from_normalized(motion, gripper > 0, self.normalizer)
