"""What an SFT run shows and writes while it trains: one bar, and one JSON line a logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from grpo_latent.common.files import write_text

SHOWN = {
    "stage": "stage",
    "ce": "ce",
    "latent_loss": "latent",
    "latent_hit": "hit",
    "learning_rate": "lr",
}


class ProgressBar(TrainerCallback):
    """Draws a bar on a terminal; elsewhere prints one line a logged step."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._progress: Progress | None = None
        self._shown: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("sft"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console)
        self._progress.start()
        self._task = self._progress.add_task(
            "sft", total=state.max_steps, completed=state.global_step, metrics=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self._shown |= {name: logs[name] for name in SHOWN if name in logs}
        text = "  ".join(f"{SHOWN[name]} {value:.3g}" for name, value in self._shown.items())
        if self._progress is not None:
            self._progress.update(self._task, metrics=text)
        else:
            self.console.print(
                f"sft {state.global_step}/{state.max_steps}  {text}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Restores the terminal; also after an error, which skips `on_train_end`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class JsonlLog(TrainerCallback):
    """Appends {"step": …, metrics} to a file, less the steps that a resumed run makes again."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) <= state.global_step]
        if state.global_step == 0:
            kept = []
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            line = {
                "step": state.global_step,
                **logs,
                "seconds": round(time.perf_counter() - self._start, 3),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    """The line's step; a line cut short by a kill counts as never reached."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
