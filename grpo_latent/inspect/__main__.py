"""`python -m grpo_latent.inspect outputs/<run> [outputs/<other> …]` writes one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from transformers.utils.logging import disable_progress_bar

from grpo_latent.common.arguments import check_arguments
from grpo_latent.common.command import add_verify_digests, command, print_error
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.common.files import write_text
from grpo_latent.common.kinds import null_or, number, text, whole
from grpo_latent.inspect.page import render
from grpo_latent.inspect.report import Limits, Report, build_report
from grpo_latent.inspect.run import OnProgress, Run, read_run, run_folders
from grpo_latent.inspect.wandb_log import log_report


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    disable_progress_bar()  # transformers', for reading weights
    dtype = parse_dtype(options.dtype, "--dtype")
    limits = Limits(
        options.trajectories, options.probe, int(options.megabytes * 1e6), options.verify_digests
    )
    path = options.out or options.runs[0] / "report.html"
    with progress_bar() as progress:
        runs = [
            read_run(folder, options.checkpoint, options.data, progress)
            for given in options.runs
            for folder in run_folders(given)
        ]
        report = build_report(runs, limits, options.device, dtype, progress)
        html = render(report, title_of(runs, report))
        write_text(path, html)
    if options.wandb:
        import wandb

        with wandb.init(project=options.wandb, name=path.stem, job_type="inspect") as board:
            log_report(board, report, html)
    for run in runs:
        for problem in run.problems:
            print_error(problem)
    shown = f"{len(report.blocks)} groups" if report.blocks else "no trajectories in it so far"
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, {shown}")


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A line on stderr that says what is being read or made, and how much of it; then it goes.

    Only where that is a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    off = not console.is_terminal
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=off
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=escape(what), completed=done, total=total or None
        )


def title_of(runs: Sequence[Run], report: Report) -> str:
    """Joins the runs' names; one run's has its parent folder, because many are called alike."""
    if len(runs) == 1:
        return "/".join(runs[0].folder.resolve().parts[-2:])
    return ", ".join(run["name"] for run in report.overview["runs"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line; raises `ConfigError` at one that is out of range."""
    parser = argparse.ArgumentParser(prog="python -m grpo_latent.inspect", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="output folders of training runs, or of recipes"
    )
    parser.add_argument("--out", type=Path, help="the page; report.html in the first run's folder")
    parser.add_argument(
        "--checkpoint", type=Path, help="reads the latents; the run's newest, else its start"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", help="parquet files of the prompts; data.train_files"
    )
    parser.add_argument("--device", default="cpu", help="of the checkpoint, such as cuda")
    parser.add_argument(
        "--dtype", default="float32", help="of the checkpoint, or bfloat16, float16"
    )
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="also log the page and its tables to a wandb run there"
    )
    defaults = Limits()
    parser.add_argument(
        "--trajectories", type=int, default=defaults.trajectories, help="shown at most"
    )
    parser.add_argument(
        "--probe", type=int, default=defaults.probed_groups, help="groups with image and heat maps"
    )
    parser.add_argument(
        "--megabytes", type=float, default=defaults.block_bytes / 1e6, help="of trajectories' data"
    )
    add_verify_digests(parser)
    options = parser.parse_args(arguments)
    check_arguments(
        options,
        trajectories=whole(1),
        probe=whole(0),
        megabytes=number(above=0),
        wandb=null_or(text()),
    )
    return options


if __name__ == "__main__":
    sys.exit(main())
