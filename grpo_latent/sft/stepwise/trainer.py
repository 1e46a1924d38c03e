"""SFT with prompt slots (IVT-LR, Coconut): CE over what rows still write out at a stage.

rows ──stage of this optimizer step──▶ batch ──slots as in a rollout──▶ CE
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import SlotMechanism
from grpo_latent.models.loading import LatentModel
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.families import check_family
from grpo_latent.sft.common.parameters import has_lora
from grpo_latent.sft.common.saving import save_for_rl
from grpo_latent.sft.common.sharding import gathered_weights
from grpo_latent.sft.common.trainer import LatentSFTTrainer
from grpo_latent.sft.stepwise.curriculum import Curriculum, CurriculumConfig
from grpo_latent.sft.stepwise.forward import loss_sums
from grpo_latent.sft.stepwise.rows import StepwiseEncoder, StepwiseRow, collate_rows


class StepwiseTrainer(LatentSFTTrainer):
    """Trains IVT-LR and Coconut on rows of a `StepwiseEncoder`."""

    loss_config: CurriculumConfig

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: CurriculumConfig | None = None,
        callbacks: Sequence = (),
        **kwargs: Any,
    ):
        config = loss_config or CurriculumConfig()
        if config.save_stages and has_lora(latent.model):
            raise ConfigError(
                "stages are saved of whole models",
                where="loss.save_stages",
                got="LoRA",
                expected="false, or no adapters",
            )
        self.stages = config.stages(latent.mechanism.steps)
        self.curriculum = Curriculum(
            config, len(self.stages) - 1, self._save_stage if config.save_stages else None
        )
        callbacks = [self.curriculum, *callbacks]
        super().__init__(latent, args, dataset, config, callbacks=callbacks, **kwargs)
        encoder = dataset.encoder
        assert isinstance(encoder, StepwiseEncoder), "rows of a `StepwiseEncoder`"
        if encoder.curriculum.stages(latent.mechanism.steps) != self.stages:
            raise ConfigError(
                "rows are tokenised for the stages of another curriculum",
                where="loss",
                got=encoder.curriculum,
                expected=str(config),
            )

    def check(self, latent: LatentModel) -> None:
        what = "the curriculum fills slots of the prompt"
        check_family(latent.mechanism, SlotMechanism, what)

    @property
    def stage(self) -> int:
        """Of the optimizer step that comes next."""
        return self.curriculum.stage_of(self.state.global_step)

    def collate_rows(self, rows: Sequence[StepwiseRow]) -> list[StepwiseRow]:
        # loader workers read ahead and cannot know the stage
        return list(rows)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Puts the rows of the step together at its stage, for the base's to count."""
        batches = (collate_rows(rows, self.stage) for rows in epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([int(batch["response_valid"].sum()), 0])

    def loss_sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        num_slots = self.stages[self.stage].num_slots
        return loss_sums(self.adapter, batch, num_slots, self.loss_config.gradient == "cut")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # the Trainer counts a step before it logs it
            logs["stage"] = self.curriculum.stage_of(self.state.global_step - 1)
        super().log(logs, start_time)

    def _save_stage(self, stage: int) -> None:
        """Writes a folder that RL and evaluation start from, with the slots of the stage."""
        weights = None
        if self.is_fsdp_enabled:  # every process takes part
            weights = gathered_weights(self.latent.model, self.args.should_save)
        if not self.args.should_save:
            return
        assert self.args.output_dir is not None, "a Trainer that saves has an output_dir"
        folder = Path(self.args.output_dir) / f"stage_{stage}"
        mechanism = self.latent.mechanism.replace(steps=self.stages[stage].num_slots)
        # whole or not at all: a resumed run does not come by here again
        save_for_rl(folder, self.latent, weights, mechanism)
