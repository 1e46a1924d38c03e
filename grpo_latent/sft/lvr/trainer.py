"""LVR's stage 1 (2509.24251 section 3.1): CE, latents' distances, and the exit's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.models.loading import LatentModel
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.families import check_family
from grpo_latent.sft.common.images import visual_embeddings
from grpo_latent.sft.common.parameters import vision_is_frozen
from grpo_latent.sft.common.rows import IGNORED
from grpo_latent.sft.common.trainer import LatentSFTTrainer
from grpo_latent.sft.lvr.forward import loss_sums
from grpo_latent.sft.lvr.losses import LVRLossConfig, target_variance
from grpo_latent.sft.lvr.rows import LVRRow, collate_rows

VARIANCE_ROWS = 256  # rows whose targets estimate the variance of all


class LVRTrainer(LatentSFTTrainer):
    """Trains on rows of an `LVREncoder`; arguments are those of `LatentSFTTrainer`."""

    loss_config: LVRLossConfig
    summed = (*LatentSFTTrainer.summed, "end", "hits", "num_targets")

    def __init__(
        self,
        latent: LatentModel,
        args: TrainingArguments,
        dataset: SFTDataset,
        loss_config: LVRLossConfig,
        **kwargs: Any,
    ):
        super().__init__(latent, args, dataset, loss_config, **kwargs)
        self.target_variance = 1.0
        if loss_config.latent_loss_norm == "variance":
            self.target_variance = self._target_variance()

    def check(self, latent: LatentModel) -> None:
        check_exit(_spans(latent).exit, self.loss_config.end)

    def collate_rows(self, rows: Sequence[LVRRow]) -> dict[str, Tensor]:
        return collate_rows(rows)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([int((batch["labels"] != IGNORED).sum()), batch["roi"].shape[0]])

    def loss_sums(self, batch: dict[str, Tensor], count_hits: bool) -> dict[str, Tensor]:
        return loss_sums(
            self.adapter,
            batch,
            _spans(self.latent),
            self.loss_config,
            self.target_variance,
            count_hits=count_hits,
        )

    def term_weights(self) -> dict[str, float]:
        weights = {"latent": self.loss_config.latent_weight}
        if self.loss_config.end == "mode_switch":
            weights["end"] = self.loss_config.end_weight
        return weights

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        metrics = super().metrics(totals)
        if self.loss_config.end == "mode_switch":
            metrics["end_loss"] = totals["end"] / max(totals["latents"], 1)
        if totals["num_targets"]:
            metrics["latent_hit"] = totals["hits"] / totals["num_targets"]
        return metrics

    def _target_variance(self) -> float:
        if not vision_is_frozen(self.latent.model):
            raise ConfigError(
                "the variance of targets that move",
                where="loss.latent_loss_norm",
                got="variance with a vision tower or merger that trains",
                expected="frozen targets",
                fix="Freeze vision and merger, or set loss.latent_loss_norm=none.",
            )
        dataset = self.dataset
        targets = []
        num_rows = min(VARIANCE_ROWS, len(dataset))
        for index in np.linspace(0, len(dataset) - 1, num_rows).astype(int).tolist():
            row = dataset[index]
            if row.images is not None:
                with torch.no_grad():
                    visual_MH = visual_embeddings(self.adapter, row.images)
                targets.append(visual_MH[row.roi_N[row.roi_N >= 0].to(visual_MH.device)])
        return target_variance(
            torch.cat(targets) if targets else torch.zeros(0, self.adapter.hidden_size)
        )


def _spans(latent: LatentModel) -> SpanMechanism:
    return check_family(latent.mechanism, SpanMechanism, "LVR's spans are opened by a token")


def check_exit(exit_rule: str, end: str) -> None:
    """Raises `ConfigError` where SFT would not train what the exit rule reads."""
    needed = {"latent_end": "latent_end", "end_token": "mode_switch"}.get(exit_rule)
    if needed is not None and end != needed:
        raise ConfigError(
            "the exit rule reads what SFT would not train",
            where="latent.exit, loss.end",
            got=f"exit {exit_rule} with end {end}",
            expected=f"loss.end={needed}",
            fix=f"Set loss.end={needed}, or latent.exit=steps.",
        )
