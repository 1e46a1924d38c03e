"""`python -m grpo_latent.check_reward my_reward.py` tries a reward function before a run does.

Exit code 0 if nothing is wrong, 2 if something is (see `common.command`).
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_latent.common.arguments import check_arguments
from grpo_latent.common.command import DONE, REFUSED, command
from grpo_latent.common.kinds import number
from grpo_latent.rewards.check import CheckReport, check_function
from grpo_latent.rewards.functions import DEFAULT_NAME, FunctionSpec

WIDTH_OF_FILES = 10_000


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.check_reward", description=__doc__.splitlines()[0]
    )
    parser.add_argument("path", help="Python file, or pkg://package.module")
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help="function in the file (default: %(default)s)"
    )
    parser.add_argument(
        "--kwargs", default="{}", type=json.loads, help="JSON object, passed to each call"
    )
    parser.add_argument(
        "--ground-truth",
        default="4",
        help="right answer of the trial question (default: %(default)s)",
    )
    parser.add_argument(
        "--wrong-answer", default="5", help="a wrong answer to it (default: %(default)s)"
    )
    parser.add_argument(
        "--data-source", default="check", help="data_source that the function is given"
    )
    parser.add_argument(
        "--timeout-s", default=5.0, type=float, help="for each call (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    check_arguments(options, timeout_s=number(above=0))
    spec = FunctionSpec(options.path, options.name, kwargs=options.kwargs)
    report = check_function(
        spec, options.ground_truth, options.wrong_answer, options.data_source, options.timeout_s
    )
    show(report, spec)
    return REFUSED if report.problems else DONE


def show(report: CheckReport, spec: FunctionSpec) -> None:
    # a file has no width to keep to: whoever looks for a problem's text finds it in one line
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    if report.rows:
        table = Table(title=escape(f"{spec.path}: {spec.name}"))
        for column in ("completion", "score", "ms", "problem"):
            table.add_column(column, justify="right" if column in ("score", "ms") else "left")
        for case, outcome, verdict in report.rows:
            score = "-" if outcome.score is None else f"{outcome.score:g}"
            cells = (case.name, score, f"{outcome.seconds * 1e3:.1f}", verdict)
            table.add_row(*map(escape, cells), style="red" if verdict else None)
        console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    if not report.rows:  # it could not even be loaded; the table has the problems otherwise
        for problem in report.problems:
            console.print(f"[red]problem:[/] {escape(problem)}")
    total = len(report.problems)
    num_warnings = len(report.warnings)
    if total:
        console.print(f"[red]{total} problem{'s' if total > 1 else ''}[/]")
    elif num_warnings:
        console.print(f"nothing wrong, {num_warnings} warning{'s' if num_warnings > 1 else ''}")
    else:
        console.print("[green]nothing wrong[/]")


if __name__ == "__main__":
    sys.exit(main())
