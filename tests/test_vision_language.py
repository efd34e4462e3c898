"""Reading vision-language sets, and the stream they are drawn from."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from data.llava_writer import write_llava as write_questions
from data.vision_language import Mixture, VLSet, first_exchange, open_set
from tests.vl_files import exchange, picture, write_llava, write_onevision, write_vqasynth
from vla.errors import UserError


def test_llava_json(tmp_path):
    found = open_set(*write_llava(tmp_path), name="llava")
    assert len(found) == 6 and found.texts[3] == ("what is 3?", "number 3") and found.left_out == 0
    assert found.image(3, 8).shape == (8, 8, 3) and (found.image(3, 8) == 30).all()


def test_onevision_parquet(tmp_path):
    found = open_set(write_onevision(tmp_path / "set"))
    assert found.texts == [("read it.", f"word {n}") for n in range(5)]
    assert [int(found.image(n, 4)[0, 0, 0]) for n in (4, 0, 3)] == [40, 0, 30]


def test_vqasynth_parquet(tmp_path):
    found = open_set(write_vqasynth(tmp_path / "set"))
    assert found.texts[2] == ("how far?", "2 metres") and int(found.image(2, 4)[0, 0, 0]) == 20


@pytest.mark.parametrize(
    ("conversation", "found"),
    [
        (exchange("What?\n<image>", "A cat"), ("what?", "a cat")),
        ([{"from": "system", "value": "Hello"}, *exchange("Q", "A")], ("q", "a")),
        (exchange("Q1", "A1") + exchange("Q2", "A2"), ("q1", "a1")),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], ("q", "a")),
        (exchange("<image>", "A"), None),
        (exchange("Q", ""), None),
        ([{"from": "human", "value": "Q"}], None),
        ("text", None),
        ([1, None, {}], None),
    ],
)
def test_the_first_exchange(conversation, found):
    assert first_exchange(conversation) == found


def test_rows_without_picture_or_answer_are_counted(tmp_path):
    chat, images = write_llava(tmp_path)
    rows = [*json.loads(chat.read_text()), {"conversations": exchange("Q", "A")}, {"image": "0.png"}, 7]
    chat.write_text(json.dumps(rows))
    found = open_set(chat, images)
    assert (len(found), found.left_out) == (6, 3)


def test_damage_is_named(tmp_path):
    chat, images = write_llava(tmp_path)
    with pytest.raises(UserError, match="does not exist; download it"):
        open_set(tmp_path / "none.json", images)
    with pytest.raises(UserError, match=r"cotrain\.sets\.llava\.images"):
        open_set(chat, tmp_path / "nowhere", "llava")
    (images / "2.png").write_bytes(b"no picture")
    (images / "3.png").unlink()
    found = open_set(chat, images, "llava")
    for index in (2, 3):
        with pytest.raises(UserError, match=f"llava: the picture of example {index} cannot be read"):
            found.image(index, 8)
    (tmp_path / "secret.png").write_bytes(picture(1))
    rows = json.loads(chat.read_text())
    rows[0]["image"] = "../secret.png"
    chat.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="names a file outside"):
        open_set(chat, images).image(0, 8)
    chat.write_text("[{")
    with pytest.raises(UserError, match="is damaged"):
        open_set(chat, images)
    chat.write_text("[]")
    with pytest.raises(UserError, match="holds no picture with a question"):
        open_set(chat, images)
    (tmp_path / "parquet").mkdir()
    with pytest.raises(UserError, match="holds no parquet file"):
        open_set(tmp_path / "parquet")
    (tmp_path / "parquet/a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_set(tmp_path / "parquet")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("vl")
    return [
        open_set(*write_llava(root / "a")),
        open_set(write_onevision(root / "b")),
        open_set(write_vqasynth(root / "c")),
    ]


@given(start=st.integers(0, 500), size=st.integers(1, 40), cut=st.integers(0, 40), by_length=st.sampled_from([1, 4]))
def test_the_stream_is_a_function_of_the_number_alone(sets, start, size, cut, by_length):
    """However it is cut into batches: so a resumed run goes on exactly."""
    mixture = Mixture(sets, 8, seed=3, batch=7, by_length=by_length)
    whole = mixture.places(np.arange(start, start + size))
    cut = min(cut, size)
    parts = mixture.places(np.arange(start, start + cut)) + mixture.places(np.arange(start + cut, start + size))
    assert [(a.name, i) for a, i in whole] == [(a.name, i) for a, i in parts]


def test_sets_take_turns_and_every_example_comes_once_an_epoch(sets):
    places = Mixture(sets, 8, seed=0).places(np.arange(60))
    assert Counter(chosen.name for chosen, _ in places) == dict.fromkeys([s.name for s in sets], 20)
    of_first = [index for chosen, index in places if chosen is sets[0]]
    assert sorted(of_first[:6]) == sorted(of_first[6:12]) == list(range(6)) and of_first[:6] != of_first[6:12]


def of_lengths(name, lengths):
    """A set of texts of these lengths, without pictures."""
    return VLSet(name, [("q", "a" * (length - 1)) for length in lengths], lambda index: b"", 0)


def read(mixture, batch, count):
    """Characters that `count` batches have with their padding, over those of their texts."""
    rows = [
        [len("".join(s.texts[i])) for s, i in mixture.places(np.arange(n * batch, (n + 1) * batch))]
        for n in range(count)
    ]
    return sum(batch * max(row) for row in rows) / sum(map(sum, rows))


@given(batch=st.integers(1, 24), by_length=st.integers(2, 9), of=st.integers(1, 3), seed=st.integers(0, 9))
def test_dealing_by_length_draws_the_same_examples(batch, by_length, of, seed):
    """What `by_length` batches hold together is what they would hold as drawn, each set as often."""
    rng = np.random.default_rng(seed)
    sets = [of_lengths(str(n), rng.integers(1, 300, 50 + n)) for n in range(of)]
    numbers = np.arange(by_length * -(-batch // of) * of)
    dealt, drawn = (
        Counter((s.name, i) for s, i in Mixture(sets, 8, seed, batch, deal).places(numbers)) for deal in (by_length, 1)
    )
    assert dealt == drawn


def test_dealing_by_length_saves_padding_and_leaves_no_trend():
    """Captions beside essays: of a batch as drawn, four fifths are padding."""
    rng = np.random.default_rng(0)
    sets = [
        of_lengths("captions", rng.integers(30, 60, 5000)),
        of_lengths("talk", rng.lognormal(5, 1, 5000).astype(int)),
    ]
    drawn, dealt = (Mixture(sets, 8, 0, 16, by_length) for by_length in (1, 8))
    assert read(drawn, 16, 200) > 5 and read(dealt, 16, 200) < 0.55 * read(drawn, 16, 200)
    longest = [max(len(s.texts[i][1]) for s, i in dealt.places(np.arange(n * 16, n * 16 + 16))) for n in range(400)]
    assert abs(scipy.stats.spearmanr(np.arange(400), longest).statistic) < 0.1
    assert Counter(s.name for s, _ in dealt.places(np.arange(160, 176))) == {"captions": 8, "talk": 8}


def test_a_batch(sets):
    batch = Mixture(sets, 8, seed=0).batch(np.arange(7, 16))
    assert batch["images"].shape == (9, 3, 8, 8) and len(batch["question"]) == len(batch["answer"]) == 9


def test_questions_about_demonstrations_are_read_again(store, tmp_path):
    """Each answer is what the recording says of that very frame."""
    assert write_questions(store, tmp_path / "own", count=40) == 40
    found = open_set(tmp_path / "own/chat.json", tmp_path / "own/images")
    rows = json.loads((tmp_path / "own/chat.json").read_text())
    size = store.frames("static", np.array([0])).shape[1]
    assert len(found) == 40 and len({question for question, _ in found.texts}) == 3
    for index, row in enumerate(rows):
        step = int(row["id"])
        np.testing.assert_array_equal(found.image(index, size), store.frames("static", np.array([step]))[0])
        question, answer = found.texts[index]
        action = store.actions[step]
        if "gripper to be" in question:
            assert answer == ("open" if action[6] == 1 else "closed")
        elif "which way" in question:
            axis = int(np.argmax(np.abs(action[:3])))
            ways = [["backward", "forward"], ["right", "left"], ["down", "up"]][axis]
            assert answer == (ways[int(action[axis] > 0)] if abs(action[axis]) >= 0.05 else "it stays")
        else:
            window = store.windows[store.sample_window[np.flatnonzero(store.samples == step)[0]]]
            assert answer == window["instruction"].lower()
    with pytest.raises(UserError, match="exists; remove it"):
        write_questions(store, tmp_path / "own", count=1)
    with pytest.raises(UserError, match="has no camera side"):
        write_questions(store, tmp_path / "other", count=1, camera="side")
    assert not (tmp_path / "other").exists()
