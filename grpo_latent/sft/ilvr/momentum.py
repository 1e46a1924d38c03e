"""The momentum teacher of ILVR: a moving average of the student (2512.05665 section 3).

    after each optimizer step:   teacher ← decay · teacher + (1 - decay) · student

The published code has the update in a hook that its trainer never calls, so that its teacher stays
the initial model. Here a callback makes it after every optimizer step, counts it, and refuses to
train on where a resumed run lost some.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.common.files import write_tensors
from grpo_latent.errors import CheckpointError, ConfigError

# below a checkpoint: beside its weights they would be taken for weights of the model
TEACHER_FOLDER = "teacher"
_FILE = "ema.safetensors"
_NUM_UPDATES = "num_updates"  # key of its metadata

Model = TypeVar("Model", bound=nn.Module)


class MomentumTeacher(Generic[Model]):
    """A frozen copy of the student whose trained parameters follow it.

    What the student does not train is shared, not copied: parameters, and a frozen vision tower as
    a whole, so that its features are kept once for both.

    Args:
        student: before it is wrapped for training, with its frozen parameters already frozen.
        decay: 0.999 published.
    """

    def __init__(self, student: Model, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ConfigError(
                "not a decay", where="teacher.decay", got=decay, expected="in [0, 1)"
            )
        self.student = student
        self.decay = decay
        # a tensor, which a sharded checkpoint keeps with the others
        self._num_updates = torch.zeros((), dtype=torch.long)
        trained = {
            name: parameter
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
        if not trained:
            raise ConfigError(
                "a teacher of a model that does not train",
                where="teacher",
                expected="a parameter to train",
            )
        shared: list[nn.Parameter | nn.Module] = [
            parameter for parameter in student.parameters() if not parameter.requires_grad
        ]
        # the average itself is of any module
        for module in (
            backbone_of(student).vision_modules if isinstance(student, PreTrainedModel) else ()
        ):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                shared.append(module)
        # what the memo of deepcopy names already is taken as it is
        self.model: Model = copy.deepcopy(student, {id(kept): kept for kept in shared}).eval()
        self._trained = set(trained)
        for parameter in self._followed.values():
            parameter.requires_grad_(False)
        # half precision would round the small updates away: beside such weights a float32 average
        self._wide = {
            name: parameter.data.float()
            for name, parameter in self._followed.items()
            if parameter.dtype not in (torch.float32, torch.float64)
        }

    @property
    def num_updates(self) -> int:
        """How often the average has followed the student."""
        return int(self._num_updates)

    @property
    def _followed(self) -> dict[str, nn.Parameter]:
        """Looked up anew at each use: sharding a model replaces its parameters."""
        own = self.model.named_parameters()
        return {name: parameter for name, parameter in own if name in self._trained}

    @property
    def _averages(self) -> dict[str, Tensor]:
        """Looked up anew, too: moving a module replaces the tensors of its parameters."""
        return {
            name: self._wide.get(name, parameter.detach())
            for name, parameter in self._followed.items()
        }

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self._wide = {name: average.to(device) for name, average in self._wide.items()}

    def shard(self, shard_copy: Callable[[Model, set[nn.Parameter]], None]) -> None:
        """Shards the teacher as its student is sharded, before or after.

        Args:
            shard_copy: shards a model in place, less the parameters that are given: they are the
                student's as well.
        """
        followed = {id(parameter) for parameter in self._followed.values()}
        shared = {kept for kept in self.model.parameters() if id(kept) not in followed}
        shard_copy(self.model, shared)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a sharded checkpoint holds of the teacher; filling them restores it."""
        return {**self._averages, _NUM_UPDATES: self._num_updates}

    @torch.no_grad()
    def update(self) -> None:
        student = dict(self.student.named_parameters())
        for name, average in self._averages.items():
            # each rank moves its own parts
            followed = _local(student[name].detach())
            _local(average).lerp_(followed.to(average.dtype), 1 - self.decay)
        self._publish()
        self._num_updates += 1

    def _publish(self) -> None:
        followed = self._followed
        for name, average in self._wide.items():
            followed[name].data.copy_(average)

    def save(self, checkpoint: str | Path) -> None:
        """Writes the average below a checkpoint folder."""
        folder = Path(checkpoint) / TEACHER_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: average.detach().cpu().contiguous().clone()
            for name, average in self._averages.items()
        }
        write_tensors(folder / _FILE, tensors, {_NUM_UPDATES: str(self.num_updates)})

    @torch.no_grad()
    def load(self, checkpoint: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: no teacher in the checkpoint, or one of another model.
        """
        path = Path(checkpoint) / TEACHER_FOLDER / _FILE
        if not path.is_file():
            raise CheckpointError(
                "no momentum teacher in the checkpoint",
                where=str(checkpoint),
                expected=f"{TEACHER_FOLDER}/{_FILE}",
                fix="Resume from a checkpoint of this training, or start anew.",
            )
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            self._num_updates.fill_(int(file.metadata()[_NUM_UPDATES]))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        own_shapes = {name: tuple(average.shape) for name, average in self._averages.items()}
        if shapes != own_shapes:
            differing = sorted(
                name for name in {*shapes, *own_shapes} if shapes.get(name) != own_shapes.get(name)
            )
            raise CheckpointError(
                "the teacher is that of another model",
                where=str(path),
                got=differing[:5],
                expected="the parameters that this run trains",
            )
        for name, average in self._averages.items():
            average.copy_(tensors[name])
        self._publish()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MomentumCallback(TrainerCallback):
    """Updates the teacher after each optimizer step."""

    def __init__(self, teacher: MomentumTeacher):
        self.teacher = teacher

    def on_train_begin(self, args, state, control, **kwargs):
        if self.teacher.num_updates != state.global_step:
            raise CheckpointError(
                "the momentum teacher does not belong to this step",
                where=f"step {state.global_step}",
                got=f"{self.teacher.num_updates} updates",
                expected=f"{state.global_step}",
                fix="Resume with a trainer that restores the teacher (`KeepsTeacher`).",
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.teacher.update()


class KeepsTeacher(Trainer):
    """Mixin of a Hugging Face Trainer: `self.teacher` goes into each checkpoint and comes back."""

    teacher: MomentumTeacher

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        assert folder is not None, "a Trainer that saves has an output_dir"
        self.teacher.save(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # else it comes with the shards
            self.teacher.load(resume_from_checkpoint)
