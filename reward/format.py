"""1.0 where the completion has the form that its system was trained on, else 0.0.

    lvr    ^<span> .*? <span>\\s*<answer>…</answer>$: a span opens the completion, one stands
           right before the answer
    ilvr   at least one span anywhere before the answer, text between spans, the answer at the end
    text   no span asked for: the matched control without latents

All of them: exactly one `<answer>…</answer>` that is not blank, nothing after it, and the
completion ended by itself.

`lvr` is the published regular expression of LVR (arXiv 2509.24251) read from the latent summary
instead of from decoded special tokens, so that it cannot depend on how those are printed; LVR also
accepts a blank answer.
"""

from __future__ import annotations

from grpo_latent.errors import ConfigError, RewardError

VARIANTS = ("lvr", "ilvr", "text")


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, variant="lvr", **kwargs
) -> float:
    """1.0 where the completion has the form of `variant`, else 0.0.

    Args:
        solution_str: completion without latent spans.
        extra_info: `latent`: {num_spans, span_offsets, stop_reason, …}.
        variant: `lvr`, `ilvr` or `text`.

    Raises:
        ConfigError: unknown variant.
        RewardError: `extra_info` has no usable latent summary.

    >>> latent = {"num_spans": 1, "span_offsets": [0], "stop_reason": "eos"}
    >>> compute_score("x", " <answer> 4 </answer>", "4", {"latent": latent})
    1.0
    """
    if variant not in VARIANTS:
        raise ConfigError(
            "unknown format", where="kwargs.variant", got=variant, expected=f"one of {VARIANTS}"
        )
    offsets, stop_reason = latent_summary(extra_info)
    answer_start = _answer_start(solution_str)
    if answer_start is None or stop_reason != "eos":
        return 0.0
    if variant == "text":
        return 1.0
    if not offsets or max(offsets) > answer_start:
        return 0.0
    if variant == "ilvr":
        return 1.0
    return float(
        not solution_str[: min(offsets)].strip()
        and not solution_str[max(offsets) : answer_start].strip()
    )


def _answer_start(solution_str: str) -> int | None:
    """Character at which the answer begins, None unless it is the only one and ends the text."""
    if not isinstance(solution_str, str):
        raise RewardError("solution_str is no text", kind="type", got=solution_str, expected="str")
    if solution_str.count("<answer>") != 1 or solution_str.count("</answer>") != 1:
        return None
    start, end = solution_str.index("<answer>"), solution_str.index("</answer>")
    is_blank = not solution_str[start + len("<answer>") : end].strip()
    return None if is_blank or solution_str[end + len("</answer>") :].strip() else start


def latent_summary(extra_info) -> tuple[list[int], str]:
    """`span_offsets` and `stop_reason` of `extra_info["latent"]`."""
    latent = extra_info.get("latent") if isinstance(extra_info, dict) else None
    if (
        not isinstance(latent, dict)
        or not {"num_spans", "span_offsets", "stop_reason"} <= set(latent)
        or len(latent["span_offsets"]) != latent["num_spans"]
    ):
        raise RewardError(
            "the latent summary of the completion is missing or disagrees with itself",
            kind="type",
            where='extra_info["latent"]',
            got=latent,
            expected="num_spans, one span_offsets entry a span, and stop_reason",
            fix="Use the reward manager `grpo_latent`, and an agent loop that reports "
            "extra_fields['latent'].",
        )
    return list(latent["span_offsets"]), latent["stop_reason"]
