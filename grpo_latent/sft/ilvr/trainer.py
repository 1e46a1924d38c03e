"""ILVR's two stages: interleaved rows, and in stage 1 the momentum teacher.

    stage 1   batch ──teacher, one forward──▶ targets ──▶ CE + weight · (1 - cos), teacher ← EMA
    stage 2   batch ──own latents, gradient through them──▶ CE

Under FSDP the teacher is sharded like the student, and ranks agree on the number of forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.recompute import GRADIENTS
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.families import check_family
from grpo_latent.sft.common.routing import SFT_KEYWORD, route_sft_batches
from grpo_latent.sft.common.rows import IGNORED
from grpo_latent.sft.common.sharding import most_of_ranks, shard_frozen_copy
from grpo_latent.sft.common.shards import named
from grpo_latent.sft.common.trainer import LatentSFTTrainer
from grpo_latent.sft.ilvr.forward import stage1_loss_sums, stage2_loss_sums
from grpo_latent.sft.ilvr.momentum import KeepsTeacher, MomentumCallback, MomentumTeacher
from grpo_latent.sft.ilvr.rows import ILVRRow, collate_rows, with_targets
from grpo_latent.sft.ilvr.teacher import teacher_targets


@dataclass(frozen=True)
class TeacherConfig:
    """What stage 1 minimises: CE + latent_weight · (1 - cos) (2512.05665 section 3).

    Attributes:
        decay: of the teacher.
        top_k, top_p: of the selection; `top_k` is also bounded by the positions of a span.
        noise_std: of the targets' noise.
        latent_weight: of the cosine to the teacher's choice.
    """

    decay: float = 0.999
    top_k: int = 8
    top_p: float = 0.9
    noise_std: float = 0.01
    latent_weight: float = 1.0
    trains_end_vector: ClassVar[bool] = False

    def __post_init__(self):
        bounds = (
            ("decay", 0 <= self.decay < 1, "in [0, 1)"),
            ("top_k", self.top_k >= 1, ">= 1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("noise_std", self.noise_std >= 0, ">= 0"),
            ("latent_weight", self.latent_weight >= 0, ">= 0"),
        )
        for name, is_valid, expected in bounds:
            if not is_valid:
                raise ConfigError(
                    "out of bounds",
                    where=f"loss.{name}",
                    got=getattr(self, name),
                    expected=expected,
                )


@dataclass(frozen=True)
class SelfFedConfig:
    """What stage 2 minimises: CE over the model's own latents.

    Attributes:
        gradient: through them, `bptt` (published), `one_hop` or `cut`.
    """

    gradient: str = "bptt"
    trains_end_vector: ClassVar[bool] = False

    def __post_init__(self):
        check_choice(self.gradient, GRADIENTS, "loss.gradient")


class ILVRTrainer(LatentSFTTrainer):
    """What both stages share. `dataset` is an `SFTDataset` with an `ILVREncoder`."""

    def check(self, latent: LatentModel) -> None:
        what = "ILVR's spans are opened and closed by tokens"
        mechanism = check_family(latent.mechanism, SpanMechanism, what)
        # every span ends with a labelled end token: the cross-entropy trains the exit by token,
        # and nothing trains an exit that looks at the latents
        if mechanism.reads_latents:
            raise ConfigError(
                what, where="latent.exit", got=mechanism.exit, expected="end_token or steps"
            )

    def collate_rows(self, rows: Sequence[ILVRRow]) -> dict[str, Tensor]:
        return collate_rows(rows)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        num_targets = batch["targets"].shape[0] if "targets" in batch else 0
        return torch.tensor([int((batch["labels"] != IGNORED).sum()), num_targets])


class ILVRStage1Trainer(KeepsTeacher, ILVRTrainer):
    """Distils the momentum teacher's selection."""

    loss_config: TeacherConfig
    teacher: MomentumTeacher[PreTrainedModel]

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: TeacherConfig | None = None,
        callbacks: Sequence = (),
        **kwargs: Any,
    ):
        loss_config = loss_config or TeacherConfig()
        # before anything wraps the model: the teacher is a copy of it
        self.teacher = MomentumTeacher(latent.model, loss_config.decay)
        callbacks = [MomentumCallback(self.teacher), *callbacks]
        super().__init__(latent, args, dataset, loss_config, callbacks=callbacks, **kwargs)
        self.teacher_adapter = ModelAdapter(self.teacher.model, latent.mechanism)
        # before it is sharded: within its forward alone its weights are whole
        self._undo_teacher = route_sft_batches(self.teacher.model, self._targets)
        if self.is_fsdp_enabled:
            self.teacher.shard(lambda model, whole: shard_frozen_copy(model, args, whole))
        else:  # where the Trainer has put the student by now
            self.teacher.to(self.adapter.device)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As the base's, with the teacher's targets, whose number the loss is divided by."""
        return super().get_batch_samples(
            map(self._with_targets, epoch_iterator), num_batches, device
        )

    def _with_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), self.accelerator.autocast():  # as the student's forward
            targets = self.teacher.model(**{SFT_KEYWORD: batch})
        return with_targets(batch, targets, self.teacher_adapter.hidden_size)

    def _targets(self, batch: dict[str, Tensor]) -> list[Tensor]:
        config = self.loss_config
        return teacher_targets(
            self.teacher_adapter,
            batch,
            self.latent.mechanism.visibility,
            config.top_k,
            config.top_p,
            reads_always=self.is_fsdp_enabled,
        )

    def shards(self) -> dict[str, Tensor]:
        return super().shards() | named("teacher", self.teacher.tensors)

    def release(self) -> None:
        super().release()
        self._undo_teacher()

    def loss_sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        return stage1_loss_sums(
            self.adapter, batch, self.latent.mechanism, self.loss_config.noise_std
        )

    def term_weights(self) -> dict[str, float]:
        return {"latent": self.loss_config.latent_weight}


class ILVRStage2Trainer(ILVRTrainer):
    """Trains on answers over latents that the model itself feeds; no target has a loss."""

    loss_config: SelfFedConfig

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: SelfFedConfig | None = None,
        **kwargs: Any,
    ):
        super().__init__(latent, args, dataset, loss_config or SelfFedConfig(), **kwargs)

    def loss_sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        return stage2_loss_sums(
            self.adapter,
            batch,
            self.latent.mechanism,
            self.loss_config.gradient,
            most_of_ranks if self.is_fsdp_enabled else None,
        )
