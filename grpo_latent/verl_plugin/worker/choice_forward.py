"""The engine's part of chosen image positions: replayed by index and, if drawn, scored.

feed      SELECTED positions armed to read what stands at the chosen image positions
prepare   where each slot's attention is read, recording armed
verl's forward: beside its output, softmax(q · Kᵀ) of those rows
extend    log_probs[t] at SELECTED positions = the choice's log-prob, with gradient to attention
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from grpo_latent.models.attention_rows import RecordedAttention, recording_rows
from grpo_latent.models.injection import SelectionInjector
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.slot_choice_scores import (
    SlotChoices,
    choice_log_probs,
    chosen_columns,
    slot_choices,
)
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.boot.compat import offsets_of
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch


class ChoiceForward:
    """Does nothing where no position is SELECTED, and scores nothing with deterministic selection.

    Args:
        module: before any FSDP wrapping.
        top_k_image: as `Mechanism.top_k_image`; 0 where nothing is chosen.
        temperature: of the draws, None for deterministic selection.
    """

    def __init__(self, module: PreTrainedModel, top_k_image: int, temperature: float | None):
        self.temperature = temperature
        self.text_config = module.config.get_text_config()
        self.image_token_id = getattr(module.config, "image_token_id", None)
        self.selection = SelectionInjector.install(module) if top_k_image else None
        self._recording = ExitStack()
        self._choices: SlotChoices | None = None
        self._recorder: RecordedAttention | None = None

    def feed(self, batch: MicroBatch, first_of_rows: Tensor | None = None) -> None:
        """Before all forwards of the micro-batch: arms replay by index.

        Args:
            first_of_rows: int64 [B], the row that has each one's images; None: each its own.
        """
        if self.selection is None:
            return
        kinds_BT = pad_sequence(batch.kinds_rows, batch_first=True)
        if not bool((kinds_BT == PositionKind.SELECTED).any()):  # no row has an image
            return
        is_image_BT = batch.is_token_BT(self.image_token_id, kinds_BT.shape[1])
        valid_BT = torch.ones_like(kinds_BT, dtype=torch.bool)
        rows_M, columns_M, images_M = chosen_columns(
            kinds_BT, valid_BT, is_image_BT, batch.selected_idx_S
        )
        if batch.is_packed:  # one row, the sequences one after the other
            starts_M = offsets_of(batch.ids)[rows_M]
            rows_M = torch.zeros_like(rows_M)
            columns_M = columns_M + starts_M
            images_M = images_M + starts_M
        image_rows_M = rows_M
        if first_of_rows is not None:
            image_rows_M = first_of_rows.to(rows_M.device)[rows_M]
        self.selection.arm(rows_M, columns_M, image_rows_M, images_M)

    def prepare(self, sequences: LatentSequences, batch: MicroBatch) -> None:
        """Before the forward that scores, whose layout is padded."""
        kinds_BT, valid_BT = sequences.kinds_BT, sequences.valid_BT
        if self.temperature is None or not bool((kinds_BT == PositionKind.SELECTED).any()):
            return
        is_image_BT = batch.is_token_BT(self.image_token_id, kinds_BT.shape[1])
        self._choices = slot_choices(kinds_BT, valid_BT, is_image_BT, batch.selected_idx_S)
        recording = recording_rows(
            self.text_config, self._choices.sources_BN, self._choices.allowed_BNT(valid_BT)
        )
        self._recorder = self._recording.enter_context(recording)

    def extend(self, model_output: dict, batch: MicroBatch) -> None:
        """Writes the log-probs of drawn choices over those of placeholder ids."""
        if self._recorder is None:
            return
        assert self._choices is not None and self.temperature is not None, (
            "armed with the recorder"
        )
        attention_BNT = self._recorder.take(self.text_config.num_hidden_layers)
        values_M = choice_log_probs(self._choices, attention_BNT, self.temperature)
        log_probs = model_output["log_probs"]
        model_output["log_probs"] = batch.with_scores(log_probs, PositionKind.SELECTED, values_M)

    def disarm(self) -> None:
        self._recording.close()
        if self.selection is not None:
            self.selection.disarm()
        self._choices = self._recorder = None
