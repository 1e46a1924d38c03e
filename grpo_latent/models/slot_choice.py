"""Which image positions stand before a slot: those of most attention, drawn or recorded ones.

Chosen positions are left out from then on, so that a prompt's slots look at ever more of its image
(IVT-LR 2510.12603 section 3).

Legend: B rows, P prompt columns, K chosen before a slot, M image embeddings of all prompts (in
draws, of one), H hidden, F recorded positions of a row, S slots, N rows of `SlotDraws`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_latent.algo.selection import (
    NOT_CHOSEN,
    sample_candidates,
    selection_log_probs,
    top_k_candidates,
)
from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import RecordedAttention
from grpo_latent.models.slot_choice_scores import log_weights


@dataclass(frozen=True)
class SlotDraws:
    """Plackett–Luce selection: image positions are drawn without replacement.

    In proportion to attention^(1 / temperature).

    Attributes:
        row_to_prompt_N: int64, the prompt of each row: slots then differ within a group, and run
            once a row.
        uniforms_NSM: float64 in [0, 1), for each row, slot and image position; None takes the
            best, as `top_k` does.
    """

    row_to_prompt_N: Tensor
    temperature: float
    uniforms_NSM: Tensor | None


class Choice(NamedTuple):
    """What stands before one slot of each row; columns that a row does not use are in front.

    Attributes:
        embeddings_BKH: float, image embeddings; any at all where nothing is chosen.
        own_idx_BK: int64, which of the row's image positions each is, counted from 0.
        is_chosen_BK: bool, False where the row has fewer positions left.
        log_probs_BK: float32, nats, of the draws; 0 without draws.
    """

    embeddings_BKH: Tensor
    own_idx_BK: Tensor
    is_chosen_BK: Tensor
    log_probs_BK: Tensor


@dataclass
class _ImageColumns(RowTensors):
    """What is known of the prompt's columns of each row.

    Attributes:
        attention_BP: the last position's.
        candidates_BP: image positions that may still be chosen.
        own_idx_BP: which of its own image positions stands at a column.
        embedding_idx_BP: which of all prompts' image embeddings does.
    """

    attention_BP: Tensor
    candidates_BP: Tensor
    own_idx_BP: Tensor
    embedding_idx_BP: Tensor


class SlotChooser:
    """Chooses before one slot after the other.

    Args:
        recorder: holds the attention of the forward over the prompts.
        embeddings_MH: image embeddings of all prompts in order.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        recorder: RecordedAttention,
        embeddings_MH: Tensor,
        input_ids_BP: Tensor,
        valid_BP: Tensor,
    ):
        self.num_layers = adapter.text_config.num_hidden_layers
        self.is_by_index = adapter.mechanism.selection_order == "index"
        self.recorder = recorder
        self.embeddings_MH = embeddings_MH
        self.prompt_length = input_ids_BP.shape[1]
        is_image_BP = adapter.backbone.is_image_token(input_ids_BP) & valid_BP
        self.columns = _ImageColumns(
            attention_BP=self._take_attention(),
            candidates_BP=is_image_BP,
            own_idx_BP=is_image_BP.cumsum(-1) - 1,
            embedding_idx_BP=(is_image_BP.flatten().cumsum(0) - 1).view_as(is_image_BP),
        )
        self._draws: SlotDraws | None = None
        self._num_drawn_N: Tensor | None = None
        self._recorded_BF: Tensor | None = None
        self._num_taken_B: Tensor | None = None

    def draw(self, draws: SlotDraws) -> None:
        """Goes on with the rows of `draws`, each of which draws its own image positions."""
        rows_N = draws.row_to_prompt_N
        self.columns = self.columns.keep(rows_N)
        self._draws = draws
        self._num_drawn_N = torch.zeros_like(rows_N)

    def take_recorded(
        self, selected_idx: Sequence[Tensor | None], num_slots_B: Tensor, top_k: int
    ) -> None:
        """Lets rows take the given image positions in turn; those with None go on choosing.

        Raises:
            LatentMismatchError: positions that the row's slots cannot take.
        """
        num_images_B = self.columns.candidates_BP.sum(-1)
        wanted = torch.minimum(num_slots_B * top_k, num_images_B).tolist()
        recorded_BF = torch.full(
            (len(selected_idx), max(*wanted, 1)), NOT_CHOSEN, device=num_images_B.device
        )
        for row, idx in enumerate(selected_idx):
            if idx is None:
                continue
            if (
                len(idx) != wanted[row]
                or len(idx.unique()) != len(idx)
                or not bool((idx < num_images_B[row]).all())
            ):
                raise LatentMismatchError(
                    "recorded image positions do not fit the slots",
                    where=f"prompt {row}",
                    got=idx.tolist(),
                    expected=f"{wanted[row]} different ones below {int(num_images_B[row])}",
                )
            columns = self.columns.candidates_BP[row].nonzero()[:, 0]
            recorded_BF[row, : len(idx)] = columns[idx.to(columns.device)]
        self._recorded_BF = recorded_BF
        self._num_taken_B = torch.zeros_like(num_images_B)

    def choose(self, active_B: Tensor, top_k: int) -> Choice:
        """At most `top_k` positions for each active row."""
        chosen_BK, log_probs_BK = self._choose(active_B, top_k)
        place_BK = chosen_BK.clamp(min=0)
        embedding_idx_BK = self.columns.embedding_idx_BP.gather(1, place_BK).clamp(min=0)
        return Choice(
            self.embeddings_MH[embedding_idx_BK],
            self.columns.own_idx_BP.gather(1, place_BK),
            chosen_BK != NOT_CHOSEN,
            log_probs_BK,
        )

    def look_again(self, active_B: Tensor) -> None:
        """Takes the attention of the forward over a slot, in the rows that have it."""
        self.columns.attention_BP = torch.where(
            active_B[:, None], self._take_attention(), self.columns.attention_BP
        )

    def _take_attention(self) -> Tensor:
        return self.recorder.take(self.num_layers)[:, : self.prompt_length]

    def _choose(self, active_B: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Columns of the prompt [B, K] in their order, and the log-probs of draws [B, K].

        `NOT_CHOSEN`, where a row has fewer left, stands in front.
        """
        candidates_BP = self.columns.candidates_BP & active_B[:, None]
        chosen_BK = self._ranked(candidates_BP, active_B, top_k)
        is_missing_BK = chosen_BK == NOT_CHOSEN
        chosen_BK = chosen_BK.gather(
            1, is_missing_BK.long().sort(dim=-1, descending=True, stable=True).indices
        )
        chosen_BK = self._recorded_or(chosen_BK)
        taken_BP = torch.zeros_like(self.columns.candidates_BP, dtype=torch.long)
        # added up, not set: columns that nothing was chosen for all point at 0, and add nothing
        taken_BP.scatter_add_(1, chosen_BK.clamp(min=0), (chosen_BK != NOT_CHOSEN).long())
        self.columns.candidates_BP = self.columns.candidates_BP & (taken_BP == 0)
        if self._draws is None:
            return chosen_BK, torch.zeros(chosen_BK.shape, device=chosen_BK.device)
        weights_BP = log_weights(self.columns.attention_BP, self._draws.temperature)
        return chosen_BK, selection_log_probs(weights_BP, candidates_BP, chosen_BK)

    def _ranked(self, candidates_BP: Tensor, active_B: Tensor, top_k: int) -> Tensor:
        if self._draws is None or self._draws.uniforms_NSM is None:
            best_BK = top_k_candidates(self.columns.attention_BP, candidates_BP, top_k)
            return best_BK.sort(dim=-1).values if self.is_by_index else best_BK
        assert self._num_drawn_N is not None, "`draw` sets both"
        # a number a slot and image position: the same ones whatever the row is padded to
        uniforms_NSM = self._draws.uniforms_NSM
        slot_N = self._num_drawn_N.clamp(max=uniforms_NSM.shape[1] - 1)
        uniforms_NM = uniforms_NSM[torch.arange(len(slot_N), device=slot_N.device), slot_N]
        uniforms_BP = uniforms_NM.gather(
            1, self.columns.own_idx_BP.clamp(0, uniforms_NM.shape[1] - 1)
        )
        self._num_drawn_N = self._num_drawn_N + active_B
        weights_BP = log_weights(self.columns.attention_BP, self._draws.temperature)
        return sample_candidates(weights_BP, candidates_BP, top_k, uniforms_BP)

    def _recorded_or(self, chosen_BK: Tensor) -> Tensor:
        """As many recorded columns as were chosen, in the rows that have them."""
        if self._recorded_BF is None or self._num_taken_B is None:
            return chosen_BK
        is_chosen_BK = chosen_BK != NOT_CHOSEN
        place_BK = self._num_taken_B[:, None] + is_chosen_BK.long().cumsum(-1) - 1
        recorded_BK = self._recorded_BF.gather(
            1, place_BK.clamp(0, self._recorded_BF.shape[1] - 1)
        )
        self._num_taken_B += is_chosen_BK.sum(-1)
        return torch.where(is_chosen_BK & (recorded_BK != NOT_CHOSEN), recorded_BK, chosen_BK)
