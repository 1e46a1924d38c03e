"""A checkpoint that another number of ranks has saved: verl's files, read by torch's planner.

    model_world_size_W_rank_0 … W-1.pt ─┐ mapped into memory, not read
    optim_world_size_W_rank_0 … W-1.pt ─┴─▶ SavedShards ─▶ torch.distributed.checkpoint ─▶ this
                                            rank's shards, in place: it reads what they overlap
    extra_state_world_size_W_rank_r.pt ───▶ schedule: that of all ranks; generators: those of the
                                            rank of this number, where there was one

No collectives: a rank that finds damage raises while no other waits for it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.worker.parts import part_name

State = dict[str, Tensor]


def load_resharded(manager: FSDPCheckpointManager, folder: Path, num_saved: int) -> None:
    """Gives model, optimizer, schedule and generators what `num_saved` ranks have saved.

    As verl's `load_checkpoint`, which reads the files of its own number of ranks.

    Raises:
        CheckpointError: the ranks' files do not belong together, or to this model.
    """
    if manager.should_load_model:
        assert manager.model is not None, "built before anything is loaded"
        states = _read(folder, "model", num_saved)
        own: State = manager.model.state_dict()
        if manager.is_lora_only_state_dict(states[0]):
            own = {name: tensor for name, tensor in own.items() if name in states[0]}
        SavedShards(states, folder / "model").copy_into(own)
    if manager.should_load_optimizer:
        assert manager.optimizer is not None, "built before anything is loaded"
        _load_optimizer(manager.optimizer, _read(folder, "optim", num_saved), folder / "optim")
    if manager.should_load_extra:
        _load_extra(manager, _read(folder, "extra_state", num_saved), folder / "extra_state")


def _read(folder: Path, stem: str, num_saved: int) -> list[Any]:
    """Each saved rank's state; what is large stays in the files until it is copied."""
    return [
        # verl's own switch: `without_code` overrules it unless the user trusts the folder
        torch.load(
            folder / part_name(stem, num_saved, rank),
            map_location="cpu",
            mmap=True,
            weights_only=False,
        )
        for rank in range(num_saved)
    ]


class SavedShards(StorageReader):
    """Tensors of all saved ranks, as torch's planner asks for them.

    Args:
        states: by rank; shards are DTensors, what is not sharded is in each.
        where: for messages, path and stem of the files.

    Raises:
        CheckpointError: ranks have different tensors, or shards that do not make a whole one.
    """

    def __init__(self, states: list[State], where: Path):
        self._where = where
        self._local: dict[MetadataIndex, Tensor] = {}
        self._metadata = Metadata({})
        for rank, state in enumerate(states):
            if state.keys() != states[0].keys():
                names = sorted(map(str, state.keys() ^ states[0].keys()))
                raise _mixed(where, f"{names[:3]} on one of ranks 0 and {rank} alone")
        for name in states[0]:
            self._add(name, [state[name] for state in states])

    def _add(self, name: str, tensors: list[Tensor]) -> None:
        first = tensors[0]
        chunks = []
        for rank, tensor in enumerate(tensors):
            if tensor.shape != first.shape or isinstance(tensor, DTensor) != isinstance(
                first, DTensor
            ):
                raise _mixed(
                    self._where, f"{name}: {_kind(first)}, on rank {rank} {_kind(tensor)}"
                )
            chunk, local = _chunk(tensor)
            if local.shape != chunk.sizes:
                raise _mixed(self._where, f"{name}: rank {rank} has {tuple(local.shape)} of it")
            index = MetadataIndex(name, chunk.offsets)
            if index not in self._local and chunk.sizes.numel():
                self._local[index] = local  # of replicas the first one
                chunks.append(chunk)
        found, expected = sum(chunk.sizes.numel() for chunk in chunks), first.numel()
        if found != expected:
            raise _mixed(self._where, f"{name}: {found} of {expected} numbers")
        properties = TensorProperties(dtype=first.dtype)
        self._metadata.state_dict_metadata[name] = TensorStorageMetadata(
            properties, first.shape, chunks
        )

    @torch.no_grad()
    def copy_into(self, own: State) -> None:
        """Copies into this rank's tensors, in place.

        Raises:
            CheckpointError: other names, or another shape.
        """
        saved = self._metadata.state_dict_metadata
        names = sorted(own.keys() ^ saved.keys())
        if names:
            raise _of_another_model(self._where, f"{names[:3]} in one of the two alone")
        for name, tensor in own.items():
            size = saved[name].size  # type: ignore[union-attr]  # tensors are all that it has
            if tensor.shape != size:
                raise _of_another_model(
                    self._where, f"{name}: {tuple(size)}, here {tuple(tensor.shape)}"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(own), storage_reader=self, no_dist=True)

    # ---- torch's protocol

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            key = MetadataIndex(item.storage_index.fqn, item.storage_index.offset)
            saved = narrow_tensor_by_index(self._local[key], item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(saved)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _chunk(tensor: Tensor) -> tuple[ChunkStorageMetadata, Tensor]:
    """Where a saved rank's part stands in the whole, and the part.

    A shard's mesh came with it, and knows the rank that saved it.
    """
    if isinstance(tensor, DTensor):
        [chunk] = tensor.__create_chunk_list__()
        return chunk, tensor.to_local()
    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape), tensor


def _kind(tensor: Tensor) -> str:
    return f"{'shards of ' * isinstance(tensor, DTensor)}{tuple(tensor.shape)}"


def _load_optimizer(optimizer: Optimizer, saved: list[dict], where: Path) -> None:
    """Loads states by the parameters' order, which is the model's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = saved[0]["param_groups"]
    if any(part["param_groups"] != groups for part in saved):
        raise _mixed(where, "param_groups that differ, such as a learning rate")
    if sum(len(group["params"]) for group in groups) != len(parameters):
        numbers = [len(group["params"]) for group in groups]
        raise _of_another_model(where, f"{numbers} parameters, here {len(parameters)}")
    shards = SavedShards([_flat(part["state"]) for part in saved], where)
    states = {
        number: {key: _room(value, parameters[number]) for key, value in values.items()}
        for number, values in saved[0]["state"].items()
    }
    shards.copy_into(_flat(states))
    _check_counts(saved, where)
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _room(value: Any, parameter: Tensor) -> Any:
    """What a saved value is copied into; if it was sharded, laid out as its parameter is now."""
    if isinstance(value, DTensor):
        return torch.empty_like(parameter.detach(), dtype=value.dtype)
    return value.clone() if isinstance(value, Tensor) else value


def _flat(states: dict[int, dict[str, Any]]) -> State:
    return {
        f"{number}.{key}": value
        for number, values in states.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _check_counts(saved: list[dict], where: Path) -> None:
    """Raises `CheckpointError` where ranks have taken different numbers of steps."""
    for rank, part in enumerate(saved):
        for number, values in part["state"].items():
            step, first = values.get("step"), saved[0]["state"][number].get("step")
            if step != first:
                raise _mixed(where, f"step {first} on rank 0, {step} on rank {rank}")


def _load_extra(manager: FSDPCheckpointManager, saved: list[dict], where: Path) -> None:
    schedule = saved[0]["lr_scheduler"]
    if any(part["lr_scheduler"] != schedule for part in saved):
        raise _mixed(where, "learning-rate schedules at different steps")
    if schedule is not None and manager.lr_scheduler is not None:
        manager.lr_scheduler.load_state_dict(schedule)
    if manager.rank < len(saved):
        manager.load_rng_state(saved[manager.rank]["rng"])


def _mixed(where: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "files of different checkpoints",
        where=f"{where}_world_size_*",
        got=got,
        expected="the files that all ranks wrote in one save",
        fix="Copy the checkpoint again, or resume from another one.",
    )


def _of_another_model(where: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is of another model",
        where=f"{where}_world_size_*",
        got=got,
        expected="the tensors of this model and its optimizer",
        fix="Resume with the settings of the run that saved it (model, treatment, LoRA).",
    )
