"""Other words for instructions: the shipped lists, and what makes two sentences the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.instructions import expand, load_wordings, normalise, placeholders, shared, variants_of
from envs.simpler.protocol import cells, paraphrased
from scripts.paraphrase import main
from vla.errors import UserError

DATA = Path(__file__).resolve().parent.parent / "data"
EVALUATION, TRAINING = DATA / "simpler_paraphrases.yaml", DATA / "instruction_augmentation.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_shipped_lists_are_long_enough():
    evaluation, training = load_wordings(EVALUATION), load_wordings(TRAINING)
    assert set(evaluation) == {"pick_coke_can", "move_near"}
    assert min(len(wording.variants) for wording in (*evaluation.values(), *training.values())) >= 8
    assert {"pick {object}", "move {object} near {target}", "open {which} drawer", "close {which} drawer"} <= {
        wording.instruction for wording in training.values()
    }
    # The patterns of SimplerEnv's own sentences, and a stack and a put on of BridgeData.
    for told in ("place apple into top drawer", "put carrot on plate", "stack the green block on the yellow block"):
        assert len(variants_of(told, training)) >= 8


def test_evaluation_and_training_share_no_sentence():
    """By a plain comparison of its own: no words but lower-case ones, no articles, every pair of objects."""

    def plain(sentence: str) -> str:
        letters = "".join(c if c.isalnum() or c.isspace() else " " for c in sentence.lower())
        return " ".join(word for word in letters.split() if word not in ("a", "an", "the"))

    objects = {name for cell in cells("google_vm", ["move_near"]) for name in cell.placement} | {"plate", "white bowl"}
    trained = set()
    for wording in load_wordings(TRAINING).values():
        for sentence in (*wording.variants, wording.instruction):
            for one in objects:
                for other in objects:
                    trained.add(plain(sentence.format(object=one, target=other, which="top")))
    evaluated = Counter()
    for wording in load_wordings(EVALUATION).values():
        for sentence in wording.variants:
            evaluated.update({plain(sentence.format(source=one, target=other)) for one in objects for other in objects})
    assert len(evaluated) > 12 and len(trained) > 1000
    assert not trained & set(evaluated)
    assert max(evaluated.values()) == 1, "two paraphrases say the same"
    assert shared(load_wordings(EVALUATION), load_wordings(TRAINING)) == []


def test_sentences_that_differ_in_case_punctuation_and_articles_only_are_shared(tmp_path):
    first = write(
        tmp_path / "a.yaml",
        "near: {instruction: 'move {source} near {target}', variants: ['Put {source} by the {target}!']}",
    )
    second = write(
        tmp_path / "b.yaml",
        "x: {instruction: 'put the {object} by a {target}', variants: ['shove {object} at {target}']}",
    )
    found = shared(load_wordings(first), load_wordings(second))
    assert "put apple by orange" in found
    assert not shared(load_wordings(second), load_wordings(first)), (
        "what evaluation itself says in plain words may be trained on"
    )
    assert normalise("Grasp  the Coke-can, an Apple!") == "grasp coke can apple"


def test_an_instruction_finds_the_narrowest_pattern():
    training = load_wordings(TRAINING)
    assert "topple the 7up can" in variants_of("knock 7up can over", training)
    from_drawer = variants_of("pick apple from top drawer and place on counter", training)
    assert from_drawer[0] == "take the apple out of the top drawer and put it on the counter"
    assert variants_of("Pick the coke can.", training)[0] == "pick up the coke can"
    assert variants_of("wipe the table", training) == []
    assert variants_of("move near orange", training) == [], "a placeholder is a word or more"


words = st.lists(st.from_regex(r"[b-z0-9]{2,8}", fullmatch=True), min_size=1, max_size=3).map(" ".join)


@given(words, words, st.sampled_from(["", "the ", "An "]), st.sampled_from(["", ".", " !"]))
def test_whatever_the_objects_are_called_they_are_found_again(source, target, article, end):
    wordings = load_wordings(EVALUATION)
    told = f"Move {article}{source} near {article}{target}{end}"
    expected = [variant.format(source=source, target=target) for variant in wordings["move_near"].variants]
    if "near" not in source.split():
        assert variants_of(told, wordings) == expected
    assert normalise(normalise(told)) == normalise(told) and normalise(told) == normalise(told.upper())


def test_every_paraphrase_is_told_equally_often_and_to_every_pair():
    wordings = load_wordings(EVALUATION)
    plain = cells("google_vm", ["pick_coke_can", "move_near"])
    told = paraphrased(plain, wordings)
    assert told == paraphrased(plain, wordings)
    assert [(c.task, c.seed, c.reset, c.build) for c in told] == [(c.task, c.seed, c.reset, c.build) for c in plain]
    for before, after in zip(plain, told, strict=True):
        assert after.instructions[0] in variants_of(before.instructions[0], wordings)
    cans = Counter(cell.instructions for cell in told if cell.task == "pick_coke_can/standing")
    assert len(cans) == 12 and max(cans.values()) - min(cans.values()) <= 1
    near = wordings["move_near"].variants
    pattern = {c.seed: near.index(next(v for v in near if v.format(**_words(c)) in d.instructions))
               for c, d in zip(plain, told, strict=True) if c.task == "move_near"}  # fmt: skip
    pairs: dict[int, set[int]] = {}
    for seed, sentence in pattern.items():
        pairs.setdefault(seed % 6, set()).add(sentence)
    assert min(len(sentences) for sentences in pairs.values()) >= 9, "a pair hears most sentences, not a fixed few"
    # Part of the tasks: the same episodes are told the same.
    alone = paraphrased(cells("google_vm", ["move_near"]), wordings)
    assert alone == [cell for cell in told if cell.task == "move_near"]
    with pytest.raises(UserError, match=r"no paraphrases of 'open top drawer'.*open_drawer/top"):
        paraphrased(cells("google_vm", ["drawer"]), wordings)


def _words(cell) -> dict[str, str]:
    source, _, target = cell.instructions[0].removeprefix("move ").partition(" near ")
    return {"source": source, "target": target}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2]", "maps a name"),
        ("near: {instruction: go}", "exactly the keys"),
        ("near: {instruction: go, variants: []}", "a list of them"),
        ("near: {instruction: go, variants: [yes]}", "put it in quotes"),
        ("near: {instruction: 'go {where}', variants: [walk]}", "must have the placeholders"),
        ("near: {instruction: 'go {where}', variants: ['to {where} {who}']}", "must have the placeholders"),
        ("near: {instruction: go there, variants: [Go there!]}", "says what another"),
        ("near: {instruction: go there, variants: [walk there, 'Walk, there']}", "says what another"),
        ("near: {instruction", "cannot be read as YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load_wordings(write(tmp_path / "words.yaml", text))
    assert "words.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        load_wordings(tmp_path / "none.yaml")


def test_templates_expand_to_every_combination_in_order():
    made = expand("{verb} the {object}{end}", {"verb": ["hold", "keep"], "end": ["", " now"]})
    assert made == ["hold the {object}", "hold the {object} now", "keep the {object}", "keep the {object} now"]
    assert placeholders(made[0]) == {"object"}
    with pytest.raises(UserError, match=r"has no {verb}"):
        expand("hold it", {"verb": ["hold"]})


def test_the_tool_leaves_out_what_a_file_has(capsys):
    main(
        [
            "make",
            "{place} the {source} next to the {target}",
            "--synonyms",
            "place=haul,place",
            "--against",
            str(TRAINING),
        ]
    )
    assert capsys.readouterr().out.splitlines() == ["haul the {source} next to the {target}"]


def test_the_tool_checks_and_lists(capsys, tmp_path):
    main(["check", str(EVALUATION), "--against", str(TRAINING)])
    assert "24 sentences for 2 instructions" in capsys.readouterr().out
    main(["list", str(EVALUATION)])
    assert "  grasp the coke can" in capsys.readouterr().out.splitlines()
    stolen = write(
        tmp_path / "stolen.yaml",
        "pick: {instruction: 'pick {object}', variants: ['Fetch a can of coke', 'Take {object}']}",
    )
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(stolen)])
    write(stolen, "pick: {instruction: 'pick {object}', variants: ['Grab {object}!']}")
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(stolen), "--against", str(TRAINING)])
    error = capsys.readouterr().err.splitlines()
    assert "must have the placeholders" in error[0] and "share 9 sentences, 'grab 7up can'" in error[1]
    with pytest.raises(SystemExit, match="2"):
        main(["make", "{a} b", "--synonyms", "a"])
