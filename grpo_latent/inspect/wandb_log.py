"""The page and its tables in a wandb run.

`python -m grpo_latent.inspect.wandb_log <run> <out>` draws both for a process that must not risk
its own memory on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpo_latent.common.files import write_json, write_text
from grpo_latent.inspect.page import render
from grpo_latent.inspect.report import Limits, Report, build_report
from grpo_latent.inspect.run import read_run

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
ABLATION_COLUMNS = (
    "name",
    "accuracy",
    "low",
    "high",
    "gap",
    "gap_low",
    "gap_high",
    "changed",
    "about",
    "verdict",
)
KEY = "latent/inspector"
Tables = dict[str, dict[str, list]]  # by name {"columns", "rows"}
PAGE_FILE, TABLES_FILE = "page.html", "tables.json"


def group_rows(report: Report) -> list[list]:
    """Makes a row a group, as the page's table has them."""
    names = [run["name"] for run in report.overview["runs"]]
    return [
        [names[g["run"]], *(g[column] for column in GROUP_COLUMNS)]
        for g in report.overview["groups"]
    ]


def ablation_rows(report: Report) -> list[list]:
    """Makes a row an ablation of an evaluation."""
    return [
        [run["name"], evaluation["name"], *(row[column] for column in ABLATION_COLUMNS)]
        for run in report.overview["runs"]
        for evaluation in run["ablations"]
        for row in evaluation["rows"]
    ]


def tables_of(report: Report) -> Tables:
    """Makes `latent/groups` and, where there are evaluations, `latent/ablations`, JSON-ready."""
    tables: Tables = {
        "latent/groups": {"columns": ["run", *GROUP_COLUMNS], "rows": group_rows(report)}
    }
    ablations = ablation_rows(report)
    if ablations:
        tables["latent/ablations"] = {
            "columns": ["run", "evaluation", *ABLATION_COLUMNS],
            "rows": ablations,
        }
    return tables


def log_report(run, report: Report, html: str, step: int | None = None) -> None:
    """Logs `latent/inspector` (the page) and the tables of the report.

    Args:
        run: of wandb, online or offline.
    """
    log_page(run, html, tables_of(report), step)


def log_page(run, html: str, tables: Tables, step: int | None = None) -> None:
    """Logs a page and tables that have been made before, perhaps by another process."""
    import wandb

    values: dict[str, object] = {KEY: wandb.Html(html, inject=False)}
    for name, table in tables.items():
        # a question is text in one row and missing in the next
        values[name] = wandb.Table(
            columns=table["columns"], data=table["rows"], allow_mixed_types=True
        )
    run.log(values, step=step)


def draw(folder: str, out: str) -> None:
    """Writes `page.html` and `tables.json` of a run into the folder `out`; computes on the CPU."""
    run = read_run(folder)
    report = build_report([run], Limits(), "cpu")
    write_text(Path(out) / PAGE_FILE, render(report, run.name))
    write_json(Path(out) / TABLES_FILE, tables_of(report))


if __name__ == "__main__":
    draw(*sys.argv[1:])
