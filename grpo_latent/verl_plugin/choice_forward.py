"""The engine's part of random selection: the log-probs of recorded choices of image positions, under the model that runs.

prepare   where each slot's attention is read, recording armed
verl's forward: beside its output, softmax(q · Kᵀ) of those rows
extend    log_probs[t] at SELECTED positions = the choice's log-prob, with gradient to the attention
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.choices import SlotChoices, choice_log_probs, slot_choices
from grpo_latent.models.selection import RecordedAttention, recording_rows
from grpo_latent.trajectory import NOT_SELECTED, PositionKind
from grpo_latent.verl_plugin.treated_forward import write_scores


class ChoiceForward:
    """Does nothing with deterministic selection.

    Args:
        module: before any FSDP wrapping.
        temperature: of the draws, None for deterministic selection.
    """

    def __init__(self, module: nn.Module, temperature: float | None):
        self.temperature, self.text_config = temperature, module.config.get_text_config()
        self.image_token_id = getattr(module.config, "image_token_id", None)
        self._recording = ExitStack()
        self._choices: SlotChoices | None = None
        self._recorder: RecordedAttention | None = None

    def prepare(self, model_inputs: dict, kinds_BT: Tensor, micro_batch: TensorDict) -> None:
        """Before the forward, whose layout is padded."""
        if self.temperature is None or not bool((kinds_BT == PositionKind.SELECTED).any()):
            return
        if "selected_idx" not in micro_batch.keys():
            raise LatentMismatchError(
                "batch without the chosen image positions",
                where="latent engine",
                got=sorted(micro_batch.keys()),
                expected="selected_idx, as agent loop latent_agent writes it",
            )
        selected_L = torch.cat(micro_batch["selected_idx"].unbind())
        valid_BT = model_inputs["attention_mask"].bool()
        is_image_BT = (model_inputs["input_ids"] == self.image_token_id) & (kinds_BT == PositionKind.VISION)
        self._choices = slot_choices(kinds_BT, valid_BT, is_image_BT, selected_L[selected_L != NOT_SELECTED])
        recording = recording_rows(self.text_config, self._choices.sources_BN, self._choices.allowed_BNT(valid_BT))
        self._recorder = self._recording.enter_context(recording)

    def extend(self, model_output: dict, micro_batch: TensorDict) -> None:
        if self._recorder is None:
            return
        attention_BNT = self._recorder.take(self.text_config.num_hidden_layers)
        values_M = choice_log_probs(self._choices, attention_BNT, self.temperature)
        write_scores(model_output, micro_batch, PositionKind.SELECTED, values_M)

    def disarm(self) -> None:
        self._recording.close()
        self._choices = self._recorder = None
