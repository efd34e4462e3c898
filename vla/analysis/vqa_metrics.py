"""The official scores of five visual question answering benchmarks: a score in [0, 1] for every answer.

TextVQA   the text is normalised as EvalAI does it, the ten human answers too; soft accuracy, leaving one out
VizWiz    the text is normalised as VQA does it, the human answers stay as published; the same soft accuracy
GQA       exact match after LLaVA's clean-up: lower case, no full stop at the end
POPE      "no" where the first sentence has the word No, no or not, else "yes" (LLaVA); accuracy, F1, share of yes
VSR       the first word of the answer that says true or false; neither is wrong

Sources: GT-Vision-Lab/VQA vqaEval.py; MMF's EvalAIAnswerProcessor, which LLaVA scores TextVQA with; VizWiz's vqaEval.py
and GQA's eval.py as TRI-ML/vlm-evaluation has them; LLaVA convert_gqa_for_eval.py and eval_pope.py (fact sheet §8.6).
Their slips are kept, because published numbers have them:
- the full stop's pattern means to keep stops after a digit and does not: only a stop *before* a digit stays ("3.5");
- it takes away 32 stops and leaves the rest (a flag was given where a count is expected);
- "none" is the number 0; "somebody'd" loses its apostrophe, all other contractions gain theirs;
- EvalAI parts 's from its word ("it's" → "it 's") but not where the apostrophe is missing ("whats" → "what's").
One is not: vlm-evaluation's VizWiz table writes most apostrophes as backticks, which no annotator types.

    soft_accuracy(evalai("Two dogs."), [evalai(a) for a in answers])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vla.errors import UserError

NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}  # noqa: SIM905
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32
DIGITS_AND_COMMA = re.compile(r"\d,\d")

CONTRACTED = (  # noqa: SIM905
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
).split()
"""The table's right-hand sides. Its left-hand sides are these with any one apostrophe missing."""


def _contractions() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}
    for word in CONTRACTED:
        for place in (i for i, character in enumerate(word) if character == "'"):
            table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _contractions()


def evalai(text: str) -> str:
    """TextVQA's normalisation of an answer."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa(text)


def vqa(text: str) -> str:
    """VQA's normalisation of an answer: lower case, no punctuation, no articles, number words as digits."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    """A mark that stands beside a space disappears, one between two words becomes a space ("red/blue" → "red blue").

    A comma between digits anywhere in the answer makes every mark disappear ("1,000-2" → "10002").
    """
    joins = DIGITS_AND_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if joins or beside_space else " ")
    return FULL_STOP.sub("", out, count=MOST_STOPS)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """min(1, matches / 3) among the other humans, averaged over the human left out; all strings normalised before.

    Raises:
        UserError: fewer than two human answers, of which one cannot be left out.
    """
    if len(humans) < 2:
        raise UserError(f"soft accuracy leaves one human answer out and got {len(humans)}; read the annotations again")
    matches = sum(human == answer for human in humans)
    return sum(min(1.0, (matches - (human == answer)) / 3) for human in humans) / len(humans)


def textvqa_score(text: str, answers: Sequence[str]) -> float:
    return soft_accuracy(evalai(text), [evalai(answer) for answer in answers])


def vizwiz_score(text: str, answers: Sequence[str]) -> float:
    return soft_accuracy(vqa(text), answers)


def gqa_score(text: str, answers: Sequence[str]) -> float:
    return float(text.strip().rstrip(".").lower() == answers[0])


def says_yes(text: str) -> bool:
    """POPE's reading of a free answer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_score(text: str, answers: Sequence[str]) -> float:
    return float(says_yes(text) == (answers[0] == "yes"))


def says_true(text: str) -> bool | None:
    """The answer's first word that is true or false (yes or no); None where there is none."""
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in ("true", "yes", "false", "no"):
            return word in ("true", "yes")
    return None


def vsr_score(text: str, answers: Sequence[str]) -> float:
    return float(says_true(text) is (answers[0] == "true"))


SCORES = {
    "textvqa": textvqa_score,
    "pope": pope_score,
    "gqa": gqa_score,
    "vizwiz": vizwiz_score,
    "vsr": vsr_score,
}
"""Set → (what the model said, the annotated answers) → score of one question."""


@dataclass(frozen=True)
class YesNo:
    """POPE's numbers of one split, each in [0, 1]; yes is the positive class. A ratio of nothing to nothing is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no(said: Sequence[bool], labels: Sequence[bool]) -> YesNo:
    """
    Args:
        said, labels: aligned, True for yes; at least one.
    """
    pairs = list(zip(said, labels, strict=True))
    both, wrongly = pairs.count((True, True)), pairs.count((True, False))
    missed = pairs.count((False, True))
    precision, recall = _ratio(both, both + wrongly), _ratio(both, both + missed)
    return YesNo(
        accuracy=(both + pairs.count((False, False))) / len(pairs),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_ratio=(both + wrongly) / len(pairs),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
