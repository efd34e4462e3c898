"""Several choices per pass of a decoder without overhead: the text of one choice per pass of transformers' model."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_contract import batch_of, build, observation_of
from vla.action_tokens.constrained import decode, decode_fast, decode_plain, forest
from vla.action_tokens.speculation import DONE, Forest
from vla.action_tokens.strings import ALPHABET, FORMS, Grammar, write
from vla.cli import CONF
from vla.fast_decode import StaticDecoder, plain_tokens, supports
from vla.string_policy import speaker

STRING = ("policy.actions=string", "normalization=q99")
FAST = ("openvla", "pi0", "vlm4vla")
VALUES = st.floats(-1, 1, width=32)
STEPS = st.lists(st.tuples(*[VALUES] * 6, st.sampled_from([0.0, 1.0])), min_size=1, max_size=3)


def sharpened(baseline: str, store, *overrides: str):
    """Random weights, three times as large so that texts differ, and norms that do not pass for one another.

    The head's row of 1 is that of 0: numbers then begin with 0 and have digits to choose.
    """
    module, cfg = build(baseline, "vanilla", store, *STRING, "chunk=2", *overrides)
    policy = module.eval().policy
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator)) if "norm" in name else p.mul_(3)
        head = speaker(policy)[0].head
        head[policy.characters[1]] = head[policy.characters[0]]
    return policy, batch_of(store, cfg, pairs=None)


def reader_of(policy, batch, rows: int):
    """The model, and a function that reads `rows` pictures and prompts of unequal lengths anew."""
    model, prompts = policy.prompts(["push " * (1 + row % 3) for row in range(rows)])
    which = torch.arange(rows) % len(batch["instruction"])
    images = {camera: frames[which] for camera, frames in batch["images"].items()}
    with torch.no_grad():
        tokens = policy.seen_by(policy.encode_images(policy.prepare(images)))
    return model, lambda: model.read_ids(tokens, prompts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", FAST)
@torch.no_grad()
def test_the_text_is_that_of_one_choice_per_pass(baseline, form, store):
    policy, batch = sharpened(baseline, store, f"policy.string.form={form}")
    for rows in (1, 3, 16):
        model, read = reader_of(policy, batch, rows)
        for steps in (1, 2):
            plain = decode_plain(model, read(), policy.grammar, policy.characters, steps)
            assert rows == 1 or len(set(plain)) > 1
            assert decode(model, read(), policy.grammar, policy.characters, steps) == plain
            for worth in (0.02, 0.2, 2.0):
                assert decode_fast(model, read(), forest(form, worth), policy.characters, steps) == plain


@torch.no_grad()
def test_what_is_not_supported_takes_the_plain_way(store):
    policy, batch = sharpened("spatialvla", store)
    model, read = reader_of(policy, batch, 3)
    assert not supports(model.model)
    texts = (say(model, read(), policy.grammar, policy.characters, 2) for say in (decode, decode_plain))
    assert next(texts) == next(texts)


@torch.no_grad()
def test_fewer_passes_than_choices(store):
    policy, batch = sharpened("openvla", store, "policy.string.form=fixed")
    model, read = reader_of(policy, batch, 1)
    passes = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: passes.append(1))
    (text,) = decode(model, read(), policy.grammar, policy.characters, 1)
    handle.remove()
    assert len(text) == 56 and len(passes) - 1 == 13  # one more reads the prompt; 37 choices, the first of them there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("baseline", FAST)
@torch.no_grad()
def test_states_of_a_tree_are_those_of_its_paths_read_one_by_one(baseline, dtype, store):
    """Two branches behind a token, then a chain behind the second; against transformers on whole sequences."""
    policy, batch = sharpened(baseline, store)
    model, read = reader_of(policy, batch, 3)
    policy.to(dtype)
    ids = torch.tensor(policy.characters)
    paths, tree = [[0], [0, 1], [0, 2], [0, 2, 3]], torch.full((4, 4), -torch.inf)
    for token, path in enumerate(paths):
        tree[token, path] = 0
    prefix = read()
    decoder = StaticDecoder(model.model, prefix.cache, prefix.seen, prefix.position, room=5)
    depth = np.array([[0, 1, 1, 2]] * 3)
    states = decoder.read(model.model.embed_tokens(ids[None, :4].expand(3, -1)), depth, tree.expand(3, -1, -1))
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.15)

    def by_transformers(rows: list[list[int]]) -> torch.Tensor:
        prefix, length = read(), len(rows[0])
        return model.model(
            inputs_embeds=model.model.embed_tokens(ids[torch.tensor(rows)]),
            attention_mask=torch.cat([prefix.seen, torch.ones(3, length, dtype=torch.long)], dim=1),
            position_ids=prefix.position[:, None] + torch.arange(length),
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    for token, path in enumerate(paths):
        torch.testing.assert_close(states[:, token], by_transformers([path] * 3), **close)
    decoder.keep([[0, 1], [0, 2, 3], []])  # rows at different places, then a block that exceeds the room
    tree = torch.full((5, 5), -torch.inf).fill_diagonal_(0)
    tree[:, 0] = 0
    depth = np.array([[0, 1, 1, 1, 1]] * 3)
    states = decoder.read(model.model.embed_tokens(ids[None, 4:9].expand(3, -1)), depth, tree.expand(3, -1, -1))
    for row, path in enumerate(([0, 1], [0, 2, 3], [])):
        for token in (1, 4):
            wanted = by_transformers([[*path, 4, 4 + token]] * 3)
            torch.testing.assert_close(states[row, token], wanted[row], **close)


@torch.no_grad()
def test_openvla_s_bins_are_those_of_transformers_passes(store):
    module, cfg = build("openvla", "vanilla", store, "chunk=3")
    policy, batch = module.eval().policy, batch_of(store, cfg, size=5, pairs=None)
    for p in policy.parameters():
        p.mul_(2)
    visual = policy.encode_images(policy.prepare(batch["images"]))
    instructions = ["push", "open the drawer", "put it there", "go", "lift the red block up"]
    said = policy.generate(visual, instructions)
    ids, lengths = policy.tokenize(instructions, said.device)
    embeds = policy.embed(visual, ids)
    position = lengths + embeds.shape[1] - ids.shape[1]
    output = policy.language_model.model(inputs_embeds=embeds, use_cache=True)
    hidden = output.last_hidden_state[torch.arange(5), position - 1]
    seen = torch.arange(embeds.shape[1]) < position[:, None]
    model, head = policy.language_model.model, policy.language_model.lm_head
    assert torch.equal(said, plain_tokens(model, head, hidden, output.past_key_values, seen, position, 21))
    assert len({tuple(row) for row in said.tolist()}) > 1
    assert policy.predict(observation_of(batch)).shape == (5, 3, 7)


@given(STEPS, st.sampled_from(FORMS), st.sampled_from([0.02, 0.09, 0.4, 2.0]))
def test_any_text_is_found_along_the_trees(steps, form, worth):
    """Choices as a written text makes them; a tree's tokens spell that text, at the depth at which they stand in it."""
    trees, text = Forest(Grammar(form), worth), write(np.array(steps), form)
    said, place = trees.say(trees.start(len(steps)), ALPHABET.index(text[0]))
    pending = said
    while place != DONE:
        tree = trees.tree(pending, place)
        node = tree.nodes[0]
        before = len(said) - len(pending)
        while True:
            spelt = "".join(ALPHABET[tree.characters[token]] for token in node.path)
            assert spelt == text[before : before + len(spelt)]
            assert tree.depth[node.path].tolist() == list(range(len(spelt)))
            assert set(np.flatnonzero(tree.sees[node.path[-1]] == 0)) == set(node.path)
            choice = ALPHABET.index(text[len(said)])
            assert tree.refused[node.path[-1], choice] == 0
            pending, place = trees.say(place, choice)
            said += pending
            if choice not in node.children:
                break
            node = tree.nodes[node.children[choice]]
    assert said == text


def test_a_likely_zero_is_anticipated_and_an_unlikely_digit_is_not():
    trees = Forest(Grammar("fixed"), 0.9)
    sign = ALPHABET.index("-")
    tree = trees.tree(*trees.say(trees.start(1), sign))
    assert "".join(ALPHABET[c] for c in tree.characters) == "-0." and len(tree.nodes) == 2
    allowed = {"".join(ALPHABET[i] for i in np.flatnonzero(tree.refused[node.path[-1]] == 0)) for node in tree.nodes}
    assert allowed == {"01", "0123456789"}


def test_the_bench_prints_a_row_for_every_way(tmp_path, monkeypatch, capsys):
    arguments = ("--batch", "2", "--repeats", "2", "--device", "cpu", "--json", str(tmp_path / "out.json"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "decode", *arguments])
    runpy.run_path(str(CONF.parent / "scripts" / "bench.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = {row["way"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert all(name in printed for name in rows) and len(rows) == 6 and all(row["same"] for row in rows.values())
    assert rows["7 tokens, plain"]["passes"] == rows["7 tokens, static"]["passes"] == 6
    for form in FORMS:
        assert rows[f"text ({form}), fast"]["passes"] < rows[f"text ({form}), plain"]["passes"]
    fast = rows["text (fixed), fast"]["decode"]
    low, high = fast["quartiles"]
    assert 0 < low <= fast["median"] <= high
    met = "met" if fast["7 tokens, plain"] <= 1.25 else "not met"
    assert f"{fast['7 tokens, plain']:.2f} of 7 tokens, plain: {met}" in " ".join(printed.split())
