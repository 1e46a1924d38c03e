"""Points of a run at which its trainer kills itself, for `benchmarks/kills.py`.

`trainer.checkpoint_callback_class` names the class below, which verl makes in the trainer's
process. KILL_AT=<point>@<step> has that process send itself SIGKILL when it is there, and say so in
the file KILLED before; ARCHIVE is a folder that gets a copy of each checkpoint.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from grpo_latent.verl_plugin.boot import metrics_file
from grpo_latent.verl_plugin.trainer import checkpoint, committing_trainer
from grpo_latent.verl_plugin.trainer import trainer as trainer_module
from grpo_latent.verl_plugin.trainer.commit import CommittingLogger
from grpo_latent.verl_plugin.trainer.guards import Guards
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer

BEFORE, AFTER = "before", "after"
# of each: where it is called, by a name for the point; both sides of it are points
CALLS: dict[str, tuple[Any, str]] = {
    "init": (LatentPPOTrainer, "init"),
    "load": (LatentPPOTrainer, "_load_checkpoint"),
    "rewind": (metrics_file, "rewind_metrics"),
    "train_begin": (LatentPPOTrainer, "on_train_begin"),
    "sample": (LatentPPOTrainer, "on_sample_end"),
    "old_log_prob": (LatentPPOTrainer, "_compute_old_log_prob"),
    "ref_log_prob": (LatentPPOTrainer, "_compute_ref_log_prob"),
    "advantage": (LatentPPOTrainer, "_compute_advantage"),
    "update": (LatentPPOTrainer, "_update_actor"),
    "save": (LatentPPOTrainer, "_save_checkpoint"),
    "send_weights": (LatentPPOTrainer, "on_step_end"),
    "validate": (LatentPPOTrainer, "_validate"),
    "usage": (LatentPPOTrainer, "_measure_usage"),
    "metrics": (LatentPPOTrainer, "_compute_metrics"),
    "dump": (trainer_module, "dump_step"),
    "judge": (Guards, "after_step"),
    "log": (CommittingLogger, "log"),
    "commit": (LatentPPOTrainer, "_commit"),
    "sync": (committing_trainer, "sync_outputs"),
    "guards": (Guards, "save"),
    "manifest": (committing_trainer, "write_manifest"),
    "tracker": (checkpoint, "write_tracker"),
    "name_best": (Guards, "name_best"),
    "prune": (checkpoint, "prune"),
    "shutdown": (LatentPPOTrainer, "_shutdown_dump_executor"),
    "fit": (LatentPPOTrainer, "fit"),
}
# the trainer is killed as soon as a worker, or itself, has made the file
FILES = {
    "file_model": "actor/model_*.pt",
    "file_optimizer": "actor/optim_*.pt",
    "file_extra": "actor/extra_state_*.pt",
    "file_config": "actor/fsdp_config.json",
    "file_hf_config": "actor/huggingface/config.json",
    "file_hf_weights": "actor/huggingface/model.safetensors",
    "file_hf_tokenizer": "actor/huggingface/tokenizer.json",
    "file_hf_latents": "actor/huggingface/latent_config.json",
    "file_hf_manifest": "actor/huggingface/manifest.json",
    "file_data": "data.pt",
    "file_dump": "../../rollouts/step_{step}.safetensors",
}
_trainer: LatentPPOTrainer | None = None


class KillPoints(CheckpointCallback):
    """Installs the point that the environment names."""

    def __init__(self, config=None):
        super().__init__(config)
        at = os.environ.get("KILL_AT")
        if at:
            point, _, step = at.partition("@")
            install(point, int(step) if step else None)

    def on_save(
        self, trainer, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs
    ) -> None:
        archive = os.environ.get("ARCHIVE")
        if archive and not (Path(archive) / str(global_step)).exists():
            shutil.copytree(checkpoint_dir, Path(archive) / str(global_step))


def install(point: str, step: int | None) -> None:
    """Has this process kill itself at a point: the first time, or in a step."""
    wrap(LatentPPOTrainer, "fit", AFTER, remember)
    if point in FILES:
        wrap(LatentPPOTrainer, "_save_checkpoint", BEFORE, functools.partial(watch, point, step))
        return
    name, side = point.rsplit("_", 1)
    wrap(*CALLS[name], side, functools.partial(reached, step))


def wrap(owner: Any, name: str, side: str, action: Callable[[], None]) -> None:
    """Calls `action` before or after a function of a class or module."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        remember(*args)
        if side == BEFORE:
            action()
        result = original(*args, **kwargs)
        if side == AFTER:
            action()
        return result

    setattr(owner, name, wrapped)


def remember(*args) -> None:
    global _trainer
    if args and isinstance(args[0], LatentPPOTrainer):
        _trainer = args[0]


def reached(step: int | None) -> None:
    if step is None or (_trainer is not None and _trainer.global_steps == step):
        kill()


def kill() -> None:
    Path(os.environ["KILLED"]).write_text(os.environ["KILL_AT"])
    os.kill(os.getpid(), signal.SIGKILL)


def watch(point: str, step: int | None) -> None:
    assert _trainer is not None, "its method is wrapped"
    if _trainer.global_steps != step:
        return
    folder = _trainer.guards.root / f"{checkpoint.STEP_PREFIX}{step}"
    pattern = FILES[point].format(step=step)

    def wait() -> None:
        while not any(path.exists() for path in matching(folder, pattern)):
            time.sleep(0.0005)
        kill()

    threading.Thread(target=wait, daemon=True).start()


def matching(folder: Path, pattern: str) -> list[Path]:
    if pattern.startswith("../"):
        return [folder / pattern]
    return list(folder.glob(pattern)) if folder.is_dir() else []
