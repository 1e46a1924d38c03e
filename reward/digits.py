"""The embedded task: 1.0 for the right digit and 0.1 for the form, each also reported by its name.

The completion is one latent span, `<answer> 7 </answer>`, and its end. Form and digit are both
judged on that alone: with `latent.visibility=latents_only` the first token of the completion is
the only one that is predicted with the image in sight, so a digit written in front of the answer
would carry it past the latents. Two variants have another form:

    interleaved   at red <span> 7 at blue <span> 3 <answer> 7 </answer>
                  the asked colours in order, each with a span and a number; which one is free
    text          anything <answer> 7 </answer>
                  the control without latents: no span is asked for
"""

from __future__ import annotations

import re

from grpo_latent.errors import ConfigError, DataError, RewardError

FORMAT_WEIGHT = 0.1
ANSWER_OF_VARIANT = {
    "latent": re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL),
    "text": re.compile(r".*?<answer>(.*?)</answer>\s*", re.DOTALL),
    "interleaved": re.compile(r"\s*(?:at\s+[a-z]+\s+\d+\s*)+<answer>(.*?)</answer>\s*", re.DOTALL),
}
OBJECT = re.compile(r"at\s+([a-z]+)\s+(\d+)\s*")


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, variant="latent", **kwargs
) -> dict:
    """The reward of one completion: score, accuracy and form.

    Args:
        solution_str: completion without latent spans.
        ground_truth: the digit, as text or int.
        extra_info: `latent`: {span_offsets, stop_reason, …}; `steps` of the row for variant
            `interleaved`.
        variant: `latent`, `text` or `interleaved`.

    Returns:
        score = accuracy + 0.1 · format, and the two.

    Raises:
        ConfigError: unknown variant.
        DataError: the ground truth is no digit.
        RewardError: `solution_str` is no text, or `extra_info` has no latent summary.

    >>> latent = {"num_spans": 1, "span_offsets": [0], "stop_reason": "eos"}
    >>> compute_score("digits", " <answer> 7 </answer>", "7", {"latent": latent})
    {'score': 1.1, 'accuracy': 1.0, 'format': 1.0}
    """
    digit = _digit(ground_truth, data_source, extra_info)
    if variant not in ANSWER_OF_VARIANT:
        raise ConfigError(
            "unknown variant",
            where="kwargs.variant",
            got=variant,
            expected=f"one of {tuple(ANSWER_OF_VARIANT)}",
        )
    if not isinstance(solution_str, str):
        raise RewardError("solution_str is no text", kind="type", got=solution_str, expected="str")
    latent = extra_info.get("latent") if isinstance(extra_info, dict) else None
    if not isinstance(latent, dict) or not {"span_offsets", "stop_reason"} <= set(latent):
        raise RewardError(
            "no latent summary",
            kind="type",
            where='extra_info["latent"]',
            got=latent,
            expected="span_offsets and stop_reason",
            fix="Use the reward manager `grpo_latent`.",
        )
    is_single = solution_str.count("<answer>") == 1 and solution_str.count("</answer>") == 1
    match = ANSWER_OF_VARIANT[variant].fullmatch(solution_str) if is_single else None
    has_form = match is not None and latent["stop_reason"] == "eos"
    offsets = latent["span_offsets"]
    if variant == "interleaved":
        has_form = has_form and _is_interleaved(solution_str, offsets, _colors(extra_info))
    spans_fit = variant != "latent" or (
        len(offsets) > 0 and max(offsets) <= solution_str.find("<answer>")
    )
    answer = "" if match is None else match.group(1).strip()
    accuracy = float(has_form and answer == digit)
    form = float(has_form and spans_fit and answer != "")
    return {"score": accuracy + FORMAT_WEIGHT * form, "accuracy": accuracy, "format": form}


def _is_interleaved(solution_str: str, offsets: list[int], colors: list[str]) -> bool:
    """Whether the text before the answer is each colour, its span and its number, in order."""
    objects = list(OBJECT.finditer(solution_str, 0, solution_str.find("<answer>")))
    if [found.group(1) for found in objects] != colors or len(offsets) != len(colors):
        return False
    return all(
        found.end(1) <= at <= found.start(2) for found, at in zip(objects, offsets, strict=True)
    )


def _colors(extra_info: dict) -> list[str]:
    steps = extra_info.get("steps")
    steps = [] if steps is None else list(steps)
    if not steps or not all(isinstance(step, str) and step for step in steps):
        raise DataError(
            "no steps to take the asked colours from",
            where=f"row {extra_info.get('index')}, extra_info.steps",
            got=steps,
            expected='texts such as "red at r1 c2 is 7"',
            fix="Write the rows with grpo_latent.data.embedded.digits.",
        )
    return [step.split()[0] for step in steps]


def _digit(ground_truth, data_source, extra_info) -> str:
    is_digit = isinstance(ground_truth, str | int) and not isinstance(ground_truth, bool)
    text = str(ground_truth).strip() if is_digit else ""
    if re.fullmatch("[0-9]", text) is None:
        raise DataError(
            "the ground truth is no digit",
            where=f"data source {data_source!r}, row {(extra_info or {}).get('index')}, "
            "reward_model.ground_truth",
            got=repr(ground_truth),
            expected="one of 0..9",
        )
    return text
