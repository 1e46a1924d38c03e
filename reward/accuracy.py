"""1.0 where the answer equals the ground truth, else 0.0: as text, as quantity, by math-verify.

The answer is

    tags     the text of `<answer>…</answer>`, of which there is exactly one pair (LVR's form)
    stated   what follows the last "answer is" or "answer:", to the end of a completion that ended
             by itself (ILVR's form)

As LVR's accuracy reward (arXiv 2509.24251), with two differences. The answer is read where the
system was trained to write it, where LVR lets math-verify search the whole completion. And
`grpo_latent.answers`, which evaluation's graders ask too, compares first: words beside a number
(units, names, directions, a negation), dates and scores, texts of letters. math-verify decides on
formulas alone, and only where it read *all* digits of both: it stops at the first number that it
finds, so it takes `12:45` for `12:30`, `10 m` for `10 km` and, letters being a product of symbols,
`\\boxed{felt}` for `\\boxed{left}`.
"""

from __future__ import annotations

import logging
import math
import re
import threading

from math_verify import parse, verify

from grpo_latent.answers import peel, same_answer, unmark
from grpo_latent.errors import ConfigError, DataError, RewardError

VARIANTS = ("tags", "stated")
MATH_TIMEOUT_S = 2
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
STATED = re.compile(r"answer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
# greater exponents and factorials make integers that take minutes and gigabytes
MAX_EXPONENT = 1000
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\)|\d+|[^\s{(]"
POWER = re.compile(rf"(?:\^|\*\*)\s*({_GROUP})")
TOWER = re.compile(rf"(?:\^|\*\*)\s*-?(?:{_GROUP})\s*(?:\^|\*\*)")
PLAIN_NUMBER = re.compile(r"[-\d.]+")
FACTORIAL = re.compile(r"\d{4,}\s*!|!\s*!|\)\s*!")

# it warns that its time-out is off, which is the caller's business here: the reward runner has its
# own
logging.getLogger("math_verify").setLevel(logging.ERROR)


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, variant="tags", **kwargs
) -> float:
    """1.0 where the answer equals the ground truth, else 0.0.

    Args:
        data_source: name of the data set, used in errors.
        solution_str: completion without latent spans.
        ground_truth: the answer, text or number; `\\boxed{…}` is taken off.
        extra_info: `index` of the row, used in errors; `latent`: {stop_reason, …}.
        variant: `tags` or `stated`.

    Raises:
        ConfigError: unknown variant.
        DataError: the ground truth is no text or number, or is blank.
        RewardError: `solution_str` is no text.

    >>> compute_score("geo", "<answer> 0.5 </answer>", "1/2")
    1.0
    >>> compute_score("comt", "Look at the sign. The answer is (B).", "B", variant="stated")
    1.0
    """
    if variant not in VARIANTS:
        raise ConfigError(
            "unknown form", where="kwargs.variant", got=variant, expected=f"one of {VARIANTS}"
        )
    gold = _ground_truth_text(ground_truth, data_source, extra_info)
    if not isinstance(solution_str, str):
        raise RewardError("solution_str is no text", kind="type", got=solution_str, expected="str")
    if variant == "tags":
        answer = answer_text(solution_str)
    else:
        latent = (extra_info or {}).get("latent") or {}
        answer = stated_answer(solution_str) if latent.get("stop_reason", "eos") == "eos" else None
    if answer is None:
        return 0.0
    return float(same_answer(gold, answer, equal_as_maths))


def answer_text(solution_str: str) -> str | None:
    """The text between the tags, if there is exactly one pair of them.

    >>> twice = "<answer>4</answer> <answer>5</answer>"
    >>> answer_text("so <answer> 4 </answer>"), answer_text(twice)
    ('4', None)
    """
    if solution_str.count("<answer>") != 1 or solution_str.count("</answer>") != 1:
        return None
    match = ANSWER.search(solution_str)
    return match.group(1).strip() if match else None


def stated_answer(solution_str: str) -> str | None:
    """What the last statement of an answer says, without marks.

    >>> stated_answer("The answer is not A. Final answer: **B**."), stated_answer("B")
    ('B', None)
    """
    parts = STATED.split("\n".join(map(unmark, solution_str.split("\n"))))
    return peel(parts[-1]) if len(parts) > 1 else None


def equal_as_maths(gold: str, answer: str) -> bool:
    r"""Whether math-verify reads both formulas to their last digit, and takes them for equal.

    >>> equal_as_maths(r"\frac{\sqrt{4}}{3}", "2/3"), equal_as_maths("2^{10}", "2")
    (True, False)
    """
    if any(map(_has_huge_power, (gold, answer))):
        return False
    # its time-outs are signals, which only the main thread may set; elsewhere the caller must be
    # able to kill
    timeout_s = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    # outside marks of maths it takes the first number for the whole, 5 of 5x; inside it rewrites
    # 0.5 alone to a fraction of other digits
    texts = [text if PLAIN_NUMBER.fullmatch(text) else f"${text}$" for text in (gold, answer)]
    parsed = [parse(text, parsing_timeout=timeout_s) for text in texts]
    for text, found in zip(texts, parsed, strict=True):
        if not found or _digits(str(found[-1])) != _digits(text):
            return False
        if not _variables(text) <= set(str(found[-1]).lower()):
            return False
    # which of the two is the truth matters to it for relations and sets, not here
    return verify(*parsed, timeout_seconds=timeout_s) or verify(
        *reversed(parsed), timeout_seconds=timeout_s
    )


def _has_huge_power(text: str) -> bool:
    exponents = POWER.findall(text)
    if TOWER.search(text) or FACTORIAL.search(text) or any("^" in part for part in exponents):
        return True
    if len(exponents) != text.count("^") + text.count("**"):
        return True  # one nests deeper than the pattern sees
    digits = [number for part in exponents for number in re.findall(r"\d+", part)]
    if any(len(number) > len(str(MAX_EXPONENT)) for number in digits):
        return True
    is_of_bracket = re.search(r"[)}\]]\s*(?:\^|\*\*)", text) is not None
    sizes = [max(int(number), 1) for number in digits]
    return (math.prod(sizes) if is_of_bracket else max(sizes, default=1)) > MAX_EXPONENT


def _variables(text: str) -> set[str]:
    """Letters that stand alone: math-verify takes some, as d in 5d, for units that it leaves out."""
    value = re.split(r"=|\\in(?![A-Za-z])", text)[-1]
    alone = re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", value)
    return {letter.lower() for letter in alone}


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _ground_truth_text(ground_truth, data_source, extra_info) -> str:
    is_number = isinstance(ground_truth, int | float) and not isinstance(ground_truth, bool)
    text = str(ground_truth) if is_number or isinstance(ground_truth, str) else ""
    if not peel(text) or text in ("nan", "inf", "-inf"):
        raise DataError(
            "the ground truth is no answer",
            where=f"data source {data_source!r}, row {(extra_info or {}).get('index')}, "
            "reward_model.ground_truth",
            got=repr(ground_truth),
            expected="a text that is not blank, or a finite number",
        )
    return text
