"""Other words for an instruction: lists in YAML, which sentences are the same, and which lists share one.

A file maps a name to
    instruction   the sentence as the data or the benchmark has it, with {placeholders} for what varies
    variants      other sentences for it, with the same placeholders
Files: simpler_paraphrases.yaml (evaluation), instruction_augmentation.yaml (training). They must not share a sentence,
or training would have seen what evaluation asks; to `shared`, case, punctuation and articles make no difference.

    wordings = load_wordings("data/simpler_paraphrases.yaml")
    variants_of("move apple near sponge", wordings)       # ["bring the apple close to the sponge", …]
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

from vla.errors import UserError

ARTICLES = {"a", "an", "the"}
_CANS = ("coke can", "7up can", "pepsi can", "redbull can")
_THINGS = (*_CANS, "blue plastic bottle", "apple", "orange", "sponge", "green block")
EXAMPLES = {
    "object": _THINGS,
    "source": _THINGS,
    "target": (*_THINGS, "white bowl", "plate"),
    "which": ("top", "middle", "bottom"),
}
"""What placeholders stand for when two files are compared."""


@dataclass(frozen=True)
class Wording:
    instruction: str
    variants: tuple[str, ...]


def load_wordings(path: str | Path) -> dict[str, Wording]:
    """The wordings of a file, in its order, checked.

    Raises:
        UserError: no such file, another layout, placeholders that differ, an empty list, or a sentence twice.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path} holds no wordings; it maps a name to instruction and variants")
    return {name: _wording(entry, f"{path}: {name}") for name, entry in data.items()}


def _wording(entry: object, where: str) -> Wording:
    if not isinstance(entry, dict) or set(entry) != {"instruction", "variants"}:
        raise UserError(f"{where} needs exactly the keys instruction and variants")
    instruction, variants = entry["instruction"], entry["variants"]
    if not isinstance(instruction, str) or not isinstance(variants, list) or not variants:
        raise UserError(f"{where}: instruction is a sentence, variants a list of them")
    seen = {normalise(instruction)}
    for sentence in variants:
        if not isinstance(sentence, str):
            raise UserError(f"{where}: {sentence!r} is not a sentence; put it in quotes")
        if placeholders(sentence) != placeholders(instruction):
            raise UserError(f"{where}: {sentence!r} must have the placeholders of {instruction!r}, and no others")
        if normalise(sentence) in seen:
            raise UserError(f"{where}: {sentence!r} says what another sentence of the list says; leave one out")
        seen.add(normalise(sentence))
    return Wording(instruction, tuple(variants))


def placeholders(sentence: str) -> set[str]:
    """Names between braces."""
    return set(re.findall(r"{(\w+)}", sentence))


def normalise(sentence: str) -> str:
    """Lower case, without punctuation and articles, one space between words; placeholders keep their braces."""
    marks = "".join(set(string.punctuation) - set("{}_"))
    words = re.sub(f"[{re.escape(marks)}]", " ", sentence.lower()).split()
    return " ".join(word for word in words if word not in ARTICLES)


def variants_of(instruction: str, wordings: dict[str, Wording]) -> list[str]:
    """Other sentences for `instruction`, from the first wording it fits; [] where it fits none."""
    for wording in wordings.values():
        if (words := _fit(wording.instruction, instruction)) is not None:
            return [variant.format(**words) for variant in wording.variants]
    return []


def _fit(pattern: str, instruction: str) -> dict[str, str] | None:
    """What the placeholders of `pattern` are in `instruction`, case and articles aside; None where it does not fit."""
    parts = re.split(r"{(\w+)}", normalise(pattern))
    expression = "".join(f"(?P<{part}>.+?)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    found = re.fullmatch(expression, normalise(instruction))
    return found.groupdict() if found else None


def shared(one: dict[str, Wording], other: dict[str, Wording]) -> list[str]:
    """Variants of `one` that `other` has too, as a variant or as an instruction; normalised, sorted."""
    return sorted(_sentences(one, own=False) & _sentences(other, own=True))


def _sentences(wordings: dict[str, Wording], own: bool) -> set[str]:
    """All sentences, normalised, with every choice of EXAMPLES for the placeholders; `own`: the instructions too."""
    found = set()
    for wording in wordings.values():
        names = sorted(placeholders(wording.instruction))
        if unknown := set(names) - set(EXAMPLES):
            raise UserError(
                f"placeholder {sorted(unknown)[0]} of {wording.instruction!r} is not in EXAMPLES; add it there"
            )
        for values in product(*(EXAMPLES[name] for name in names)):
            words = dict(zip(names, values, strict=True))
            sentences = (*wording.variants, wording.instruction) if own else wording.variants
            found |= {normalise(sentence.format(**words)) for sentence in sentences}
    return found


def expand(template: str, synonyms: dict[str, list[str]]) -> list[str]:
    """`template` with every choice of synonyms for its placeholders, in order; placeholders without any stay.

    Raises:
        UserError: synonyms for a placeholder that the template does not have.
    """
    if unused := set(synonyms) - placeholders(template):
        raise UserError(f"{template!r} has no {{{sorted(unused)[0]}}} to put synonyms for; add it or leave them out")
    kept = {name: "{" + name + "}" for name in placeholders(template)}
    return [
        template.format(**kept | dict(zip(synonyms, choice, strict=True))) for choice in product(*synonyms.values())
    ]


class Rewording:
    """Training instructions in other words (GenVLA's "w/ Inst. Aug."): itself or one of its variants, each as likely.

    Draws from torch's generator, which the training step seeds. An instruction that the file does not know stays.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.wordings = load_wordings(path if path.exists() else Path(__file__).resolve().parents[1] / path)
        self._choices: dict[str, list[str]] = {}

    def __call__(self, instructions: list[str]) -> list[str]:
        import torch

        chosen = []
        for instruction in instructions:
            if instruction not in self._choices:
                self._choices[instruction] = [instruction, *variants_of(instruction, self.wordings)]
            choices = self._choices[instruction]
            chosen.append(choices[int(torch.randint(len(choices), ()))])
        return chosen
