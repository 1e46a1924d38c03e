"""Rows of the ablation chart out of a report of `grpo_latent.evaluate`."""

from __future__ import annotations

import numpy as np

from grpo_latent.errors import DataError
from grpo_latent.eval.statistics import bootstrap_interval, usage_verdict

OWN = "own"
NO_VERDICT = (OWN, "oracle")  # the oracle puts better vectors in: no loss says nothing about use
FACTS = {
    "follow": "answers under shuffle that are the donor's right ones",
    "hit": "latents whose nearest visual token is the box's (alignment, not quality)",
    "leak": "largest change of a log-prob after the span when the image is swapped, nats",
}


def ablation_rows(name: str, report: dict) -> dict:
    """Accuracies with intervals, verdicts, and the report's other measures of use.

    Args:
        report: `ablations`: accuracies by name, null where impossible; `num_prompts`; `chance` (0 without); and, for paired
            tests, `outcomes`: by the same names one number a prompt. Without outcomes the least favourable pairing is
            assumed, the one of the most discordant prompts: it gives the widest interval that the accuracies allow.

    Returns:
        {"name", "num_prompts", "paired", "facts": [[words, value]], "rows": [{"name", "accuracy", "low", "high",
        "verdict", "sentence"}]}; `low`, `high`, `verdict` and `sentence` are None where they cannot be had.
    """
    accuracies = {n: float(a) for n, a in report["ablations"].items() if isinstance(a, int | float)}
    recorded = report.get("outcomes") or {}
    num_prompts = report.get("num_prompts")
    outcomes = {n: _outcomes(recorded.get(n), a, num_prompts, n == OWN) for n, a in accuracies.items()}
    is_paired = OWN in recorded
    rows = []
    for ablation, accuracy in accuracies.items():
        values_P, own_P = outcomes[ablation], outcomes.get(OWN)
        interval = None if values_P is None else bootstrap_interval(values_P)
        row = {"name": ablation, "accuracy": accuracy, "verdict": None, "sentence": None}
        row |= {"low": interval and interval.low, "high": interval and interval.high}
        if ablation not in NO_VERDICT and values_P is not None and own_P is not None:
            try:
                verdict = usage_verdict(own_P, values_P, ablation=ablation, chance=float(report.get("chance") or 0))
                row |= {"verdict": verdict.verdict, "sentence": verdict.sentence}
            except DataError as error:  # outcomes of different prompts
                row["sentence"] = str(error)
        rows.append(row)
    rows.sort(key=lambda row: row["name"] != OWN)
    facts = [[words, float(report[key])] for key, words in FACTS.items() if isinstance(report.get(key), int | float)]
    return {"name": name, "num_prompts": num_prompts, "paired": is_paired, "facts": facts, "rows": rows}


def _outcomes(values: list | None, accuracy: float, num_prompts: object, is_own: bool) -> np.ndarray | None:
    """Outcomes as recorded, else 0/1 ones that give the accuracy: own ones first, all others last."""
    if values:
        return np.asarray(values, dtype=float)
    if not isinstance(num_prompts, int) or num_prompts < 1 or not 0 <= accuracy <= 1:
        return None
    num_right = round(accuracy * num_prompts)
    outcomes_P = np.repeat([1.0, 0.0], [num_right, num_prompts - num_right])
    return outcomes_P if is_own else outcomes_P[::-1]
