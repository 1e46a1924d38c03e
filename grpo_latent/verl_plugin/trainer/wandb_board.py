"""Rollouts, groups and the inspector's page in the wandb run that `trainer.logger` asks for."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from grpo_latent.common.provenance import provenance
from grpo_latent.errors import TrainingError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.wandb_run import logs_to_wandb

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

logger = logging.getLogger(__name__)

COLUMNS = (
    "step",
    "id",
    "text",
    "ground_truth",
    "reward",
    "advantage",
    "num_spans",
    "num_steps",
    "stop_reason",
)
NUM_ROWS = 256  # of a step; all are in the dump
PAGE_TIMEOUT_S = 3600


class Board:
    """Logs into the wandb run that verl has begun in this process.

    What fails here is a warning: training goes on.

    Args:
        folder: of the run's dumps, config and metrics.
        seed: of the run.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.seed = seed

    def log_rollouts(self, step: int, records: list[dict], summaries: list[dict]) -> None:
        """`latent/rollouts`: the first trajectories of a dump.

        Args:
            records: as dumped.
            summaries: `extra_info["latent"]` of each.
        """
        with _warning_only("the rollouts are not in wandb; they are in the dump"):
            import wandb

            rows = []
            for record, summary in zip(records[:NUM_ROWS], summaries, strict=False):
                pairs = zip(record.get("advantages", []), record["response_mask"], strict=False)
                acted = [advantage for advantage, is_action in pairs if is_action]
                found = record | summary | {"advantage": acted[0] if acted else None}
                rows.append([found.get(name) for name in COLUMNS])
            table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
            # under the step whose metrics verl logs next: wandb takes steps in order only
            run = self._run()
            run.log({"latent/rollouts": table}, step=step)

    def log_page(self, step: int) -> None:
        """`latent/inspector` and its tables, over the run's dumps."""
        with _warning_only(
            f"the page is not in wandb; python -m grpo_latent.inspect {self.folder} draws it"
        ):
            from grpo_latent.inspect.wandb_log import log_page

            page, tables = draw_apart(self.folder)
            log_page(self._run(), page, tables, step)

    def _run(self) -> Run:
        """Gives the run that verl's logger has begun, with its provenance in its summary."""
        import wandb

        run = wandb.run
        assert run is not None, "verl's logger has begun it"
        if run.summary.get("provenance") is None:
            run.summary["provenance"] = provenance(self.seed)
        return run


def draw_apart(folder: Path, timeout_s: float = PAGE_TIMEOUT_S) -> tuple[str, dict[str, dict]]:
    """The page of a run and its tables, drawn by a process of its own.

    It loads a checkpoint. The devices are the workers' still, so it sees none; and where memory is
    short, it is that process which the system kills.

    Raises:
        TrainingError: it failed, or took longer than `timeout_s`.
    """
    from grpo_latent.inspect.wandb_log import PAGE_FILE, TABLES_FILE

    with tempfile.TemporaryDirectory() as out:
        # Ray puts the job's folder on the path of this process only
        path = os.pathsep.join(folder for folder in sys.path if folder)
        command = [
            sys.executable,
            "-m",
            "grpo_latent.inspect.wandb_log",
            str(folder.resolve()),
            out,
        ]
        # an empty list of devices hides them
        env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise TrainingError(
                "drawing the page took too long",
                where=str(folder),
                expected=f"{timeout_s:.0f} s at most",
            ) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            got = f"exit code {done.returncode}: {lines[-1] if lines else ''}"
            raise TrainingError(
                "the page could not be drawn", where=str(folder), got=got, expected="exit code 0"
            )
        return (Path(out) / PAGE_FILE).read_text(encoding="utf-8"), json.loads(
            (Path(out) / TABLES_FILE).read_text()
        )


@contextmanager
def _warning_only(consequence: str) -> Iterator[None]:
    """Whatever fails inside is logged with what follows from it, and not raised."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s; %s", type(error).__name__, error, consequence)


def check_board(config: DictConfig) -> None:
    """Raises `ConfigError` where wandb is a logger and what draws its page is not installed."""
    if logs_to_wandb(config):
        from grpo_latent.inspect.page import plotly_bundle

        plotly_bundle()


def make_board(config: DictConfig) -> Board | None:
    """None where wandb is not among the loggers."""
    if not logs_to_wandb(config):
        return None
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    folder = options.output_dir or Path(config.trainer.default_local_dir).parent
    return Board(Path(folder), options.seed)
