"""ILVR's two stages on the trainer of LVR's SFT: another batch, another forward, and in stage 1 the momentum teacher.

    stage 1   batch ──teacher, one forward──▶ targets ──▶ CE + weight · (1 - cos)      then teacher ← EMA
    stage 2   batch ──own latents, gradient through them──▶ CE

Single process or DistributedDataParallel; a teacher of FSDP shards is not supported and refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import TrainingArguments

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.recompute import GRADIENTS
from grpo_latent.sft.dataset import IGNORED, SFTDataset
from grpo_latent.sft.ilvr_forward import stage1_sums, stage2_sums
from grpo_latent.sft.ilvr_teacher import teacher_targets
from grpo_latent.sft.interleaved import InterleavedRow, collate_interleaved, with_targets
from grpo_latent.sft.losses import LossConfig
from grpo_latent.sft.momentum import KeepsTeacher, MomentumCallback, MomentumTeacher
from grpo_latent.sft.trainer import LatentSFTTrainer


class ILVRTrainer(LatentSFTTrainer):
    """What both stages share. `dataset` is an `SFTDataset` with an `InterleavedEncoder`."""

    def check(self, latent: LatentModel, loss_config: LossConfig) -> None:
        # every span ends with a labelled end token, so that the cross-entropy trains the exit `end_token`
        if latent.config.trigger != "emitted" or latent.config.exit == "latent_end":
            raise ConfigError(
                "ILVR's spans are opened and closed by tokens",
                where="latent.trigger, latent.exit",
                got=f"{latent.config.trigger}, {latent.config.exit}",
                expected="emitted, and end_token or steps",
            )

    def collate_rows(self, rows: Sequence[InterleavedRow]) -> dict[str, Tensor]:
        return collate_interleaved(rows)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        num_targets = batch["targets"].shape[0] if "targets" in batch else 0
        return torch.tensor([int((batch["labels"] != IGNORED).sum()), num_targets])


class ILVRStage1Trainer(KeepsTeacher, ILVRTrainer):
    """Selective distillation from the momentum teacher.

    Args:
        decay: of the teacher.
        top_k, top_p: of the selection; `top_k` is also bounded by the positions of a span.
        noise_std: of the targets' noise.
        latent_weight: of the cosine term.
    """

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        decay: float = 0.999,
        top_k: int = 8,
        top_p: float = 0.9,
        noise_std: float = 0.01,
        latent_weight: float = 1.0,
        callbacks: Sequence = (),
        **kwargs,
    ):
        if args.fsdp or args.deepspeed:
            raise ConfigError(
                "a momentum teacher of sharded weights",
                where="trainer.fsdp, trainer.deepspeed",
                got=args.fsdp or args.deepspeed,
                expected="one process, or DistributedDataParallel",
            )
        self.top_k, self.top_p, self.noise_std = top_k, top_p, noise_std
        self.teacher = MomentumTeacher(latent.model, decay)
        loss_config = LossConfig(latent_loss="cosine", latent_weight=latent_weight)
        callbacks = [MomentumCallback(self.teacher), *callbacks]
        super().__init__(latent, args, dataset, loss_config, callbacks=callbacks, **kwargs)
        self.teacher.model.to(self.adapter.device)
        self.teacher_adapter = ModelAdapter(self.teacher.model)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As the base's, with the teacher's targets: their number is part of the loss's denominator."""
        return super().get_batch_samples(map(self._with_targets, epoch_iterator), num_batches, device)

    def _with_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        targets = teacher_targets(self.teacher_adapter, batch, self.latent.config.visibility, self.top_k, self.top_p)
        return with_targets(batch, targets)

    def _sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        return stage1_sums(self.adapter, batch, self.latent.config, self.noise_std)


class ILVRStage2Trainer(ILVRTrainer):
    """Latents fed by the model itself.

    Args:
        gradient: through them, `bptt` (published), `one_hop` or `cut`.
    """

    def __init__(
        self, latent: LatentModel, args: TrainingArguments, dataset: SFTDataset, gradient: str = "bptt", **kwargs
    ):
        if gradient not in GRADIENTS:
            raise ConfigError("unknown value", where="loss.gradient", got=gradient, expected=f"one of {GRADIENTS}")
        self.gradient = gradient
        super().__init__(latent, args, dataset, LossConfig(latent_weight=0.0), **kwargs)

    def _sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        sums = stage2_sums(self.adapter, batch, self.latent.config, self.gradient)
        return sums | {"latent": torch.zeros((), device=sums["ce"].device)}
