"""The five benchmarks' annotation files: what is read, and what one line says where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.vqa import Question, annotations_hash, read_image, read_questions, some
from tests.vqa_files import SETS, write_sets
from vla.errors import UserError


@pytest.fixture
def places(tmp_path) -> dict[str, tuple[Path, Path]]:
    return write_sets(tmp_path)


def test_questions_as_annotated(places):
    read = {name: read_questions(name, *places[name]) for name in SETS}
    assert {name: len(questions) for name, questions in read.items()} == dict(
        textvqa=3, pope=10, gqa=4, vizwiz=3, vsr=3
    )
    root = places["textvqa"][0].parent
    ten = ("Nokia",) * 9 + ("nok",)
    assert read["textvqa"][1] == Question("34603", root / "textvqa" / "pic1.jpg", "what brand?", ten)
    pope = read["pope"][3]
    assert (pope.id, pope.group, pope.answers) == ("popular-2", "popular", ("no",))
    assert pope.image == root / "coco" / "COCO_val2014_000000000000.jpg"
    assert read["gqa"][2] == Question("20132", root / "gqa" / "n1.jpg", "Is it red?", ("yes",))
    assert [q.group for q in read["vizwiz"]] == ["unanswerable", "other", "unanswerable"]
    assert read["vizwiz"][0].answers == ("unanswerable",) * 10
    assert [(q.id, q.answers) for q in read["vsr"]] == [("0", ("false",)), ("1", ("true",)), ("2", ("false",))]


def test_some_are_a_part_of_more(places):
    questions = read_questions("pope", *places["pope"])
    assert some(questions, None) == some(questions, 99) == questions
    few, more = some(questions, 3), some(questions, 6)
    assert len(few) == 3 and [q for q in more if q in few] == few and [q for q in questions if q in more] == more


def test_hash_is_of_the_files(places):
    before = {name: annotations_hash(places[name][0]) for name in SETS}
    assert len(set(before.values())) == 5
    file = places["pope"][0] / "coco_pope_popular.json"
    file.write_text(file.read_text().replace("dog", "cat"))
    assert annotations_hash(places["pope"][0]) != before["pope"]


def test_pictures_are_rgb(tmp_path):
    for mode in ("L", "RGBA", "CMYK", "P"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 3), 0).save(path)
        assert read_image(path).shape == (3, 5, 3) and read_image(path).dtype == np.uint8
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    for name in ("bad.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture"):
            read_image(tmp_path / name)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage(name: str, places) -> None:
    annotations, _ = places[name]
    if name == "textvqa":
        edit(annotations, lambda content: content["data"][2].pop("image_id"))
    elif name == "pope":
        file = annotations / "coco_pope_popular.json"
        file.write_text(file.read_text().replace('"label": "no"', '"label": "none"', 1))
    elif name == "gqa":
        edit(annotations, lambda content: content["20131"].pop("answer"))
    elif name == "vizwiz":
        edit(annotations, lambda content: content[1]["answers"].pop())
    else:
        annotations.write_text(annotations.read_text() + "\n{torn")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("textvqa", r"textvqa\.json entry 2 has no image_id"),
        ("pope", r"coco_pope_popular\.json line 2 has the label 'none', not yes or no"),
        ("gqa", r"gqa\.json question 20131 has no answer"),
        ("vizwiz", r"val\.json entry 1 has 9 answers, not 10"),
        ("vsr", r"test\.jsonl line 4 is not JSON"),
    ],
)
def test_damage_is_told_with_its_place(name, told, places):
    damage(name, places)
    with pytest.raises(UserError, match=told) as error:
        read_questions(name, *places[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_named(name, places):
    annotations, images = places[name]
    picture = read_questions(name, annotations, images)[-1].image
    picture.unlink()
    with pytest.raises(UserError, match=rf"{picture.name} is missing \(1 of {name}'s \d pictures are\)"):
        read_questions(name, annotations, images)
    with pytest.raises(UserError, match="is not a folder; put"):
        read_questions(name, annotations, images / "elsewhere")
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        read_questions(name, annotations.parent / "absent" / "file", images)


@pytest.mark.parametrize("name", ["textvqa", "gqa", "vizwiz"])
def test_another_file_is_refused(name, places):
    annotations, images = places[name]
    annotations.write_text("{}" if name == "vizwiz" else "[]")
    with pytest.raises(UserError, match=r"own annotation file|GQA's questions|VizWiz's list"):
        read_questions(name, annotations, images)
    annotations.write_text({"textvqa": '{"data": []}', "gqa": "{}", "vizwiz": "[]"}[name])
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(name, annotations, images)


def test_a_question_twice_is_refused(places):
    annotations, images = places["textvqa"]
    edit(annotations, lambda content: content["data"].append(content["data"][0]))
    with pytest.raises(UserError, match="has question 34602 twice"):
        read_questions("textvqa", annotations, images)
    with pytest.raises(UserError, match="select=okvqa is not known; choose among textvqa, pope"):
        read_questions("okvqa", annotations, images)
