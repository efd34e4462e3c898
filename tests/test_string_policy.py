"""Baselines that say their actions as text."""

from __future__ import annotations

import re
import string

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaTokenizer

from tests.test_contract import batch_of, build, observation_of
from vla import generation, string_policy
from vla.action_tokens.constrained import character_ids, decode
from vla.action_tokens.strings import write
from vla.build import build_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.policy import hold_last
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments, statistics_of

STRING = ("policy.actions=string", "normalization=q99")
SPEAKING = ("openvla", "pi0", "vlm4vla", "spatialvla")


def learnt_by_heart(baseline: str, store, *overrides: str, steps: int = 200):
    module, cfg = build(baseline, "vanilla", store, *STRING, "chunk=1", "optim.schedule=constant", *overrides)
    batch = batch_of(store, cfg, pairs=None)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        losses = module.losses(batch)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return module.eval(), batch, losses


@pytest.mark.parametrize("arm", ["vanilla", "ptr"])
@pytest.mark.parametrize("baseline", SPEAKING)
def test_one_step_trains_and_predicts(baseline, arm, store):
    module, cfg = build(baseline, arm, store, *STRING, "chunk=2")
    batch = batch_of(store, cfg)
    losses = module.losses(batch)
    losses["total"].backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "parameters that never get a gradient break DDP: " + ", ".join(without)
    actions = module.eval().policy.predict(observation_of(batch))
    assert actions.shape == (4, 2, 7) and actions.isfinite().all()
    assert set(actions[..., 6].unique().tolist()) <= {0.0, 1.0}


def test_the_loss_is_that_of_one_pass_over_prompt_and_text(store):
    """Against Llama on the whole sequence, no cache, row by row: the characters and EOS, nothing of the prompt."""
    module, cfg = build("openvla", "vanilla", store, *STRING, "chunk=2")
    batch, policy = batch_of(store, cfg, pairs=None), module.policy
    batch["action_valid"][1, 1] = False
    base, llama, tokenizer = policy.base, policy.base.language_model, policy.tokenizer
    with torch.no_grad():
        visual = policy.encode_images(policy.prepare(batch["images"]))
        found = policy.loss(batch, visual)
        values = policy.normalizer.normalize(hold_last(batch["actions"], batch["action_valid"]))
        total, count = 0.0, 0
        for row, instruction in enumerate(batch["instruction"]):
            question = f"<VLA_PROMPT> What action should the robot take to {instruction.lower()}?"
            prompt = [tokenizer.bos_token_id, *tokenizer.encode(f"In: {question}\nOut: ", add_special_tokens=False)]
            texts = [tokenizer.encode(write(step, "genvla"), add_special_tokens=False) for step in values[row].numpy()]
            ids = [*prompt, *texts[0], *texts[1], tokenizer.eos_token_id]
            text = llama.model.embed_tokens(torch.tensor([ids]))
            seen = torch.cat([text[:, :1], visual["static"].embeds[row][None], text[:, 1:]], dim=1)
            logits = llama(inputs_embeds=seen).logits[0, -len(ids) + len(prompt) - 1 : -1]
            errors = F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="none")
            if row == 1:
                errors = torch.cat([errors[: len(texts[0])], errors[-1:]])
            total, count = total + errors.sum(), count + len(errors)
    assert base is not policy and found["tokens"] == count
    torch.testing.assert_close(found["loss"], total / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", SPEAKING)
def test_off_is_the_plain_baseline(baseline, store):
    plain, _ = build(baseline, "vanilla", store)
    off, _ = build(baseline, "vanilla", store, "policy.actions=native")
    assert type(off.policy) is type(plain.policy) and not off.policy.speaks
    pairs = zip(plain.state_dict().items(), off.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("baseline", "form"),
    [
        ("openvla", "genvla"),
        pytest.param("openvla", "fixed", marks=pytest.mark.slow),
        pytest.param("pi0", "genvla", marks=pytest.mark.slow),
    ],
)
def test_a_batch_learnt_is_said_again_with_and_without_the_constraint(baseline, form, store):
    module, batch, losses = learnt_by_heart(baseline, store, f"policy.string.form={form}")
    assert losses["token_accuracy"] > 0.9
    policy, observation = module.policy, observation_of(batch)
    said = policy.predict(observation)
    statistics = policy.normalizer.statistics
    width = torch.tensor(statistics.q99[:6]) - torch.tensor(statistics.q01[:6])
    wanted = policy.normalizer.unnormalize(policy.normalizer.normalize(batch["actions"]))
    right = ((said - wanted)[..., :6].abs() <= 2.6e-5 * width + 1e-7).all(-1)
    assert right.float().mean() >= 0.25  # 5e-5 of the normalised range, which is two wide
    model, prompts = policy.prompts(batch["instruction"])
    with torch.no_grad():
        tokens = policy.seen_by(policy.encode_images(policy.prepare(batch["images"])))
        free = policy.unconstrained(model, model.read_ids(tokens, prompts))
        held = decode(model, model.read_ids(tokens, prompts), policy.grammar, policy.characters, 1)
    formed = [re.fullmatch(r"([-+]?[01]\.\d{1,4},){7}", text) is not None for text in free]
    assert sum(formed) >= 2 and all(a == b for a, b, well in zip(free, held, formed, strict=True) if well)


@pytest.mark.parametrize("baseline", SPEAKING)
def test_constrained_text_is_the_greedy_choice_among_what_is_allowed(baseline, store):
    """Against a loop that reads the whole text anew for every character, on random weights, rows of unequal length."""
    module, cfg = build(baseline, "vanilla", store, *STRING, "chunk=1")
    batch, policy = batch_of(store, cfg, pairs=None), module.eval().policy
    batch["instruction"][0] = "push"
    model, prompts = policy.prompts(batch["instruction"])
    with torch.no_grad():
        tokens = policy.seen_by(policy.encode_images(policy.prepare(batch["images"])))
        held = decode(model, model.read_ids(tokens, prompts), policy.grammar, policy.characters, 1)
        naive, ids = [""] * len(prompts), [list(prompt) for prompt in prompts]
        head = model.head[torch.tensor(policy.characters)]
        for row in range(len(prompts)):
            state, dim = int(policy.grammar.start[0]), 0
            while dim < 7:
                hidden = model.read_ids(tokens, ids).hidden[row]
                allowed = torch.from_numpy(policy.grammar.next[state] >= 0)
                choice = int((head @ hidden).masked_fill(~allowed, -torch.inf).argmax())
                naive[row] += "0123456789-+.,"[choice]
                ids[row].append(policy.characters[choice])
                state = int(policy.grammar.next[state, choice])
                if state == 0:
                    dim += 1
                    state = int(policy.grammar.start[dim % 7])
    if baseline in ("openvla", "vlm4vla"):  # in a prefix that sees both ways, what was said would be read otherwise
        assert held == naive
    assert all(re.fullmatch(r"(-?[01]\.\d{1,4},){6}[01]\.0,", text) for text in held)


def test_malformed_text_is_counted_and_stands_still(store):
    module, cfg = build("openvla", "vanilla", store, *STRING, "policy.string.constrained=false", "chunk=1")
    policy, observation = module.eval().policy, observation_of(batch_of(store, cfg, pairs=None))
    actions = policy.predict(observation)
    assert (policy.malformed, policy.decoded) == (4, 4)
    assert torch.equal(actions, torch.tensor([0.0] * 6 + [1.0]).expand(4, 1, 7))


def test_the_gripper_stays_as_it_was_where_the_text_is_malformed(store):
    module, cfg = build("openvla", "vanilla", store, *STRING, "policy.string.constrained=false", "chunk=1")
    policy, observation = module.eval().policy, observation_of(batch_of(store, cfg, pairs=None))
    observation["seed"], texts = torch.tensor([7, 7, 8, 9]), iter([["0.1,0.2,0.3,0.4,0.5,0.6,0.0,"] * 4, ["no"] * 4])
    policy.unconstrained = lambda model, prefix: next(texts)
    observation["step"] = torch.zeros(4)
    assert (policy.predict(observation)[..., 6] == 0).all()
    observation["step"] = torch.ones(4)
    again = policy.predict(observation)
    assert (again == 0).all() and policy.malformed == 4


@pytest.mark.parametrize("baseline", SPEAKING)
def test_exported_and_loaded_again(baseline, store, tmp_path):
    module, cfg = build(baseline, "vanilla", store, *STRING, "policy.dual=true", "chunk=1")
    policy = module.eval().policy
    export_policy(policy, tmp_path / "policy", name=baseline, arguments=policy_arguments(cfg), about={})
    again, _ = load_policy(tmp_path / "policy")
    observation = observation_of(batch_of(store, cfg, pairs=None))
    assert torch.equal(again.predict(observation), policy.predict(observation))


def test_flower_has_no_words(store):
    with pytest.raises(UserError, match=r"Flower has no language decoder.*choose baseline=openvla"):
        build("flower", "vanilla", store, *STRING)


def test_what_exceeds_one_cannot_be_written(store):
    with pytest.raises(UserError, match=r"normalization=zscore exceeds ±1.*choose q99"):
        build("pi0", "vanilla", store, "policy.actions=string", "normalization=zscore")


def test_a_tokenizer_without_single_characters_is_refused():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(character_ids(tokenizer)) == "0123456789-+.,"
    with pytest.raises(UserError, match="no token for"):
        tokenizer.convert_tokens_to_ids = lambda names: [None] * len(names)
        character_ids(tokenizer)


def test_a_policy_trained_on_crops_is_shown_the_middle(store, monkeypatch):
    """As the baseline itself shows it (fact sheet §1.2)."""
    module, cfg = build("openvla", "vanilla", store, *STRING, "policy.center_crop=true", "chunk=1")
    policy, observation = module.eval().policy, observation_of(batch_of(store, cfg, pairs=None))
    shown, seen = policy.base.prepare_to_act(observation["images"]), []
    encode = policy.encode_images
    monkeypatch.setattr(policy, "encode_images", lambda images: seen.append(images) or encode(images))
    policy.predict(observation)
    assert torch.equal(seen[0]["static"], shown["static"])
    assert not torch.equal(shown["static"], policy.prepare(observation["images"])["static"])


def sentencepiece() -> LlamaTokenizer:
    """Llama-2's kind: a space before every text, two spaces are one token, digits and signs one each."""
    characters = string.ascii_letters + string.digits + ".,-+:?<>_"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", *characters]
    return LlamaTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[("▁", "▁")])


@pytest.mark.parametrize("released", [False, True])
def test_prompt_and_text_are_the_tokens_of_the_whole_text_in_training_and_in_acting(released, store, monkeypatch):
    """A space by itself is another token there than a space behind a prompt."""
    words = ("baseline=openvla", "size=tiny", *STRING, "chunk=1", f"policy.string.released_label_mask={released}")
    cfg = compose_config("train", *words)
    arguments = policy_arguments(cfg) | {"tokenizer": sentencepiece()}
    policy = build_policy("openvla", statistics_of(store), "q99", arguments).eval()
    batch, read, said = batch_of(store, cfg, pairs=None), [], []
    reading, loss = generation._read_openvla, string_policy.cross_entropy
    monkeypatch.setattr(generation, "_read_openvla", lambda p, t, rows: read.append(rows) or reading(p, t, rows))
    monkeypatch.setattr(string_policy, "cross_entropy", lambda m, p, t: said.append(t) or loss(m, p, t))
    policy.predict(observation_of(batch))
    policy.loss(batch, policy.encode_images(policy.prepare(batch["images"])))
    acting, training = read
    values = policy.normalizer.normalize(batch["actions"])[0, 0].numpy()
    question = f"<VLA_PROMPT> What action should the robot take to {batch['instruction'][0]}?"
    whole = policy.tokenizer.encode(f"In: {question}\nOut: {write(values, 'genvla')}", add_special_tokens=False)
    ids = [policy.tokenizer.bos_token_id, *whole, policy.tokenizer.eos_token_id]
    assert training[0] + said[0].ids[0] == ids
    assert acting[0] == ids[: len(acting[0])] and len(acting[0]) == len(training[0]) + released
    assert all(said[0].counted[0])


def test_vlm4vla_speaks_with_a_released_head_and_keeps_it(store, tmp_path):
    """Qwen3-VL 8B's head is not its embedding, and the exported policy must not need the release again."""
    tied, _ = build("vlm4vla", "vanilla", store, *STRING)
    released = torch.randn_like(tied.policy.base.language_model.embed_tokens.weight)
    (tmp_path / "qwen").mkdir()
    save_file({"lm_head.weight": released, "model.norm.weight": torch.ones(3)}, tmp_path / "qwen/model.safetensors")
    module, cfg = build("vlm4vla", "vanilla", store, *STRING, f"policy.language_head={tmp_path / 'qwen'}")
    head = module.policy.base.lm_head.weight
    assert tied.policy.base.lm_head is None and torch.equal(head, released) and head.requires_grad
    batch = batch_of(store, cfg)
    module.losses(batch)["total"].backward()
    assert head.grad.abs().sum() > 0
    about = {"arm": "vanilla", "train_seed": 0, "image_rotation": "rotate180"}
    export_policy(module.policy, tmp_path / "policy", name="vlm4vla", arguments=policy_arguments(cfg), about=about)
    (tmp_path / "qwen/model.safetensors").unlink()
    again, _ = load_policy(tmp_path / "policy", "cpu")
    assert torch.equal(again.base.lm_head.weight, released)
    observation = observation_of(batch)
    assert torch.equal(again.eval().predict(observation), module.eval().policy.predict(observation))


def test_a_release_whose_head_is_its_embedding_is_one_line(store, tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"policy.language_head={tmp_path} holds no lm_head.weight.*tied"):
        build("vlm4vla", "vanilla", store, *STRING, f"policy.language_head={tmp_path}")
