"""Look at, check and extend the lists of other words for an instruction (their format: data/instructions.py).

    python scripts/paraphrase.py list data/simpler_paraphrases.yaml
    python scripts/paraphrase.py check data/simpler_paraphrases.yaml --against data/instruction_augmentation.yaml
    python scripts/paraphrase.py make "{bring} the {source} {near} the {target}" --synonyms bring=carry,haul \\
        near="up to,right beside" --against data/*paraphrases.yaml data/instruction_augmentation.yaml

`make` prints every combination, in order, that none of the files given with --against has; paste what reads well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.instructions import Wording, expand, load_wordings, normalise, shared
from vla.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python scripts/paraphrase.py", description="List, check or make other words for instructions."
    )
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("list", help="print a file's sentences")
    show.add_argument("file", type=Path)
    show.set_defaults(run=lambda options: list_sentences(options.file))
    check = commands.add_parser("check", help="validate a file, and that others share no sentence with it")
    check.add_argument("file", type=Path)
    check.add_argument("--against", type=Path, nargs="+", default=[], help="files that must share none of its variants")
    check.set_defaults(run=lambda options: check_file(options.file, options.against))
    make = commands.add_parser("make", help="print a template with every choice of synonyms")
    make.add_argument("template", help="a sentence with {placeholders}")
    make.add_argument("--synonyms", nargs="+", default=[], metavar="NAME=A,B", help="what a placeholder can be")
    make.add_argument("--against", type=Path, nargs="+", default=[], help="leave out what these files have")
    make.set_defaults(run=lambda options: make_sentences(options.template, options.synonyms, options.against))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def list_sentences(file: Path) -> None:
    for name, wording in load_wordings(file).items():
        print(f"{name}: {wording.instruction}  ({len(wording.variants)})")
        for sentence in wording.variants:
            print(f"  {sentence}")


def check_file(file: Path, against: list[Path]) -> None:
    wordings = load_wordings(file)
    for other in against:
        if common := shared(wordings, load_wordings(other)):
            raise UserError(f"{file} and {other} share {len(common)} sentences, {common[0]!r} among them; reword them")
    count = sum(len(wording.variants) for wording in wordings.values())
    print(f"{file}: {count} sentences for {len(wordings)} instructions, none of them in {len(against)} other files")


def make_sentences(template: str, synonyms: list[str], against: list[Path]) -> None:
    choices: dict[str, list[str]] = {}
    for entry in synonyms:
        name, separator, values = entry.partition("=")
        choices[name] = [value.strip() for value in values.split(",") if value.strip()]
        if not separator or not choices[name]:
            raise UserError(f"--synonyms {entry} is not NAME=A,B; write the placeholder, = and what it can be")
    known = [load_wordings(path) for path in against]
    seen: set[str] = set()
    for sentence in expand(template, choices):
        made = {"made": Wording(sentence, (sentence,))}
        if normalise(sentence) not in seen and not any(shared(made, other) for other in known):
            print(sentence)
        seen.add(normalise(sentence))


if __name__ == "__main__":
    main()
