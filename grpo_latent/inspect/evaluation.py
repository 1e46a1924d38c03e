"""Rows of the ablation chart out of a report of `grpo_latent.evaluate`."""

from __future__ import annotations

import numpy as np

from grpo_latent.errors import DataError
from grpo_latent.eval.statistics import bootstrap_interval, usage_verdict

OWN = "own"


def ablation_rows(name: str, report: dict) -> dict:
    """Accuracies with intervals, and a verdict where per-prompt outcomes allow a paired test.

    Args:
        report: `ablations`: accuracies by name, null where impossible; `num_prompts`; and, for paired tests,
            `outcomes`: by the same names one number a prompt.

    Returns:
        {"name", "num_prompts", "paired", "rows": [{"name", "accuracy", "low", "high", "verdict", "sentence"}]}; `low`,
        `high`, `verdict` and `sentence` are None where they cannot be had.
    """
    accuracies = {n: float(a) for n, a in report["ablations"].items() if isinstance(a, int | float)}
    outcomes = report.get("outcomes") or {}
    num_prompts = report.get("num_prompts")
    rows = []
    for ablation, accuracy in accuracies.items():
        values_P = _outcomes(outcomes.get(ablation), accuracy, num_prompts)
        interval = None if values_P is None else bootstrap_interval(values_P)
        row = {"name": ablation, "accuracy": accuracy, "verdict": None, "sentence": None}
        row |= {"low": interval and interval.low, "high": interval and interval.high}
        if ablation != OWN and ablation in outcomes and OWN in outcomes:
            try:
                verdict = usage_verdict(outcomes[OWN], outcomes[ablation], ablation=ablation)
                row |= {"verdict": verdict.verdict, "sentence": verdict.sentence}
            except DataError as error:
                row["sentence"] = str(error)
        rows.append(row)
    rows.sort(key=lambda row: row["name"] != OWN)
    return {"name": name, "num_prompts": num_prompts, "paired": OWN in outcomes, "rows": rows}


def _outcomes(values: list | None, accuracy: float, num_prompts: object) -> np.ndarray | None:
    """Outcomes as recorded, else 0/1 ones that give the accuracy: the interval of a single accuracy needs no pairing."""
    if values:
        return np.asarray(values, dtype=float)
    if not isinstance(num_prompts, int) or num_prompts < 1 or not 0 <= accuracy <= 1:
        return None
    num_right = round(accuracy * num_prompts)
    return np.repeat([1.0, 0.0], [num_right, num_prompts - num_right])
