"""A treatment's own parameters in a model: attached, and filled from a folder that has them.

folder has   all of them    loaded
             none           initialised from the seed: a checkpoint of SFT, or of another
                            treatment. Whoever loads says so (`initialisation_notes`)
             some           refused
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.treatments import Treatment


def attach_treatment(
    model: PreTrainedModel, treatment: Treatment, folder: str | Path, seed: int
) -> None:
    """Gives a model the treatment's parameters, before FSDP wraps it.

    Torch's generator stays where it was. Where the model's weights are meta (FSDP2 sends rank 0's
    to the other ranks), the parameters are meta, too.

    Raises:
        CheckpointError: the folder has some of the parameters, or of another shape.
    """
    if not treatment.has_parameters:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        treatment.attach(model)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return
    found = _tensors(folder, treatment.parameter_prefixes)
    if not found:
        return
    own = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(treatment.parameter_prefixes)
    }
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    got = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != got:
        raise CheckpointError(
            "the checkpoint's treatment is another",
            where=f"{folder}, latent.treatment.name={type(treatment).__name__}",
            got=got,
            expected=str(shapes),
            fix="Choose the treatment of the run that wrote it, or a checkpoint without one.",
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def initialisation_notes(treatment: Treatment, folder: str | Path, seed: int) -> list[str]:
    """What the user should know before a run from this folder."""
    if not treatment.has_parameters or _tensors(folder, treatment.parameter_prefixes):
        return []
    return [
        f"latent.treatment {type(treatment).__name__}: {folder} has no parameters of it; "
        f"they start fresh, from seed {seed}"
    ]


def _tensors(folder: str | Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {
                name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)
            }
    return found
