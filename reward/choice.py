"""1.0 for the right letter in "Therefore, the answer is B", and 0.1 for that form.

Each is also reported by its name. M3CoT and ScienceQA as IVT-LR is trained on them (arXiv
2510.12603): the sentence closes the completion. Case of the words, a full stop, and brackets, bold
or maths marks around the letter do not matter; text before the sentence is the rest of the
rationale.
"""

from __future__ import annotations

import re

from grpo_latent.answers import peel, unmark
from grpo_latent.errors import DataError, RewardError

FORMAT_WEIGHT = 0.1
STATEMENT = re.compile(r"\bthe answer is\b:?", re.IGNORECASE)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """The reward of one completion: score, accuracy and form.

    Args:
        solution_str: completion without latent spans.
        ground_truth: the letter of the right choice.
        extra_info: `index` of the row, used in errors; `latent`: {stop_reason, …}: a completion
            cut off has no form.

    Returns:
        score = accuracy + 0.1 · format, and the two.

    Raises:
        DataError: the ground truth is no letter.
        RewardError: `solution_str` is no text.

    >>> compute_score("m3cot", "It is red. Therefore, the answer is (B).", "B")
    {'score': 1.1, 'accuracy': 1.0, 'format': 1.0}
    """
    truth = ground_truth.strip().upper() if isinstance(ground_truth, str) else ""
    if re.fullmatch("[A-Z]", truth) is None:
        raise DataError(
            "the ground truth is no letter",
            where=f"data source {data_source!r}, row {(extra_info or {}).get('index')}, "
            "reward_model.ground_truth",
            got=repr(ground_truth),
            expected="one of A..Z",
        )
    if not isinstance(solution_str, str):
        raise RewardError("solution_str is no text", kind="type", got=solution_str, expected="str")
    _, *stated = STATEMENT.split(solution_str)
    letters = [peel(unmark(text.strip())).upper() for text in stated]
    latent = (extra_info or {}).get("latent") or {}
    has_form = (
        len(letters) == 1
        and re.fullmatch("[A-Z]", letters[0]) is not None
        and latent.get("stop_reason", "eos") == "eos"
    )
    form = float(has_form)
    accuracy = float(has_form and letters[0] == truth)
    return {"score": accuracy + FORMAT_WEIGHT * form, "accuracy": accuracy, "format": form}
