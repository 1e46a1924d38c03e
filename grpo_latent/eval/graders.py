"""Strict graders: the answer is parsed from the completion alone, never searched for in it.

    completion ──committed answer──▶ text ──as option or number──▶ letter or number ──▶ grade

A completion commits to an answer in one of three forms: one pair of answer tags; a last line such
as "The answer is (B)." or one `\\boxed{B}`; or nothing but the answer. Everything else is
*unparsed*, which is wrong and counted apart: a letter that occurs somewhere, two different
answers, or an option's letter beside another option's text never scores. Parsing does not see the
truth, so that it cannot lean towards it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_latent.answers import peel, same_answer, unmark
from grpo_latent.errors import DataError

MAX_LINE_CHARS = 2000  # no answer takes more; the search is quadratic in it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_STATED = re.compile(
    r"(?:\A|(?<=[.!?;,:]))[ \t]*(?:[>+\u2022-][ \t]+)*"
    r"(?:(?:so|thus|therefore|hence)[ \t]*,?[ \t]*)?"
    r"(?:the |my )?(?:final |correct |right |best )?"
    r"(?:answer|option|choice)(?: is(?:[ \t]*:[ \t]*|\s+)|[ \t]*:[ \t]*)(?P<answer>\S.*)\Z",
    re.IGNORECASE,
)
# a line that only announces the next one
_ANNOUNCED = re.compile(
    r"^([^\n]{0,60}\b(?:answer|option|choice)(?: is)?[ \t]*:?)[ \t]*\n\s*([^\n]+)\Z",
    re.IGNORECASE | re.MULTILINE,
)
_SPECIAL = re.compile(r"<\|[^|>]*\|>|</?s>|<(?:eos|pad|end_of_turn)>")
_LETTER = re.compile(r"(?:(?:option|choice)\s+)?[(\[]?([A-Za-z])[)\]]?[.:]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\]][.:]?|[.:])\s+(.+)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})")


@dataclass(frozen=True)
class Grade:
    """What a grader says of a completion.

    Attributes:
        correct: whether the parsed answer equals the truth.
        answer: what was parsed (a letter for options), None if the completion commits to none.
        reason: in words, for tables.
    """

    correct: bool
    answer: str | None
    reason: str


def committed_answer(completion: str) -> str | None:
    """Finds the text that a completion gives as its answer, or None.

    Special tokens such as `<|im_end|>` are left out; tags win over a stated answer, which must end
    the completion.

    >>> completions = ["It is red. <answer> B </answer>", "The answer is (B).", "A B"]
    >>> [committed_answer(completion) for completion in completions]
    ['B', 'B', 'A B']
    """
    text = _SPECIAL.sub(" ", completion).strip()
    if "<answer>" in text or "</answer>" in text:
        # counted first: the regular expression is quadratic in repeated opening tags
        pair = (
            _TAGS.search(text) if text.count("<answer>") == text.count("</answer>") == 1 else None
        )
        if pair is None:
            return None
        text = pair[1].strip()
    text = unmark(text)
    boxed = {_tidy(found) for found in _BOXED.findall(text)}
    if boxed:
        return boxed.pop() if len(boxed) == 1 else None
    announced = _ANNOUNCED.search(text[-MAX_LINE_CHARS:])
    last_line = " ".join(map(unmark, announced.groups())) if announced else text
    last_line = unmark(peel(last_line.rsplit("\n", 1)[-1]))
    stated = _STATED.search(last_line) if len(last_line) <= MAX_LINE_CHARS else None
    return _tidy(stated["answer"] if stated else text)


def parse_option(answer: str | None, options: Sequence[str]) -> str | None:
    """Finds the letter that an answer names, or None.

    It may be `B`, `(b)`, `B.`, `option B`, `(B) its text`, or what `same_answer` takes for the
    text of one option alone (`50%` and `0.5`, `1 m` and `100 cm`).

    >>> options = ["Open", "Closed"]
    >>> parse_option("(b) Closed", options), parse_option("(a) Closed", options)
    ('B', None)
    """
    if answer is None:
        return None
    text = _normalise(answer)
    same = [_normalise(option) == text for option in options]
    # units may differ by their case alone
    same = [is_same and same_answer(options[i], answer) for i, is_same in enumerate(same)]
    named = {LETTERS[i] for i, is_same in enumerate(same) if is_same}
    # an option whose text is itself a letter must not be mistaken for the option of that letter
    letter = _LETTER.fullmatch(answer)
    if letter is not None and letter[1].upper() in LETTERS[: len(options)]:
        named |= {letter[1].upper()}
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both is not None and not named:
        idx = LETTERS.find(both[1].upper())
        if 0 <= idx < len(options) and same_answer(options[idx], both[2]):
            named = {LETTERS[idx]}
    elif not named:
        named = {LETTERS[i] for i, option in enumerate(options) if same_answer(option, answer)}
    return named.pop() if len(named) == 1 else None


def grade_option(completion: str, options: Sequence[str], truth: str) -> Grade:
    """Grades a multiple-choice completion.

    Args:
        options: texts in the order of their letters.
        truth: the right letter.

    Raises:
        DataError: the truth names no option.
    """
    if truth not in LETTERS[: len(options)] or len(truth) != 1:
        raise DataError(
            "the truth names no option",
            where="grade_option",
            got=truth,
            expected=f"one of {LETTERS[: len(options)]}",
        )
    answer = parse_option(committed_answer(completion), options)
    if answer is None:
        return Grade(False, None, "unparsed: the completion commits to no single option")
    return Grade(answer == truth, answer, f"answered {answer}, truth {truth}")


def grade_number(completion: str, truth: str) -> Grade:
    """Grades an integer answer (the embedded task): it is the number and nothing else."""
    if _NUMBER.fullmatch(str(truth).strip()) is None:
        raise DataError(
            "the truth is no integer", where="grade_number", got=truth, expected="digits"
        )
    answer = committed_answer(completion)
    answer = None if answer is None else answer.replace("\u2212", "-")  # typographic
    if answer is None or _NUMBER.fullmatch(answer) is None:
        return Grade(False, None, "unparsed: the completion commits to no single number")
    said, right = (int(number.replace(",", "")) for number in (answer, str(truth)))
    return Grade(said == right, str(said), f"answered {said}, truth {right}")


def grade(completion: str, options: Sequence[str], truth: str) -> Grade:
    """Grades by `grade_option`, or by `grade_number` where there are no options.

    Raises:
        DataError: the truth does not fit, or the completion is no text.
    """
    if not isinstance(completion, str):
        raise DataError("a completion is no text", where="grade", got=completion, expected="str")
    return grade_option(completion, options, truth) if options else grade_number(completion, truth)


def pair_accuracy(correct: Sequence[bool | float], pair_ids: Sequence[str]) -> float:
    """Computes MMVP's score: the fraction of pairs of which every question is right.

    >>> pair_accuracy([True, True, True, False], ["1", "1", "2", "2"])
    0.5

    Raises:
        DataError: lengths differ, or a pair has not two questions.
    """
    pairs: dict[str, list[float]] = {}
    if len(correct) != len(pair_ids):
        raise DataError(
            "grades and pairs differ in number",
            where="pair_accuracy",
            got=(len(correct), len(pair_ids)),
        )
    for value, pair_id in zip(correct, pair_ids, strict=True):
        pairs.setdefault(pair_id, []).append(float(value))
    odd = [pair_id for pair_id, values in pairs.items() if len(values) != 2]
    if odd or not pairs:
        raise DataError(
            "not pairs", where="pair_accuracy", got=odd[:5], expected="two questions a pair"
        )
    return sum(all(value == 1.0 for value in values) for values in pairs.values()) / len(pairs)


def _tidy(text: str) -> str | None:
    return peel(text) or None


def _normalise(text: str) -> str:
    return " ".join(peel(text).split()).casefold()
