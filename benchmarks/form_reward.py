"""The two-object task's reward with credit for parts of the form, for robustness.py.

    --set 'latent.reward.functions=[{path: benchmarks/form_reward.py, kwargs: {weight: 0.1}}]'

reward/digits.py gives its 0.1 for the whole form or nothing: a policy that loses one word of it
sees no difference between that word and all of them.
"""

import re

from reward import digits


def compute_score(data_source, solution_str, ground_truth, extra_info, weight=0.1, **kwargs):
    """Accuracy and `weight` times the share of the form's parts that are there."""
    scored = digits.compute_score(
        data_source, solution_str, ground_truth, extra_info, variant="interleaved"
    )
    colors = [step.split()[0] for step in extra_info["steps"]]
    parts = parts_of_form(solution_str, extra_info["latent"], colors)
    share = sum(parts) / len(parts)
    return scored | {"score": scored["accuracy"] + weight * share, "parts": share}


def parts_of_form(solution_str: str, latent: dict, colors: list[str]) -> list[bool]:
    """For each colour in its place: named with a number, its span between; an answer; an end.

    >>> latent = {"span_offsets": [6], "stop_reason": "length"}
    >>> parts_of_form("at red 7 at blue 3 <answer> 7", latent, ["red", "blue"])
    [True, True, True, False, False, False]
    """
    head = solution_str.split("<answer>")[0]
    found = [match for match in digits.OBJECT.finditer(head)]
    parts = []
    for i, color in enumerate(colors):
        is_named = i < len(found) and found[i].group(1) == color
        offsets = latent["span_offsets"]
        has_span = is_named and any(
            found[i].end(1) <= offset <= found[i].start(2) for offset in offsets
        )
        parts += [is_named, has_span]
    answers = re.findall(r"<answer>\s*\S.*?</answer>", solution_str, re.DOTALL)
    return [*parts, len(answers) == 1, latent["stop_reason"] == "eos"]
