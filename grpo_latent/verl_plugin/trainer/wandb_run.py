"""The run of wandb that a training logs into: one id from its start on, in its output folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from omegaconf import DictConfig

from grpo_latent.common.files import write_text
from grpo_latent.common.kinds import as_list
from grpo_latent.verl_plugin.trainer.checkpoint import resume_folder

ID_FILE = "wandb_run_id"


def logs_to_wandb(config: DictConfig) -> bool:
    return "wandb" in as_list(config.trainer.logger)


def continue_run(config: DictConfig, output_dir: Path) -> None:
    """Has wandb go on in the run of the training that is resumed, or begin one whose id is kept.

    verl's `wandb.init` names no run; it reads these variables. An id that the user has set stays.
    A training that leaves an older step (`resume_path`) is another run: wandb takes steps in order
    only, and would drop those that are taken again.
    """
    if not logs_to_wandb(config):
        return
    if os.environ.get("WANDB_RUN_ID"):
        return
    path = output_dir / ID_FILE
    is_same = config.trainer.resume_mode == "auto" and resume_folder(config.trainer) is not None
    if not (is_same and path.is_file()):
        write_text(path, secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ["WANDB_RESUME"] = "allow"
