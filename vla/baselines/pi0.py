"""π0: PaliGemma's language model reads the images and the prompt, a small Gemma "expert" flows noise into an action
chunk (fact sheet §7; openpi; GenVLA §IV for the baseline).

PI0 comes from transformers: its language model, expert, embeddings of state, action and time, and its masks. Prefix =
image tokens of every camera, then the prompt; suffix = one state token, then H action tokens. The prefix is computed
once and cached; in every layer the expert attends to the cached keys and values, in training with gradients. Blocks see
themselves and those before: prefix | state | actions. Padding is seen by nobody, positions count valid tokens only.

Departures from openpi, each on purpose:
- The gripper is not z-scored but regressed as (g − centre) / scale of a g in {0, 1}, ±1 by default, open above the
  middle: the project's normaliser leaves it alone. A converted checkpoint brings its own centre and scale.
- Steps past the episode's end do not count in the loss; openpi counts the repeated last action. All `action_dim` dims
  do count, zero-padded ones too, as in openpi (lerobot's port leaves those out).
- Frames are resized bicubically, as by transformers' processor (openpi: bilinear), and only cameras that exist are
  encoded (openpi encodes a black image for each missing one and masks its tokens: the same function).
- The prompt is padded to the longest of the batch, not to 48 tokens (the same function again).
- Normalised motion is clipped to ±1 where the normalisation itself clips (q01/q99), as open-pi-zero does (§7.5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Cache,
    GemmaConfig,
    GemmaModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PI0Config,
    PI0ForConditionalGeneration,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.models.pi0.modeling_pi0 import PI0ActionTimeEmbedding

from data.normalization import ActionNormalizer
from vla.dual_encoder import Frozen, beside, require_own_tap, widened
from vla.errors import UserError
from vla.expert_sampler import ExpertSampler
from vla.fast_decode import supports
from vla.flow import beta_times, euler, initial_noise, interpolate
from vla.policy import GRIPPER, Policy, VisualTokens, actions_from_normalized, hold_last, of_cameras, resize, sent
from vla.tokenizer import byte_tokenizer
from vla.vision import parse_tap

SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")
"""What the expert has in common with the language model whose keys and values it attends to."""
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""The expert reads no tokens; its embedding, made with a vocabulary of one, is dropped."""


class Pi0(Policy):
    """See the module's docstring; attributes as in Policy.

    Args:
        pi0: transformers' model; of its expert no token embedding is kept, nothing reads it.
        state_dim, action_dim: proprioception and actions are zero-padded to these widths.
        flow_steps: Euler steps from noise to actions.
        max_text_tokens: the prompt, with BOS and the newline that ends it, is cut to as many tokens.
        gripper: (centre, scale) of the gripper's normalisation.
    """

    def __init__(
        self,
        pi0: PI0ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ActionNormalizer,
        *,
        chunk: int,
        cameras: list[str],
        image_size: int,
        tap: str,
        flow_steps: int,
        max_text_tokens: int,
        gripper: list[float],
    ):
        super().__init__(chunk, cameras, image_size, tap, normalizer)
        self.pi0, self.tokenizer = pi0, tokenizer
        self.state_dim, self.action_dim = pi0.config.max_state_dim, pi0.config.max_action_dim
        self.flow_steps, self.max_text_tokens = flow_steps, max_text_tokens
        self.gripper_centre, self.gripper_scale = gripper
        vlm = pi0.model.vlm
        self.tap_layer = parse_tap(tap, vlm.vision_tower.config.num_hidden_layers)
        pi0.model.dit.embed_tokens = None
        # Of the prefix only keys and values are read: what the last layer does after them gets no gradient.
        last = vlm.language_model.layers[-1]
        unread = (last.self_attn.q_proj, last.self_attn.o_proj, last.post_attention_layernorm, last.mlp)
        for module in (*unread, vlm.language_model.norm):
            module.requires_grad_(False)

    @classmethod
    def build(
        cls,
        normalizer: ActionNormalizer,
        *,
        pretrained: str | None = None,
        vision_config: dict | None = None,
        text_config: dict | None = None,
        expert_config: dict | None = None,
        state_dim: int,
        action_dim: int,
        image_size: int,
        chunk: int,
        attention: str = "sdpa",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **arguments,
    ) -> Pi0:
        """A random expert on a released PaliGemma (`pretrained`, a hub id or a folder), or on a random one.

        Args:
            expert_config: GemmaConfig's arguments that are the expert's own (hidden_size, intermediate_size).
            attention: transformers' attn_implementation (sdpa, eager).

        Raises:
            UserError: `pretrained` cannot be loaded, or sees images of another size.
        """
        if pretrained is not None:
            vlm, tokenizer = load_paligemma(pretrained, image_size)
        else:
            if tokenizer is None:
                tokenizer = byte_tokenizer()
                tokenizer.bos_token = "<|im_start|>"
            text = GemmaConfig(**{"vocab_size": len(tokenizer), **text_config})
            vision = SiglipVisionConfig(**vision_config | {"image_size": image_size, "vision_use_head": False})
            vlm = PaliGemmaModel(
                PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=text.hidden_size)
            )
        shared = {name: getattr(vlm.config.text_config, name) for name in SHARED}
        config = PI0Config(
            vlm_config=vlm.config,
            dit_config=GemmaConfig(**shared | expert_config | NO_TOKENS),
            chunk_size=chunk,
            max_state_dim=state_dim,
            max_action_dim=action_dim,
        )
        config.dit_config.vocab_size = 1
        pi0 = assemble(config, vlm)
        pi0.set_attn_implementation(attention)
        return cls(pi0, tokenizer, normalizer, chunk=chunk, image_size=image_size, **arguments)

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        config = self.pi0.config
        return {
            "pretrained": None,
            "vision_config": config.vlm_config.vision_config.to_diff_dict(),
            "text_config": config.vlm_config.text_config.to_diff_dict(),
            "expert_config": config.dit_config.to_diff_dict(),
        }

    def vision_modules(self) -> list[nn.Module]:
        vlm = self.pi0.model.vlm
        return [vlm.vision_tower] + ([vlm.multi_modal_projector] if self.tap_layer == "post_projector" else [])

    def prepare(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {c: resize_with_pad(frames, self.image_size) for c, frames in images.items() if c in self.cameras}

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        """Taps: pre_projector = SigLIP's tokens after its last norm, post_projector = what the language model reads."""
        vlm, frames = self.pi0.model.vlm, torch.cat([*images.values()])
        tower = vlm.vision_tower(frames.float() / 127.5 - 1, output_hidden_states=isinstance(self.tap_layer, int))
        embeds = tower.last_hidden_state if self.dual else vlm.multi_modal_projector(tower.last_hidden_state)
        taps = {"pre_projector": tower.last_hidden_state, "post_projector": embeds}
        tap = taps[self.tap_layer] if isinstance(self.tap_layer, str) else tower.hidden_states[self.tap_layer + 1]
        return of_cameras(VisualTokens(embeds, tap, frames=frames if self.dual else None), images)

    def make_speaking(self, language_head: str) -> None:
        self.speaks = True
        if self.tokenizer.eos_token_id is None:
            self.tokenizer.eos_token = "<|im_end|>"  # of the byte tokeniser, which marks no end
        self.pi0.model.vlm.language_model.requires_grad_(True)  # the last layer is read again

    def drop_action_head(self) -> None:
        self.pi0.model.dit = self.pi0.embed_action_time = self.pi0.action_out_proj = None

    def make_dual(self) -> None:
        require_own_tap(self.tap_layer)
        vlm = self.pi0.model.vlm
        self.dual, self.frozen = True, Frozen(vlm.vision_tower)
        vlm.multi_modal_projector.linear = widened(vlm.multi_modal_projector.linear)

    def fused(self, tokens: VisualTokens) -> VisualTokens:
        if tokens.frames is None:
            return tokens
        frozen = self.frozen(tokens.frames.float() / 127.5 - 1).last_hidden_state
        return VisualTokens(self.pi0.model.vlm.multi_modal_projector(beside(frozen, tokens.embeds)), tokens.tap)

    def prefix(self, visual: dict[str, VisualTokens], instructions: list[str]) -> tuple[Cache, Tensor]:
        """The language model's keys and values of images and prompt, and which of the L positions are no pad (B, L)."""
        ids, valid = self.tokenize(instructions, self.pi0.device)
        vlm = self.pi0.model.vlm
        text = vlm.language_model.embed_tokens(ids)
        images = torch.cat([self.fused(visual[camera]).embeds for camera in self.cameras], dim=1).to(text.dtype)
        valid = torch.cat([torch.ones_like(images[..., 0], dtype=torch.long), valid], dim=1)
        embeds = torch.cat([images, text], dim=1)
        cache = vlm(
            inputs_embeds=embeds,
            attention_mask=valid,
            position_ids=valid.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(valid),  # one block, seen in both directions
            use_cache=True,
        ).past_key_values
        return cache, valid

    def velocity(self, prefix: tuple[Cache, Tensor], state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, H, action_dim) at x (B, H, action_dim) and times t (B,), given state (B, state_dim)."""
        cache, valid = prefix
        velocity = self.pi0(state=state, noise=x, timestep=t, attention_mask=valid, past_key_values=cache).logits
        cache.crop(valid.shape[1] - cache.get_seq_length())  # the suffix leaves its own keys and values there
        return velocity.float()

    def sampler(self, prefix: tuple[Cache, Tensor], state: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`velocity` as a function of x and t, without gradients and with all else computed once."""
        if self.fast and supports(self.pi0.model.dit):
            return ExpertSampler(self.pi0, *prefix, state)
        return partial(self.velocity, prefix, state)

    def tokenize(self, instructions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and validity (B, L) of BOS, the cleaned instruction and a newline token, padded on the right with 0."""
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        rows = []
        for instruction in instructions:
            text = instruction.strip().replace("_", " ").replace("\n", " ")
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            rows.append([self.tokenizer.bos_token_id, *ids, *newline][: self.max_text_tokens])
        longest = max(map(len, rows))
        ids = sent([row + [0] * (longest - len(row)) for row in rows], device)
        valid = sent([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device)
        return ids, valid

    def padded_state(self, state: Tensor) -> Tensor:
        """Normalised proprioception (B, state_dim)."""
        if state.shape[-1] > self.state_dim:
            raise UserError(f"the state has {state.shape[-1]} numbers; policy.state_dim={self.state_dim} is too small")
        return F.pad(self.normalizer.normalize_state(state.float()), (0, self.state_dim - state.shape[-1]))

    def padded_actions(self, actions: Tensor) -> Tensor:
        """Physical actions (B, H, 7) as the flow's data (B, H, action_dim)."""
        motion = self.normalizer.normalize(actions)[..., :GRIPPER]
        gripper = (actions[..., GRIPPER:] - self.gripper_centre) / self.gripper_scale
        return F.pad(torch.cat([motion, gripper], dim=-1), (0, self.action_dim - actions.shape[-1]))

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Mean squared error of the velocity over valid steps × all `action_dim` dims (§7.2)."""
        valid = batch["action_valid"]
        actions = self.padded_actions(hold_last(batch["actions"], valid))  # steps see each other, valid or not
        t = beta_times(len(actions), actions.device)
        x, target = interpolate(actions, torch.randn_like(actions), t)
        prefix = self.prefix(visual, batch["instruction"])
        error = (self.velocity(prefix, self.padded_state(batch["state"]), x, t) - target).square().mean(-1)
        return {"loss": (error * valid).sum() / valid.sum()}

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        prefix = self.prefix(self.encode_images(self.prepare(observation["images"])), observation["instruction"])
        state = self.padded_state(observation["state"])
        noise = initial_noise(observation, (self.chunk, self.action_dim), state.device)
        actions = euler(self.sampler(prefix, state), noise, self.flow_steps)
        motion = actions[..., :GRIPPER]
        if self.normalizer.scheme not in ("none", "zscore"):
            motion = motion.clamp(-1, 1)
        gripper = actions[..., GRIPPER] * self.gripper_scale + self.gripper_centre
        return actions_from_normalized(motion, gripper > 0.5, self.normalizer)


def load_paligemma(pretrained: str, image_size: int) -> tuple[PaliGemmaModel, PreTrainedTokenizerBase]:
    """PaliGemma without its language head (π0 generates no text), in float32."""
    try:
        vlm = PaliGemmaForConditionalGeneration.from_pretrained(pretrained, dtype=torch.float32).model
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"policy.pretrained={pretrained} cannot be loaded: {error}") from error
    if (size := vlm.config.vision_config.image_size) != image_size:
        raise UserError(f"policy.pretrained={pretrained} sees {size} pixels; set policy.image_size={size}")
    return vlm, tokenizer


def assemble(config: PI0Config, vlm: PaliGemmaModel) -> PI0ForConditionalGeneration:
    """π0 around `vlm`; expert and projections are random.

    The projections keep torch's own initialisation, as in openpi: transformers' 0.02 is a fifth of it for state and
    actions, and slower to learn with.
    """
    with torch.device("meta"):
        pi0 = PI0ForConditionalGeneration(config)
    pi0.model.vlm, pi0.model.dit = vlm, GemmaModel(config.dit_config)
    pi0.embed_action_time = PI0ActionTimeEmbedding(config)
    pi0.action_out_proj = nn.Linear(config.dit_config.hidden_size, config.max_action_dim)
    return pi0


def resize_with_pad(frames: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, h, w) → (B, 3, size, size), aspect kept, black bars on both sides of the shorter one (§7.3)."""
    height, width = frames.shape[-2:]
    ratio = max(height, width) / size
    inner = int(height / ratio), int(width / ratio)
    if inner != (height, width):
        frames = resize(frames, inner)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    return F.pad(frames, (left, size - inner[1] - left, top, size - inner[0] - top))
