"""A sharded run's tensors on disk, by name: written by all ranks, read by any number of them.

<checkpoint>/shards/    torch.distributed.checkpoint: each rank's parts, and `.metadata`, their index

    model.<name>             weights
    optimizer.<name>.<key>   what the optimizer keeps of a parameter
    teacher.<name>           the momentum teacher's average

Learning rates stand in the schedule's own file, everything else of the optimizer in the config.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from grpo_latent.common.manifest import DCP_INDEX
from grpo_latent.common.pickles import without_code
from grpo_latent.errors import CheckpointError

SHARDS_FOLDER = "shards"
_OPTIMIZER = "optimizer"


def saved_world_size(checkpoint: str | Path) -> int:
    """How many processes wrote a checkpoint: each left its generators there."""
    return max(1, len(list(Path(checkpoint).glob("rng_state_*.pth"))))


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts a prefix before the names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps, by the names of parameters; nothing before its first step."""
    return {
        f"{_OPTIMIZER}.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write_shards(checkpoint: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors below a checkpoint folder. A collective."""
    folder = Path(checkpoint) / SHARDS_FOLDER
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))


def read_shards(checkpoint: str | Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors from below a checkpoint folder, in place. A collective.

    Raises:
        CheckpointError: there are none, one is missing, or one has another shape.
    """
    folder = Path(checkpoint) / SHARDS_FOLDER
    shapes = _shapes(folder)
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            raise CheckpointError(
                "the shards are those of another model",
                where=f"{folder}: {name}",
                got=shapes.get(name),
                expected=str(tuple(tensor.shape)),
                fix="Resume from a checkpoint of this training, or start anew.",
            )
    with without_code():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder))


@torch.no_grad()
def read_optimizer(
    checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Gives the optimizer what `optimizer_tensors` had when the shards were written."""
    parameters = dict(model.named_parameters())
    on_device = any(group.get("fused") for group in optimizer.param_groups)
    tensors: dict[str, Tensor] = {}
    states: dict[Tensor, dict[str, Tensor]] = {}
    for path, shape in _shapes(Path(checkpoint) / SHARDS_FOLDER).items():
        name, _, key = path.removeprefix(f"{_OPTIMIZER}.").rpartition(".")
        if not path.startswith(f"{_OPTIMIZER}.") or name not in parameters:
            continue
        parameter = parameters[name]
        # what is not of the parameter's shape is a count of steps
        tensors[path] = (
            torch.empty_like(parameter)
            if shape == parameter.shape
            else torch.empty(shape, device=parameter.device if on_device else None)
        )
        states.setdefault(parameter, {})[key] = tensors[path]
    if tensors:
        read_shards(checkpoint, tensors)
    optimizer.state.clear()
    optimizer.state.update(states)


def _shapes(folder: Path) -> dict[str, torch.Size]:
    if not (folder / DCP_INDEX).is_file():
        raise CheckpointError(
            "no shards in the checkpoint",
            where=str(folder),
            expected="a checkpoint of a run with trainer.fsdp=true",
            fix="Resume as the run was started, or start anew from the model's folder.",
        )
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: value.size
        for name, value in stored.items()
        if isinstance(value, TensorStorageMetadata)
    }
