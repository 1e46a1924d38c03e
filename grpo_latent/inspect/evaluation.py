"""Rows of the ablation chart out of a report of `grpo_latent.evaluate`."""

from __future__ import annotations

from grpo_latent.eval.statistics import bootstrap_interval, by_cluster

OWN = "own"
FACTS = {
    "follow": "answers under shuffle that are the donor's right ones",
    "hit": "latents whose nearest visual token is the box's (alignment, not quality)",
    "leak": "largest change of a log-prob after the span when the image is swapped, nats",
}


def ablation_rows(name: str, report: dict) -> dict:
    """Lists accuracies with intervals, verdicts, and the report's other measures of use.

    Returns:
        {"name", "checkpoint", "num_prompts", "chance", "verdict", "facts": [[words, value]],
            "rows": [row]}. A row:
        {"name", "accuracy", "low", "high", "gap", "gap_low", "gap_high", "changed", "about",
            "verdict", "sentence"}; `own`
        comes first. What a report does not have is None.
    """
    outcomes = report.get("outcomes") or {}
    usage = report.get("usage") or {}
    rows = []
    for ablation, accuracy in report["ablations"].items():
        if not isinstance(accuracy, int | float):
            continue
        values = outcomes.get(ablation) or []
        # without names of questions each row is one
        prompts = report.get("prompts") or [{}] * len(values)
        questions = [prompt.get("question", str(row)) for row, prompt in enumerate(prompts)]
        means_Q = by_cluster(questions, values) if values else []
        interval = bootstrap_interval(means_Q) if means_Q else None
        entry = usage.get(ablation) or {}
        gap_low, gap_high = entry.get("gap_interval") or (None, None)
        rows.append(
            {
                "name": ablation,
                "accuracy": float(accuracy),
                "low": interval and interval.low,
                "high": interval and interval.high,
                "gap": entry.get("gap"),
                "gap_low": gap_low,
                "gap_high": gap_high,
                "changed": entry.get("num_changed"),
                "about": entry.get("about"),
                "verdict": entry.get("verdict"),
                "sentence": entry.get("sentence"),
            }
        )
    rows.sort(key=lambda row: row["name"] != OWN)
    facts = [
        [words, float(report[key])]
        for key, words in FACTS.items()
        if isinstance(report.get(key), int | float)
    ]
    return {
        "name": name,
        "checkpoint": str(report.get("checkpoint") or ""),
        "num_prompts": report.get("num_prompts"),
        "chance": report.get("chance"),
        "verdict": report.get("verdict"),
        "facts": facts,
        "rows": rows,
    }
