"""The commit point of a step: the tracker names its checkpoint once all else is on disk.

    saved ▸ validated ▸ judged ▸ rollouts dumped ▸ logged ─▶ guards.json ▸ manifest ▸ tracker
                                                  ▸ best named ▸ old ones removed ▸ callbacks

Killed before the tracker, a run takes the step again and writes the same files and lines under the
same names. What comes after it is done again on resume.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from verl.utils.tracking import Tracking

from grpo_latent.common import manifest
from grpo_latent.common.best_checkpoint import STATE_FILE
from grpo_latent.common.files import sync
from grpo_latent.common.pickles import check_pickles
from grpo_latent.verl_plugin.boot import metrics_file
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.worker.parts import RANKS_FILE, resharding_notes

DATA_FILE = "data.pt"
TRUST = "latent.trust_pickles"


class CommittingLogger:
    """verl's loggers, and a call once they have all taken a step.

    verl logs last, so what follows the log has no method of its own.
    """

    def __init__(self, tracking: Tracking, after_log: Callable[[], None], begins_after: int):
        self._tracking = tracking
        self._after_log = after_log
        self._purge_tensorboard(begins_after)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracking, name)

    def log(self, data: dict, step: int, backend: Any = None) -> None:
        self._tracking.log(data, step, backend)
        self._after_log()

    @property
    def _tensorboard(self) -> Any:
        """verl's adapter of TensorBoard, None where it is not among the loggers."""
        return self._tracking.logger.get("tensorboard")

    def flush(self) -> None:
        """Has the one logger write that keeps events in memory for minutes."""
        adapter = self._tensorboard
        if adapter is not None:
            adapter.writer.flush()

    def _purge_tensorboard(self, begins_after: int) -> None:
        """Hides events of steps that a resumed run takes again."""
        adapter = self._tensorboard
        if adapter is not None and begins_after:
            adapter.writer.close()
            adapter.writer = type(adapter.writer)(
                adapter.writer.log_dir, purge_step=begins_after + 1
            )


def sync_outputs(trainer: DictConfig, step: int) -> None:
    """Waits until what a step has appended or dumped through verl is on the disk."""
    paths = [metrics_file.metrics_path(trainer.project_name, trainer.experiment_name)]
    folders = (trainer.get("rollout_data_dir"), trainer.get("validation_data_dir"))
    paths += [Path(folder) / f"{step}.jsonl" for folder in folders if folder]
    for path in paths:
        if path.is_file():
            sync(path)


def write_manifest(folder: Path, parts: list[manifest.Entries]) -> None:
    """Writes a checkpoint's manifest.

    Args:
        parts: digests of each rank's files below `actor`, made where they were written.
    """
    entries = manifest.digests(folder, (DATA_FILE, STATE_FILE))
    for part in parts:
        entries |= {f"actor/{name}": entry for name, entry in part.items()}
    manifest.write_manifest(folder, entries)


def check_checkpoint(folder: Path, workers: Any, options: LatentOptions) -> list[str]:
    """Compares a checkpoint with its manifest; each rank reads the files that it will load.

    Args:
        workers: the actor's worker group.

    Returns:
        what the user should know.

    Raises:
        CheckpointError: a part is missing or changed, or would run code.
    """
    entries = manifest.read_manifest(folder)
    config = f"actor/{RANKS_FILE}"
    if entries is None:
        notes = [manifest.no_manifest(folder)]
    else:
        verify = options.verify_digests
        here = {name: entries[name] for name in entries if not name.startswith("actor/")}
        here |= {name: entries[name] for name in (config,) if name in entries}
        manifest.check_files(folder, here, verify)
        manifest.check_unlisted(folder, entries)
        notes = [] if verify else [manifest.not_compared(folder)]
    notes += resharding_notes(folder / "actor", workers.world_size)
    check_pickles([folder / DATA_FILE], options.trust_pickles, TRUST)
    if entries is not None:
        parts = {
            name.removeprefix("actor/"): entry
            for name, entry in entries.items()
            if name.startswith("actor/") and name != config
        }
        workers.check_parts(str(folder / "actor"), parts)
    return notes
