"""SpatialVLA: PaliGemma2 that sees depth and writes actions as tokens of a spatial grid (fact sheet §5; IDL table 9).

SigLIP, Gemma2 and ZoeDepth come from transformers. Sequence: image tokens, BOS, the instruction in lower case and a
newline, then three tokens per step and EOS. SigLIP's tokens get an egocentric 3D position embedding from ZoeDepth's
depth (vla/ego3d.py) before the projector. Everything before the actions sees itself in both directions, action tokens
see what precedes them, padding is seen by nobody; positions count from 1 and skip padding.

ZoeDepth and the text embeddings are frozen; the action tokens have embeddings of their own, and the language head is
not tied to either. Future frames go through SigLIP only: depth is estimated in `loss` and `predict`.

Departures from the public code, each on purpose:
- The mask above. `mask: released_flash` trains causally throughout, as the published scripts do with flash attention;
  `released_eager` lets everyone see the padding, as the published code does without it (§0a.5). Neither changes
  `predict`: the published evaluation generates with the whole prefix visible, one sample at a time.
- Steps past the episode's end do not count in the loss; there the public code trains on zero motion.
- Each frame goes through the metric head that ZoeDepth's classifier chooses for it, not for its batch.
- Geometry is computed in float32 (public: bfloat16); frames are resized bicubically (public: Lanczos, then area).
- Exactly `3 · chunk` tokens are generated; the public code stops at EOS and fills up with each kind's first token.

Gemma's factor √width is inside the embedding module of transformers ≥ 5.5: image features enter as they leave the
projector, and the action tokens' embeddings are multiplied here (§5.2). Attention is always eager, the only
implementation on which transformers' Gemma2 caps its logits under an arbitrary mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
    ZoeDepthForDepthEstimation,
)

from data.normalization import ActionNormalizer
from vla.action_tokens.grid import TOKENS_PER_STEP, SpatialGrid, adapt_embeddings, add_action_tokens
from vla.dual_encoder import Frozen, beside, require_own_tap, widened
from vla.ego3d import Ego3D, estimate_depth, load_depth, random_depth
from vla.errors import UserError
from vla.policy import GRIPPER, IGNORED, Policy, VisualTokens, actions_from_normalized, hold_last, sent
from vla.prefix_lm import MASKS, additive, places_of, visible
from vla.tokenizer import byte_tokenizer
from vla.vision import parse_tap


class SpatialVLA(Policy):
    """See the module's docstring; attributes as in Policy.

    Args:
        language_model: Gemma2 whose vocabulary ends where the tokenizer's action tokens begin.
        intrinsics: fx, fy, cx, cy of a width × height image; the released models use one camera's for every data set.
        bins: cells of theta, phi, r, roll, pitch, yaw.
        min_sigma: least width of the Gaussians the grid is fitted with (0.5 in the authors' pretraining).
        adapt_grid: `fit_to` refits a grid that came with the weights too, and moves the action tokens' embeddings to
            its cells; the language head's rows stay, as in the public code.
        mask: one of MASKS.
        ensemble: temperature of temporal ensembling in rollouts.
    """

    of_the_run = (*Policy.of_the_run, "adapt_grid", "min_sigma", "mask", "ensemble")

    def __init__(
        self,
        vision_tower: SiglipVisionModel,
        language_model: Gemma2Model,
        depth_model: ZoeDepthForDepthEstimation,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ActionNormalizer,
        *,
        chunk: int,
        cameras: list[str],
        image_size: int,
        tap: str,
        intrinsics: dict[str, float],
        bins: list[int],
        min_sigma: float,
        adapt_grid: bool,
        mask: str,
        ensemble: float | None,
    ):
        super().__init__(chunk, cameras, image_size, tap, normalizer)
        if len(cameras) != 1:
            raise UserError(f"spatialvla reads one camera, not {list(cameras)}; set cameras=[static]")
        if mask not in MASKS:
            raise UserError(f"policy.mask={mask} is not known; choose one of {', '.join(MASKS)}")
        if normalizer.scheme == "zscore":
            raise UserError("spatialvla's tokens cover actions in ±1; normalization=zscore exceeds it, set q99")
        self.vision_tower, self.language_model, self.depth_model = vision_tower, language_model, depth_model
        self.tokenizer, self.mask, self.ensemble = tokenizer, mask, ensemble
        self.min_sigma, self.adapt_grid = min_sigma, adapt_grid
        self.tap_layer = parse_tap(tap, vision_tower.config.num_hidden_layers)
        self.grid = SpatialGrid(bins)
        self.first_action = language_model.config.vocab_size
        vision, text = vision_tower.config, language_model.config
        self.ego3d = Ego3D(intrinsics, image_size, vision.patch_size, vision.hidden_size)
        self.projector = nn.Linear(vision.hidden_size, text.hidden_size)
        self.action_embedding = nn.Embedding(self.grid.size, text.hidden_size)
        self.lm_head = nn.Linear(text.hidden_size, self.first_action + self.grid.size, bias=False)
        for fresh in (self.action_embedding, self.lm_head):
            nn.init.normal_(fresh.weight, std=text.initializer_range)
        depth_model.requires_grad_(False)
        language_model.embed_tokens.requires_grad_(False)

    @classmethod
    def build(
        cls,
        normalizer: ActionNormalizer,
        *,
        pretrained: str | None = None,
        pretrained_depth: str | None = None,
        vision_config: dict | None = None,
        text_config: dict | None = None,
        depth_config: dict | None = None,
        image_size: int,
        bins: list[int],
        attention: str = "sdpa",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **arguments,
    ) -> SpatialVLA:
        """From a released PaliGemma2 (`pretrained`) and ZoeDepth (`pretrained_depth`), each a hub id or a folder; where
        one is not given, random weights of the given dimensions.

        Args:
            depth_config: ZoeDepthConfig's arguments, those of its BEiT under `backbone_config`.
            attention: transformers' attn_implementation of the vision encoder (sdpa, eager).

        Raises:
            UserError: a source cannot be loaded, or is another model.
        """
        grid_size = SpatialGrid(bins).size
        paligemma = None
        if pretrained is not None:
            paligemma, tokenizer = load_paligemma(pretrained, image_size)
        elif tokenizer is None:
            tokenizer = byte_tokenizer()
            tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
        first_action = add_action_tokens(tokenizer, grid_size)
        if paligemma is None:
            vision_config = vision_config | {"image_size": image_size, "vision_use_head": False}
            vision_tower = SiglipVisionModel(SiglipVisionConfig(**vision_config))
            language_model = Gemma2Model(Gemma2Config(**text_config | {"vocab_size": first_action}))
        else:
            vision_tower, language_model = paligemma.model.vision_tower, paligemma.model.language_model
            cut_vocabulary(language_model, first_action, pretrained)
        vision_tower.set_attn_implementation(attention)
        depth_model = load_depth(pretrained_depth) if pretrained_depth else random_depth(depth_config)
        policy = cls(
            vision_tower, language_model, depth_model, tokenizer, normalizer,
            image_size=image_size, bins=bins, **arguments,
        )  # fmt: skip
        if paligemma is not None:
            policy.start_from(paligemma)
        return policy

    @torch.no_grad()
    def start_from(self, paligemma: PaliGemmaForConditionalGeneration) -> None:
        """Its projector; its embeddings as the language head's rows of text; their mean for all actions, in and out."""
        self.projector.load_state_dict(paligemma.model.multi_modal_projector.linear.state_dict())
        text = self.language_model.embed_tokens.weight
        self.lm_head.weight[: self.first_action] = text
        self.lm_head.weight[self.first_action :] = text.mean(0)
        self.action_embedding.weight[:] = text.mean(0)

    def architecture(self) -> dict:
        """What `build` needs, beside the config, to make the same modules again without the source of their weights."""
        return {
            "pretrained": None,
            "pretrained_depth": None,
            "vision_config": self.vision_tower.config.to_diff_dict(),
            "text_config": self.language_model.config.to_diff_dict(),
            "depth_config": self.depth_model.config.to_diff_dict(),
        }

    def train(self, mode: bool = True) -> SpatialVLA:
        super().train(mode)
        self.depth_model.eval()
        return self

    def fit_to(self, actions: Tensor) -> None:
        """Fit the grid of a fresh policy to the training actions (N, 7), physical units; one that came with the weights
        is kept unless `adapt_grid`."""
        came_with_weights = bool(self.grid.fitted)
        if came_with_weights and not self.adapt_grid:
            return
        old = [edges.clone() for edges in self.grid.edges()]
        self.grid.fit(self.normalizer.normalize(actions), self.min_sigma)
        if came_with_weights:
            self.action_embedding.weight.data = adapt_embeddings(
                self.action_embedding.weight.data, old, self.grid.edges()
            )

    def vision_modules(self) -> list[nn.Module]:
        behind_projector = [self.ego3d, self.projector] if self.tap_layer == "post_projector" else []
        return [self.vision_tower, *behind_projector]

    def encode_images(self, images: dict[str, Tensor]) -> dict[str, VisualTokens]:
        """Taps: pre_projector = SigLIP's tokens after its last norm, before the 3D embedding; post_projector = what the
        language model reads, for which depth is estimated here."""
        (camera,) = self.cameras
        frames = images[camera]
        tower = self.vision_tower(self.pixels(frames), output_hidden_states=isinstance(self.tap_layer, int))
        embeds = tower.last_hidden_state
        if self.tap_layer == "post_projector":
            features = self.image_features(VisualTokens(embeds, embeds, frames=frames))
            return {camera: VisualTokens(features, features)}
        tap = embeds if self.tap_layer == "pre_projector" else tower.hidden_states[self.tap_layer + 1]
        return {camera: VisualTokens(embeds, tap, frames=frames)}

    def image_features(self, tokens: VisualTokens) -> Tensor:
        """(B, P, D) for the language model: SigLIP's tokens and where they are in space, projected."""
        if tokens.frames is None:  # encode_images has projected them already
            return tokens.embeds
        position = self.ego3d(estimate_depth(self.depth_model, tokens.frames)).to(tokens.embeds.dtype)
        embeds = tokens.embeds + position
        if self.dual:
            frozen = self.frozen(self.pixels(tokens.frames)).last_hidden_state
            embeds = beside(frozen.to(embeds.dtype) + position, embeds)
        return self.projector(embeds)

    def pixels(self, frames: Tensor) -> Tensor:
        return (frames.float() / 127.5 - 1).to(self.vision_tower.dtype)

    def make_speaking(self, language_head: str) -> None:
        self.speaks = True

    def drop_action_head(self) -> None:
        text = nn.Linear(self.lm_head.in_features, self.first_action, bias=False)
        text.weight = nn.Parameter(self.lm_head.weight.data[: self.first_action].clone())
        self.lm_head, self.action_embedding, self.grid = text, None, None

    def make_dual(self) -> None:
        require_own_tap(self.tap_layer)
        self.dual, self.frozen = True, Frozen(self.vision_tower)
        self.projector = widened(self.projector)

    def tokenize(self, instructions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and validity (B, L) of BOS and the instruction in lower case with a newline, padded on the right."""
        texts = [self.tokenizer.encode(text.lower() + "\n", add_special_tokens=False) for text in instructions]
        rows = [[self.tokenizer.bos_token_id, *text] for text in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = sent([row + [pad] * (longest - len(row)) for row in rows], device)
        return ids, sent([[i < len(row) for i in range(longest)] for row in rows], device)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L, D) of text and action tokens, each by its own embedding, both scaled by √D."""
        text = self.language_model.embed_tokens(ids.clamp(max=self.first_action - 1))
        action = self.action_embedding((ids - self.first_action).clamp(min=0)) * text.shape[-1] ** 0.5
        return torch.where((ids >= self.first_action)[..., None], action.to(text.dtype), text)

    def prefix(self, tokens: VisualTokens, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P + L, D) of image and text, and which of them are no padding (B, P + L)."""
        features = self.image_features(tokens)
        ids, valid = self.tokenize(instructions, features.device)
        text = self.embed(ids)
        return torch.cat([features.to(text.dtype), text], dim=1), F.pad(valid, (features.shape[1], 0), value=True)

    def read(self, embeds: Tensor, seen: Tensor, places: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """The language model's states (B, Q, D) of the last Q of K positions, the others being in `cache`.

        Args:
            seen: bool (B, Q, K), which positions each of the Q may look at.
            places: (B, K) of every position in its sequence, from 1.
        """
        own = places[:, -embeds.shape[1] :]
        near = own[:, :, None] - places[:, None] < self.language_model.config.sliding_window
        masks = {
            "full_attention": additive(seen, embeds.dtype),
            "sliding_attention": additive(seen & near, embeds.dtype),
        }
        return self.language_model(
            inputs_embeds=embeds, attention_mask=masks, position_ids=own, past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state  # fmt: skip

    def logits(self, states: Tensor) -> Tensor:
        """(…, vocabulary and action tokens), softly capped as Gemma2's."""
        cap = self.language_model.config.final_logit_softcapping
        logits = self.lm_head(states)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def suffix_logits(self, tokens: VisualTokens, instructions: list[str], suffix: Tensor) -> Tensor:
        """(B, S, V): what is predicted for each of the ids `suffix` (B, S) from everything before it."""
        before, valid = self.prefix(tokens, instructions)
        length, last = before.shape[1], valid.sum(1) - 1
        embeds = torch.cat([before, self.embed(suffix)], dim=1)
        valid = F.pad(valid, (0, suffix.shape[1]), value=True)
        places = places_of(valid)
        states = self.read(embeds, visible(self.mask, valid, places, length), places)
        newline = states[torch.arange(len(states), device=last.device), last]
        return self.logits(torch.cat([newline[:, None], states[:, length:-1]], dim=1))

    def loss(self, batch: dict, visual: dict[str, VisualTokens]) -> dict[str, Tensor]:
        """Cross-entropy over the action tokens of valid steps and EOS."""
        valid = batch["action_valid"]
        actions = self.normalizer.normalize(hold_last(batch["actions"], valid))  # later tokens read the invalid ones
        ids = self.grid.encode(actions).flatten(1) + self.first_action
        suffix = F.pad(ids, (0, 1), value=self.tokenizer.eos_token_id)
        counted = F.pad(valid.repeat_interleave(TOKENS_PER_STEP, dim=1), (0, 1), value=True)
        logits = self.suffix_logits(visual[self.cameras[0]], batch["instruction"], suffix).float()
        tokens, right = counted.sum(), (logits.argmax(-1) == suffix) & counted
        loss = F.cross_entropy(logits.transpose(1, 2), suffix.masked_fill(~counted, IGNORED))
        return {"loss": loss, "token_accuracy": right.sum() / tokens, "tokens": tokens}

    @torch.no_grad()
    def predict(self, observation: dict) -> Tensor:
        visual = self.encode_images(self.prepare(observation["images"]))
        ids = self.generate(visual[self.cameras[0]], observation["instruction"])
        actions = self.grid.decode((ids - self.first_action).unflatten(1, (self.chunk, TOKENS_PER_STEP)))
        return actions_from_normalized(actions[..., :GRIPPER], actions[..., GRIPPER] > 0.5, self.normalizer)

    def generate(self, tokens: VisualTokens, instructions: list[str]) -> Tensor:
        """The likeliest id (B, 3 · chunk) one after the other, of the whole vocabulary."""
        embeds, valid = self.prefix(tokens, instructions)
        cache, places = DynamicCache(), places_of(valid)
        states = self.read(embeds, visible("prefix_lm", valid, places, valid.shape[1]), places, cache)
        state = states[torch.arange(len(states), device=valid.device), valid.sum(1) - 1]
        ids = [self.logits(state).argmax(-1)]
        while len(ids) < TOKENS_PER_STEP * self.chunk:
            valid = F.pad(valid, (0, 1), value=True)
            state = self.read(self.embed(ids[-1][:, None]), valid[:, None], places_of(valid), cache)[:, 0]
            ids.append(self.logits(state).argmax(-1))
        return torch.stack(ids, dim=1)


def load_paligemma(
    pretrained: str, image_size: int
) -> tuple[PaliGemmaForConditionalGeneration, PreTrainedTokenizerBase]:
    """PaliGemma2 in float32 and its tokenizer."""
    try:
        paligemma = PaliGemmaForConditionalGeneration.from_pretrained(pretrained, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"policy.pretrained={pretrained} cannot be loaded: {error}") from error
    if (kind := paligemma.config.text_config.model_type) != "gemma2":
        raise UserError(f"policy.pretrained={pretrained} has {kind} for a language model; give a PaliGemma2")
    if (size := paligemma.config.vision_config.image_size) != image_size:
        raise UserError(f"policy.pretrained={pretrained} sees {size} pixels; set policy.image_size={size}")
    return paligemma, tokenizer


def cut_vocabulary(language_model: Gemma2Model, size: int, source: str) -> None:
    """Keep the embeddings of the tokenizer's `size` tokens; PaliGemma's matrix is padded beyond them."""
    embedding = language_model.embed_tokens
    if len(embedding.weight) < size:
        raise UserError(f"policy.pretrained={source} embeds {len(embedding.weight)} tokens, its tokenizer has {size}")
    embedding.weight = nn.Parameter(embedding.weight.data[:size].clone())
    embedding.num_embeddings = language_model.config.vocab_size = size
