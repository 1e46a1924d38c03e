"""The folder that SFT writes for RL, evaluation and the next stage; weights of a resumed run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from grpo_latent.common.files import replacing_folder
from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.loading import LatentModel, read_tensors, save_latent_model


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
    """
    folder = Path(folder)
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


@torch.no_grad()
def load_all_weights(model: nn.Module, folder: str) -> None:
    """Copies every weight of a folder into the model, by the model's own names.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    missing = {tensor.data_ptr() for tensor in own.values()}
    for name, tensor in read_tensors(folder, ("",)):
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "a weight of the model"
            raise CheckpointError(
                "weight does not fit",
                where=f"{folder}: {name}",
                got=tuple(tensor.shape),
                expected=str(expected),
            )
        own[name].copy_(tensor)
        # by address: tied weights are saved under one of their names
        missing.discard(own[name].data_ptr())
    if missing:
        names = sorted(name for name, tensor in own.items() if tensor.data_ptr() in missing)
        raise CheckpointError(
            "weights are missing",
            where=folder,
            got=names[:5],
            expected="every weight of the model",
        )
