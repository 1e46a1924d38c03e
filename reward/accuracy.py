"""1.0 where the answer equals the ground truth, else 0.0: math-verify first, then as text.

The answer is

    tags     the text of `<answer>…</answer>`, of which there is exactly one pair (LVR's form)
    stated   what follows the last "answer is" or "answer:", to the end of a completion that ended
             by itself (ILVR's form)

As LVR's accuracy reward (arXiv 2509.24251), with two differences. The answer is read where the
system was trained to write it, where LVR lets math-verify search the whole completion. And
math-verify decides only where it read *all* digits of both texts: it stops at the first number
that it finds, so it takes `12:45` for `12:30`, and `4 or 5` for `4`. Thousands that are set apart
(`1\\,200`) are joined before: math-verify 0.9.0 adds such groups up, as the parts of a mixed
number, to 201.
"""

from __future__ import annotations

import logging
import re
import threading

from math_verify import parse, verify

from grpo_latent.errors import ConfigError, DataError, RewardError

VARIANTS = ("tags", "stated")
MATH_TIMEOUT_S = 2
MAX_MATH_CHARS = 1000  # no published answer is longer; a policy's endless one is compared as text
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
STATED = re.compile(r"answer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
# what typesetting puts between thousands: LaTeX's spaces and {,}, no-break and thin spaces, the
# Swiss apostrophe
THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|[~'\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
MINUS_SIGN = "\u2212"  # typographic; math-verify reads "−5" as no number at all
BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)

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
    return float(_equal_as_maths(gold, answer) or _normalise(gold) == _normalise(answer))


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
    """What the last statement of an answer says, without full stop, bold and maths marks.

    >>> stated_answer("The answer is not A. Final answer: **B**."), stated_answer("B")
    ('B', None)
    """
    before, *statements = STATED.split(solution_str)
    return statements[-1].strip("*$ \n").removesuffix(".").strip("*$ \n") if statements else None


def _equal_as_maths(gold: str, answer: str) -> bool:
    if max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return False
    gold, answer = _plain_numbers(gold), _plain_numbers(answer)
    # its time-outs are signals, which only the main thread may set; elsewhere the caller must be
    # able to kill
    timeout_s = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(text, parsing_timeout=timeout_s) for text in (gold, answer)]
    for text, found in zip((gold, answer), parsed, strict=True):
        if not found or _digits(str(found[-1])) != _digits(text):
            return False
    return verify(*parsed, timeout_seconds=timeout_s)


def _plain_numbers(text: str) -> str:
    r"""Numbers as math-verify reads them right.

    >>> _plain_numbers(r"$1\,234\,567$"), _plain_numbers("\u22125 or 0,5")
    ('$1234567$', '-5 or 0,5')
    """
    return THOUSANDS.sub("", text.replace(MINUS_SIGN, "-"))


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _normalise(text: str) -> str:
    """The text in the form in which two answers are compared.

    Without `\\boxed`, `$`, brackets around an option letter, a closing full stop, case and runs of
    spaces.
    """
    boxed = BOXED.fullmatch(text.strip())
    text = (boxed.group(1) if boxed else text).strip().strip("$").strip()
    option = re.fullmatch(r"\(?([A-Za-z])[).]?", text)
    text = option.group(1) if option else text.removesuffix(".")
    return " ".join(text.split()).casefold()


def _ground_truth_text(ground_truth, data_source, extra_info) -> str:
    is_number = isinstance(ground_truth, int | float) and not isinstance(ground_truth, bool)
    text = str(ground_truth) if is_number or isinstance(ground_truth, str) else ""
    if not _normalise(text) or text in ("nan", "inf", "-inf"):
        raise DataError(
            "the ground truth is no answer",
            where=f"data source {data_source!r}, row {(extra_info or {}).get('index')}, "
            "reward_model.ground_truth",
            got=repr(ground_truth),
            expected="a text that is not blank, or a finite number",
        )
    return text
