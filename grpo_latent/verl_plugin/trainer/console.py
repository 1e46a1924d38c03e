"""The driver's console: a bar and one short line a step; all else goes to a log file."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from grpo_latent.verl_plugin.trainer.console_line import Report, short_line


@contextmanager
def output_to_file(path: Path):
    """Sends this process's stdout and stderr, and with them all workers', to `path` (appending).

    Ray prints what workers print on the driver's stdout.

    Yields:
        a rich console on the stdout that was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with os.fdopen(os.dup(1), "w", buffering=1) as terminal:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield Console(file=terminal, highlight=False, soft_wrap=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, original in zip((1, 2), saved, strict=True):
            os.dup2(original, target)
            os.close(original)
        os.close(log)


# of silence before the first report, until it is said what it is about, and until it is said again
FIRST_WAIT_S, WAIT_S = 10.0, 30.0


class StepPrinter:
    """Prints each report once; the bar shows on terminals only."""

    def __init__(self, console: Console):
        self.console = console
        self._progress = Progress(
            TextColumn("GRPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._next_wait_s = FIRST_WAIT_S

    def __enter__(self) -> StepPrinter:
        self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.stop()

    def wait(self, seconds: float) -> None:
        """Says, now and then, that nothing has been reported for so long."""
        if seconds < self._next_wait_s:
            return
        self._next_wait_s = max(seconds, self._next_wait_s) + WAIT_S
        self.console.print(
            f"{seconds:.0f} s: workers start, then the first validation runs; the log has "
            "what they say"
        )

    def __call__(self, report: Report) -> None:
        if self._task is None:
            self._task = self._progress.add_task("steps", total=report.total_steps)
        self._progress.update(self._task, completed=report.step, total=report.total_steps)
        # a step's own line carries its validation; this one is for validation outside of training
        is_start = report.kind == "validation" and report.step == 0
        if report.kind in ("step", "alarm", "event") or is_start:
            self.console.print(short_line(report))
