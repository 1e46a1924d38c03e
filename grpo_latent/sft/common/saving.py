"""What SFT leaves behind: a folder that RL, evaluation and the next stage start from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor

from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.loading import LatentModel, save_latent_model


def save_for_rl(
    folder: str | Path,
    latent: LatentModel,
    state_dict: dict[str, Tensor] | None = None,
    config: LatentConfig | None = None,
) -> Path:
    """Writes the folder that RL starts from; one that was there before is replaced only once the new one is complete.

    Args:
        state_dict: gathered weights of a sharded model; None takes the model's own.
        config: in place of the model's.
    """
    folder = Path(folder)
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_latent_model(part, latent.model, latent.tokenizer, latent.processor, config or latent.config, state_dict)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
