"""The page and its tables in a wandb run."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_latent.inspect.report import Report

GROUP_COLUMNS = (
    "step",
    "group",
    "question",
    "truth",
    "size",
    "reward",
    "reward_std",
    "spans",
    "steps",
    "disagreement",
    "commonest",
    "hit",
)
ABLATION_COLUMNS = ("name", "accuracy", "low", "high", "gap", "gap_low", "gap_high", "changed", "about", "verdict")
KEY = "latent/inspector"


def group_rows(report: Report) -> list[list]:
    """A row a group, as the page's table has them."""
    names = [run["name"] for run in report.overview["runs"]]
    return [[names[g["run"]], *(g[column] for column in GROUP_COLUMNS)] for g in report.overview["groups"]]


def ablation_rows(report: Report) -> list[list]:
    """A row an ablation of an evaluation."""
    return [
        [run["name"], evaluation["name"], *(row[column] for column in ABLATION_COLUMNS)]
        for run in report.overview["runs"]
        for evaluation in run["ablations"]
        for row in evaluation["rows"]
    ]


def log_report(run, report: Report, html: str, step: int | None = None) -> None:
    """Logs `latent/inspector` (the page), `latent/groups` and, where there are evaluations, `latent/ablations`.

    Args:
        run: of wandb, online or offline.
    """
    import wandb

    values = {KEY: wandb.Html(html, inject=False), "latent/groups": _table(("run", *GROUP_COLUMNS), group_rows(report))}
    ablations = ablation_rows(report)
    if ablations:
        values["latent/ablations"] = _table(("run", "evaluation", *ABLATION_COLUMNS), ablations)
    run.log(values, step=step)


def _table(columns: Sequence[str], rows: list[list]):
    import wandb

    # a question is text in one row and missing in the next
    return wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)
