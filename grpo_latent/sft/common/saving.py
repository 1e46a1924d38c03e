"""The folder that SFT writes for RL, evaluation and the next stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from grpo_latent.common.files import replacing_folder
from grpo_latent.errors import TrainingError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.loading import LatentModel, save_latent_model


def save_for_rl(
    folder: str | Path,
    latent: LatentModel,
    state_dict: dict[str, Tensor] | None = None,
    mechanism: Mechanism | None = None,
) -> Path:
    """Writes the folder that RL starts from; an older one stays until the new one is complete.

    Args:
        state_dict: gathered weights of a sharded model; None takes the model's own.
        mechanism: in place of the model's.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
    """
    folder = Path(folder)
    weights = latent.model.state_dict() if state_dict is None else state_dict
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TrainingError(
            "weights are not finite",
            where=str(folder),
            got=f"{', '.join(bad[:5])}; {len(bad)} of {len(weights)} tensors",
            expected="finite numbers",
            fix="Lower trainer.learning_rate, and start anew or from the last checkpoint.",
        )
    with replacing_folder(folder) as unfinished:
        save_latent_model(
            unfinished,
            latent.model,
            latent.tokenizer,
            latent.processor,
            mechanism or latent.mechanism,
            state_dict,
        )
    return folder
