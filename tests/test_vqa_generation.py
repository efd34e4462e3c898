"""Text from a policy's language model: batched and cached, against transformers' own generate, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from data.normalization import ActionStatistics
from vla.build import build_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.generation import TEMPLATES, generate, greedy, text_model
from vla.policy import Policy
from vla.training import policy_arguments

PROMPTS = ["What is on the table?", "Is there a bowl?\nAnswer with one word.", "Why?"]
NEW = 12


def statistics() -> ActionStatistics:
    return ActionStatistics.of(torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).numpy())


def build(baseline: str, *overrides: str) -> Policy:
    cfg = compose_config("train", f"baseline={baseline}", "size=tiny", *overrides)
    torch.manual_seed(0)
    arguments = policy_arguments(cfg)
    return shaken(build_policy(baseline, statistics(), "none", arguments))


def shaken(policy: Policy) -> Policy:
    """Initial weights would say one token for ever, and so would an embedding that outweighs what layers add to it."""
    for name, parameter in policy.named_parameters():
        parameter.data += (0.02 if "embed_tokens" in name else 0.2) * torch.randn_like(parameter)
    return policy.eval()


def qwen() -> Policy:
    cfg = compose_config("train", "baseline=vlm4vla", "size=tiny")
    arguments = policy_arguments(cfg)
    arguments |= {"vision": "qwen", "vision_size": 64, "image_size": 64, "deepstack": True}
    arguments["vision_config"] = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=128, deepstack_visual_indexes=[0, 1]
    )
    arguments["text_config"] = arguments["text_config"] | {"num_hidden_layers": 3}
    torch.manual_seed(0)
    return shaken(build_policy("vlm4vla", statistics(), "none", arguments))


def pictures(policy: Policy) -> torch.Tensor:
    shape = (len(PROMPTS), 3, policy.image_size, policy.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def alone(policy: Policy, ids: torch.Tensor, stop: list[int]) -> str:
    """The text of generated ids up to a stop token."""
    ids = ids.tolist()
    ends = [index for index, token in enumerate(ids) if token in stop]
    ids = ids[: ends[0]] if ends else ids
    return policy.tokenizer.decode([i for i in ids if i < len(policy.tokenizer)], skip_special_tokens=True).strip()


def check(policy: Policy, head: str | None, reference) -> None:
    """The batch says what `reference(picture, text)` says of each row."""
    model, frames = text_model(policy, head=head), pictures(policy)
    said = generate(model, frames, PROMPTS, NEW)
    expected = []
    for frame, prompt in zip(frames, PROMPTS, strict=True):
        text = TEMPLATES[type(policy)].replace("{prompt}", prompt)
        with torch.no_grad():
            expected.append(alone(policy, reference(frame[None], text)[0], model.stop))
    assert said == expected
    assert len(set(said)) == len(PROMPTS), "rows that say the same show nothing"
    assert all(len(set(ids)) > 3 for ids in ids_of(model, frames)), "a token said for ever shows little"


def ids_of(model, frames) -> list[list[int]]:
    texts = [model.template.replace("{prompt}", prompt) for prompt in PROMPTS]
    images = dict.fromkeys(model.policy.cameras, frames)
    with torch.inference_mode():
        return greedy(model, model.read(model.policy.encode_images(images)["static"], texts), NEW)


def test_openvla_says_what_llama_says():
    policy = build("openvla")
    llama: LlamaForCausalLM = policy.language_model
    llama.generation_config.pad_token_id = 0

    def reference(frame, text):
        ids = [policy.tokenizer.bos_token_id, *policy.tokenizer.encode(text, add_special_tokens=False)]
        words = llama.get_input_embeddings()(torch.tensor([ids]))
        picture = policy.encode_images({"static": frame})["static"].embeds
        embeds = torch.cat([words[:, :1], picture, words[:, 1:]], dim=1)
        return llama.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, eos_token_id=None)

    check(policy, None, reference)


@pytest.mark.parametrize("cameras", ["[static]", "[static,wrist]"])
def test_pi0_says_what_paligemma_says(cameras):
    policy = build("pi0", f"cameras={cameras}")
    vlm = policy.pi0.model.vlm
    config = PaliGemmaConfig(**vlm.config.to_diff_dict() | {"image_token_id": len(policy.tokenizer) - 1})
    paligemma = PaliGemmaForConditionalGeneration(config).eval()
    paligemma.model.load_state_dict(vlm.state_dict())
    paligemma.tie_weights()

    def reference(frame, text):
        words = [policy.tokenizer.bos_token_id, *policy.tokenizer.encode(text, add_special_tokens=False)]
        ids = torch.tensor([[config.image_token_id] * 16 + words])
        return paligemma.generate(
            input_ids=ids,
            pixel_values=frame.float() / 127.5 - 1,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )[:, ids.shape[1] :]

    check(policy, None, reference)


def test_vlm4vla_says_what_qwen3_vl_says():
    """Positions in rows and columns, DeepStack, padding: as Qwen3-VL's own forward computes them."""
    policy = qwen()
    config = Qwen3VLConfig(
        text_config=policy.language_model.config.to_dict(),
        vision_config=policy.visual.model.config.to_dict(),
        image_token_id=policy.image_id,
        vision_start_token_id=policy.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        tie_word_embeddings=True,
    )
    vlm = Qwen3VLForConditionalGeneration(config).eval()
    vlm.model.visual.load_state_dict(policy.visual.model.state_dict())
    vlm.model.language_model.load_state_dict(policy.language_model.state_dict())
    vlm.tie_weights()
    grid = torch.tensor([[1, 4, 4]])

    def reference(frame, text):
        ids = torch.tensor([policy.tokenizer.encode(text.replace("<|image_pad|>", "<|image_pad|>" * 4))])
        return vlm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=policy.visual.patches(frame),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == policy.image_id).int(),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )[:, ids.shape[1] :]

    check(policy, "tied", reference)


def test_spatialvla_says_what_gemma2_says():
    """Without cache and padding: every token from the whole sequence, whose prefix sees itself in both directions."""
    policy = build("spatialvla")
    cap = policy.language_model.config.final_logit_softcapping

    def reference(frame, text):
        words = [policy.tokenizer.bos_token_id, *policy.tokenizer.encode(text, add_special_tokens=False)]
        picture = policy.image_features(policy.encode_images({"static": frame})["static"])
        prefix = torch.cat([picture, policy.language_model.embed_tokens(torch.tensor([words]))], dim=1)
        said: list[int] = []
        for _ in range(NEW):
            own = policy.language_model.embed_tokens(torch.tensor([said], dtype=torch.long))
            embeds = torch.cat([prefix, own], dim=1)
            length = embeds.shape[1]
            hidden = torch.full((length, length), float("-inf")).triu(1)
            hidden[: prefix.shape[1], : prefix.shape[1]] = 0
            mask = dict.fromkeys(("full_attention", "sliding_attention"), hidden[None, None])
            places = torch.arange(1, length + 1)[None]
            state = policy.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False
            )
            logits = policy.lm_head(state.last_hidden_state[0, -1])[: policy.first_action]
            said.append(int((torch.tanh(logits / cap) * cap).argmax()))
        return torch.tensor([said])

    check(policy, None, reference)


def test_answers_end_where_the_model_ends_them():
    """A stop token that the model says ends its row, not its neighbours'."""
    policy = build("openvla")
    model, frames = text_model(policy), pictures(policy)
    whole = ids_of(model, frames)
    stop = whole[0][4]
    model.stop[:] = [stop]
    ended = ids_of(model, frames)
    assert len(ended[0]) <= 4 and max(map(len, ended)) > 4
    assert ended == [row[: row.index(stop)] if stop in row else row for row in whole]


def test_the_head_of_an_untied_qwen_is_read_from_its_release(tmp_path):
    policy = build("vlm4vla")
    with pytest.raises(UserError, match=r"keeps no language head: set evaluation\.vqa\.head=tied"):
        text_model(policy)
    embedding = policy.language_model.embed_tokens.weight.detach()
    save_file({"lm_head.weight": 2 * embedding, "other": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert torch.equal(text_model(policy, head=str(tmp_path)).head, 2 * embedding)
    save_file({"lm_head.weight": embedding[:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight has shape"):
        text_model(policy, head=str(tmp_path))
    save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no lm_head\.weight: its head is the embedding; set it to tied"):
        text_model(policy, head=str(tmp_path))


def test_a_policy_without_words_is_refused():
    with pytest.raises(UserError, match=r"Flower cannot answer in text; evaluation=vqa needs a policy of OpenVLA, Pi0"):
        text_model(build("flower"))


def test_bad_templates_are_named():
    policy = build("vlm4vla")
    with pytest.raises(UserError, match=r"template must hold \{prompt\} once"):
        text_model(policy, template="In: {question}", head="tied")
    with pytest.raises(UserError, match=r"must hold <\|image_pad\|> once, before \{prompt\}"):
        text_model(policy, template="{prompt}<|image_pad|>", head="tied")
    with pytest.raises(UserError, match="is for vlm4vla; Pi0 has a language head"):
        text_model(build("pi0"), head="tied")
