"""Rollouts, groups and the inspector's page in the run's wandb, where `trainer.logger` names it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from grpo_latent.verl_plugin.boot.options import LatentOptions

COLUMNS = ("step", "id", "text", "ground_truth", "reward", "advantage", "num_spans", "num_steps", "stop_reason")
NUM_ROWS = 256  # of a step; all are in the dump


class Board:
    """Logs into the wandb run that verl has begun in this process."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device

    def log_rollouts(self, step: int, records: list[dict], summaries: list[dict]) -> None:
        """`latent/rollouts`: the first trajectories of a dump.

        Args:
            records: as dumped.
            summaries: `extra_info["latent"]` of each.
        """
        import wandb

        rows = []
        for record, summary in zip(records[:NUM_ROWS], summaries, strict=False):
            acted = [a for a, m in zip(record.get("advantages", []), record["response_mask"], strict=False) if m]
            found = record | summary | {"advantage": acted[0] if acted else None}
            rows.append([found.get(name) for name in COLUMNS])
        table = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
        # under the step whose metrics verl logs next: wandb takes steps in order only
        wandb.run.log({"latent/rollouts": table}, step=step)

    def log_page(self, step: int) -> None:
        """`latent/inspector` and its tables, over the run's dumps."""
        import wandb

        from grpo_latent.inspect.page import render
        from grpo_latent.inspect.report import Limits, build_report
        from grpo_latent.inspect.run import read_run
        from grpo_latent.inspect.wandb_log import log_report

        run = read_run(self.folder)
        report = build_report([run], Limits(), self.device)
        log_report(wandb.run, report, render(report, run.name), step)


def logs_to_wandb(config: DictConfig) -> bool:
    loggers = config.trainer.logger
    return "wandb" in ([loggers] if isinstance(loggers, str) else loggers)


def check_board(config: DictConfig) -> None:
    """Raises `ConfigError` where wandb is among the loggers and what draws its page is not installed."""
    if logs_to_wandb(config):
        from grpo_latent.inspect.page import plotly_bundle

        plotly_bundle()


def make_board(config: DictConfig) -> Board | None:
    """None where wandb is not among the loggers."""
    if not logs_to_wandb(config):
        return None
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    folder = options.output_dir or Path(config.trainer.default_local_dir).parent
    return Board(Path(folder), config.trainer.device)
