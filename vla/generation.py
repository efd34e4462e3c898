"""Text from a policy's own vision-language model: a picture and a prompt in, the likeliest words out (GenVLA Fig. 5).

A policy says actions; what is left of the model it was made from is asked here, with the picture on the policy's own
image path. Greedy, batched, with the keys and values cached; padding stands behind the prompt, is masked, and takes no
position. Prompts stand in the text that each model's pretraining put around them (`TEMPLATES`):

openvla   BOS, the image's tokens, then text, all causal; Llama-2's head (fact sheet §6, §8.6)
pi0       image, BOS and text see each other, the answer sees what precedes it; the head is the embedding (§7)
spatialvla as pi0, behind its own image features (§5.6)
vlm4vla   Qwen3-VL's chat and its own positions, in which the image spans a square (the action prompt counts plainly,
          §3.3). The policy keeps no language head, and training never touched it: `head` says whose to use

    model = text_model(policy)
    answers = generate(model, frames, ["What is on the table?"], max_new_tokens=16)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from vla.baselines.openvla import OpenVLA
from vla.baselines.pi0 import Pi0
from vla.baselines.spatialvla import SpatialVLA
from vla.baselines.vlm4vla import IMAGE, VLM4VLA
from vla.errors import UserError
from vla.policy import Policy, VisualTokens, sent
from vla.prefix_lm import places_of, visible
from vla.released.source import read_tensors, resolve, take, weight_files

TEMPLATES = {
    OpenVLA: "In: {prompt}\nOut:",
    Pi0: "{prompt}\n",
    SpatialVLA: "{prompt}\n",
    VLM4VLA: f"<|im_start|>user\n<|vision_start|>{IMAGE}<|vision_end|>{{prompt}}<|im_end|>\n<|im_start|>assistant\n",
}
TIED = "tied"
"""`head` of Qwen3-VL's 2B and 4B models, whose language head is the embedding."""


@dataclass(frozen=True)
class Prefix:
    """Pictures and prompts as the language model has read them.

    Attributes:
        hidden: (B, D) state of each row's last position.
        cache: keys and values of the L positions, padding among them.
        seen: (B, L), 1 where a position is no padding.
        position: (B,) of the next token.
    """

    hidden: Tensor
    cache: Cache
    seen: Tensor
    position: Tensor


@dataclass(frozen=True)
class TextModel:
    """What `generate` asks.

    Attributes:
        encode: a text → its ids, BOS included where the model has one, the picture's place as one id in Qwen's.
        read_ids: visual tokens of B pictures and B rows of such ids → Prefix.
        model: goes on token by token.
        head: (V, D), states to logits.
        stop: ids that end an answer.
        template: text around a prompt, with `{prompt}`.
        softcap: of the logits, Gemma 2's.
    """

    policy: Policy
    encode: Callable[[str], list[int]]
    read_ids: Callable[[VisualTokens, list[list[int]]], Prefix]
    model: nn.Module
    head: Tensor
    stop: list[int]
    template: str
    softcap: float | None = None

    def read(self, tokens: VisualTokens, texts: list[str]) -> Prefix:
        return self.read_ids(tokens, [self.encode(text) for text in texts])

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) of states (…, D)."""
        logits = F.linear(hidden, self.head.to(hidden.dtype))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def text_model(policy: Policy, template: str | None = None, head: str | None = None) -> TextModel:
    """The language model of a policy, under string actions that of its baseline, as something that says text.

    Args:
        template: instead of the baseline's own in TEMPLATES.
        head: of vlm4vla only: "tied", or the folder or hub id of the released model whose lm_head it is.

    Raises:
        UserError: the policy keeps no language model that answers, a template without `{prompt}`, no such head.
    """
    policy = getattr(policy, "base", policy)  # under string actions (vla/string_policy.py)
    if type(policy) not in TEMPLATES:
        known = ", ".join(sorted(kind.__name__ for kind in TEMPLATES))
        raise UserError(f"{type(policy).__name__} cannot answer in text; evaluation=vqa needs a policy of {known}")
    template = TEMPLATES[type(policy)] if template is None else template
    if template.count("{prompt}") != 1:
        raise UserError(f"evaluation.vqa.template must hold {{prompt}} once; it is {template!r}")
    if head is not None and not isinstance(policy, VLM4VLA):
        raise UserError(f"evaluation.vqa.head={head} is for vlm4vla; {type(policy).__name__} has a language head")
    tokenizer = policy.tokenizer
    if isinstance(policy, OpenVLA):
        read, model, weight = _read_openvla, policy.language_model.model, policy.language_model.lm_head.weight
    elif isinstance(policy, SpatialVLA):
        read, model = _read_spatialvla, policy.language_model
        weight = policy.lm_head.weight[: policy.first_action]
    elif isinstance(policy, Pi0):
        read, model = _read_pi0, policy.pi0.model.vlm.language_model
        weight = model.embed_tokens.weight
    else:
        before = template.partition("{prompt}")[0]
        if before.count(IMAGE) != 1 or template.count(IMAGE) != 1:
            raise UserError(f"evaluation.vqa.template must hold {IMAGE} once, before {{prompt}}; it is {template!r}")
        read, model = _read_vlm4vla, policy.language_model
        weight = language_head(policy, head)
    stop = [tokenizer.eos_token_id]
    if isinstance(policy, VLM4VLA):
        stop.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    stop = [token for token in stop if token is not None]
    softcap = policy.language_model.config.final_logit_softcapping if isinstance(policy, SpatialVLA) else None

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids if isinstance(policy, VLM4VLA) else [tokenizer.bos_token_id, *ids]

    return TextModel(
        policy, encode, lambda tokens, rows: read(policy, tokens, rows), model, weight, stop, template, softcap
    )


@torch.inference_mode()
def generate(model: TextModel, frames: Tensor, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt, up to a stop token, without surrounding space.

    Args:
        frames: uint8 (B, 3, image_size, image_size), prepared by the policy.
    """
    policy = model.policy
    camera = policy.cameras[0]
    tokens = policy.fused(policy.encode_images({camera: frames})[camera])
    texts = [model.template.replace("{prompt}", prompt) for prompt in prompts]
    return [_text(policy.tokenizer, ids) for ids in greedy(model, model.read(tokens, texts), max_new_tokens)]


def greedy(model: TextModel, prefix: Prefix, max_new_tokens: int) -> list[list[int]]:
    """The likeliest ids, one after the other, of each row, without the stop token."""
    hidden, cache, seen, position = prefix.hidden, prefix.cache, prefix.seen, prefix.position
    stop = torch.tensor(model.stop, dtype=torch.long, device=hidden.device)
    said: list[Tensor] = []
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    while True:
        token = model.logits(hidden).argmax(-1)
        ended = ended | torch.isin(token, stop)
        said.append(token.masked_fill(ended, -1))
        if len(said) == max_new_tokens or ended.all():
            return [[token for token in row if token >= 0] for row in torch.stack(said, dim=1).tolist()]
        seen = F.pad(seen, (0, 1), value=1)
        output = model.model(
            inputs_embeds=model.model.embed_tokens(token)[:, None],
            attention_mask=seen,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden, cache, position = output.last_hidden_state[:, 0], output.past_key_values, position + 1


def language_head(policy: VLM4VLA, head: str | None) -> Tensor:
    """(V, D) on the policy's device."""
    embedding = policy.language_model.embed_tokens.weight
    if policy.speaks and head is None:  # trained with the policy
        return embedding if policy.lm_head is None else policy.lm_head.weight
    if head is None:
        raise UserError(
            "a vlm4vla policy keeps no language head: set evaluation.vqa.head=tied for Qwen3-VL 2B and 4B and for "
            "random weights, or to the folder or hub id of the released model (8B)"
        )
    return embedding if head == TIED else read_head(head, tuple(embedding.shape)).to(embedding)


def read_head(source: str, shape: tuple[int, int], key: str = "evaluation.vqa.head") -> Tensor:
    """lm_head.weight of a checkpoint, named by `key`, without reading the rest of it where the file allows."""
    path = resolve(source)
    for file in weight_files(path) if path.is_dir() else [path]:
        if file.suffix != ".safetensors":
            tensors = read_tensors(file)
        else:
            try:
                with safe_open(file, "pt") as content:
                    keys = {"lm_head.weight"} & set(content.keys())
                    tensors = {key: content.get_tensor(key) for key in keys}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is missing or damaged ({error}); download it again") from error
        if "lm_head.weight" in tensors:
            return take(tensors, "lm_head.weight", shape)
    raise UserError(f"{key}={source} holds no lm_head.weight: its head is the embedding; set it to tied")


def _read_openvla(policy: OpenVLA, tokens: VisualTokens, rows: list[list[int]]) -> Prefix:
    ids, lengths = _pad(rows, tokens.embeds.device)
    embeds = policy.embed({policy.cameras[0]: tokens}, ids)
    return _prefix(policy.language_model.model, embeds, lengths + embeds.shape[1] - ids.shape[1])


def _read_pi0(policy: Pi0, tokens: VisualTokens, rows: list[list[int]]) -> Prefix:
    ids, lengths = _pad(rows, tokens.embeds.device)
    vlm = policy.pi0.model.vlm
    text = vlm.language_model.embed_tokens(ids)
    embeds = torch.cat([tokens.embeds.to(text.dtype), text], dim=1)
    both_ways = torch.zeros(embeds.shape[:2], dtype=torch.long, device=ids.device)  # one block of the prefix
    return _prefix(vlm, embeds, lengths + tokens.embeds.shape[1], token_type_ids=both_ways)


def _read_spatialvla(policy: SpatialVLA, tokens: VisualTokens, rows: list[list[int]]) -> Prefix:
    features = policy.image_features(tokens)
    ids, lengths = _pad(rows, features.device)
    text = policy.language_model.embed_tokens(ids)
    embeds = torch.cat([features.to(text.dtype), text], dim=1)
    lengths = lengths + features.shape[1]
    seen = torch.arange(embeds.shape[1], device=ids.device) < lengths[:, None]
    cache, places = DynamicCache(config=policy.language_model.config), places_of(seen)
    states = policy.read(embeds, visible("prefix_lm", seen, places, embeds.shape[1]), places, cache)
    hidden = states[torch.arange(len(states), device=ids.device), lengths - 1]
    return Prefix(hidden, cache, seen.long(), lengths + 1)


def _read_vlm4vla(policy: VLM4VLA, tokens: VisualTokens, rows: list[list[int]]) -> Prefix:
    """Qwen3-VL's positions: text counts on, the image's rows and columns count from where it begins."""
    count = tokens.embeds.shape[1]
    side = math.isqrt(count)
    start = rows[0].index(policy.image_id)  # the template's, the same in every row
    ids, lengths = _pad([row[:start] + [0] * count + row[start + 1 :] for row in rows], tokens.embeds.device)
    embeds = policy.language_model.embed_tokens(ids)
    embeds = torch.cat([embeds[:, :start], tokens.embeds.to(embeds.dtype), embeds[:, start + count :]], dim=1)
    place = torch.arange(ids.shape[1], device=ids.device)
    is_image = (place >= start) & (place < start + count)
    plain = torch.where(place < start, place, place - count + side)
    patch = (place - start).clamp(0, count - 1)
    in_image = torch.stack([torch.zeros_like(patch), patch // side, patch % side]) + start
    positions = torch.where(is_image, in_image, plain)[:, None].expand(3, len(ids), -1)
    deepstack = [layer.flatten(0, 1).to(embeds.dtype) for layer in tokens.deepstack] if policy.deepstack else []
    extra = {}
    if deepstack:
        rows_of_image = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, start : start + count].flatten()
        extra = {"visual_pos_masks": rows_of_image, "deepstack_visual_embeds": deepstack}
    return _prefix(policy.language_model, embeds, lengths, positions, lengths - count + side, **extra)


def _prefix(
    model: nn.Module,
    embeds: Tensor,
    lengths: Tensor,
    positions: Tensor | None = None,
    following: Tensor | None = None,
    **extra,
) -> Prefix:
    """Read embeds (B, L, D), of which each row's first `lengths` count; positions 0, 1, … unless given."""
    place = torch.arange(embeds.shape[1], device=embeds.device)
    seen = (place < lengths[:, None]).long()
    output = model(
        inputs_embeds=embeds,
        attention_mask=seen,
        position_ids=place.expand(len(embeds), -1) if positions is None else positions,
        use_cache=True,
        **extra,
    )
    hidden = output.last_hidden_state[torch.arange(len(embeds), device=embeds.device), lengths - 1]
    return Prefix(hidden, output.past_key_values, seen, lengths if following is None else following)


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded on the right with 0, and their lengths (B,)."""
    longest = max(map(len, rows))
    ids = sent([row + [0] * (longest - len(row)) for row in rows], device)
    return ids, sent([len(row) for row in rows], device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Ids past the tokeniser's own (OpenVLA's actions at size tiny) are no text."""
    return tokenizer.decode([token for token in ids if token < len(tokenizer)], skip_special_tokens=True).strip()
