"""Recorded choices of image positions, scored under the model's current attention (Plackett–Luce).

    kinds ──slot_choices──▶ where a slot's attention is read, what it could choose, what it chose
    one forward with `recording_rows` at those places
          ──choice_log_probs──▶ log-prob at each SELECTED position, with gradient

The log-weights are log(mean attention) / temperature, as in the rollout
(`models.slots.SlotDraws`).

Legend: B sequences, T positions, N slots with a choice (the most of any sequence), K places of a
choice, S SELECTED positions of all sequences, M image positions (of `selected_idx_M`: S).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.algo.selection import NOT_CHOSEN, selection_log_probs
from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.shift import last_sources
from grpo_latent.trajectory import PositionKind


@dataclass(frozen=True)
class SlotChoices:
    """The choices of a batch.

    Attributes:
        sources_BN: int64, the position whose attention chose; 0 where a sequence has fewer.
        chosen_BNK: int64, image positions counted from 0; `NOT_CHOSEN` where there is none.
        candidates_BNM: bool, image positions that each choice could take.
        image_columns_BM: int64, where they stand.
        places: (sequence, position, slot, place), each int64, one a SELECTED position in row-major
            order.
    """

    sources_BN: Tensor
    chosen_BNK: Tensor
    candidates_BNM: Tensor
    image_columns_BM: Tensor
    places: tuple[Tensor, Tensor, Tensor, Tensor]

    def allowed_BNT(self, valid_BT: Tensor) -> Tensor:
        """bool, what the sources may look at: what is valid and not after them, and themselves."""
        columns_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        before_BNT = columns_T <= self.sources_BN[..., None]
        return (before_BNT & valid_BT[:, None]) | (columns_T == self.sources_BN[..., None])


def chosen_columns(
    kinds_BT: Tensor, valid_BT: Tensor, is_image_BT: Tensor, selected_idx_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(sequence, position, position of the chosen image embedding), each int64 [M].

    Arguments as `slot_choices`.

    Raises:
        LatentMismatchError: the indices are not as many as the positions, or no image position of
            the sequence.
    """
    row_M, column_M = ((kinds_BT == PositionKind.SELECTED) & valid_BT).nonzero(as_tuple=True)
    num_images_B = is_image_BT.sum(-1)
    fits = selected_idx_M.shape == row_M.shape
    if not fits or bool(((selected_idx_M < 0) | (selected_idx_M >= num_images_B[row_M])).any()):
        raise LatentMismatchError(
            "chosen image positions do not fit the images",
            where="selected_idx",
            got=selected_idx_M.tolist(),
            expected=f"{row_M.shape[0]} indices below the numbers of image positions "
            f"{num_images_B.tolist()}",
        )
    first_B = num_images_B.cumsum(0) - num_images_B
    return row_M, column_M, is_image_BT.nonzero()[first_B[row_M] + selected_idx_M, 1]


def slot_choices(
    kinds_BT: Tensor, valid_BT: Tensor, is_image_BT: Tensor, selected_idx_M: Tensor
) -> SlotChoices:
    """Choices of sequences in which each run of SELECTED positions is one.

    Args:
        kinds_BT: int64.
        valid_BT: bool, False at padding, which may stand anywhere.
        is_image_BT: bool, image placeholders.
        selected_idx_M: int64, of the SELECTED positions in row-major order.

    Raises:
        LatentMismatchError: the indices are not as many as the positions, or no image position of
            the sequence.
    """
    is_selected_BT = (kinds_BT == PositionKind.SELECTED) & valid_BT
    starts_BT = is_selected_BT & ~torch.nn.functional.pad(is_selected_BT[:, :-1], (1, 0))
    row_S, column_S, _ = chosen_columns(kinds_BT, valid_BT, is_image_BT, selected_idx_M)
    num_images_B = is_image_BT.sum(-1)
    batch_size = kinds_BT.shape[0]
    device = kinds_BT.device
    slot_S = starts_BT.cumsum(-1)[row_S, column_S] - 1
    columns_T = torch.arange(kinds_BT.shape[1], device=device).expand_as(kinds_BT)
    start_S = columns_T.masked_fill(~starts_BT, 0).cummax(-1).values[row_S, column_S]
    place_S = column_S - start_S
    num_slots = int(starts_BT.sum(-1).max())
    num_places = int(place_S.max()) + 1 if place_S.numel() else 0
    num_images = int(num_images_B.max())

    sources_BN = torch.zeros(batch_size, num_slots, dtype=torch.long, device=device)
    sources_BN[row_S, slot_S] = last_sources(kinds_BT, valid_BT)[row_S, column_S]
    chosen_BNK = torch.full((batch_size, num_slots, num_places), NOT_CHOSEN, device=device)
    chosen_BNK[row_S, slot_S, place_S] = selected_idx_M
    # an image position may be chosen until the slot that takes it, that slot included
    slot_of_image_BM = torch.full((batch_size, num_images), num_slots, device=device)
    slot_of_image_BM[row_S, selected_idx_M] = slot_S
    exists_BM = torch.arange(num_images, device=device) < num_images_B[:, None]
    slots_N1 = torch.arange(num_slots, device=device)[:, None]
    candidates_BNM = exists_BM[:, None] & (slot_of_image_BM[:, None] >= slots_N1)
    image_columns_BM = torch.zeros(batch_size, num_images, dtype=torch.long, device=device)
    image_row, image_column = is_image_BT.nonzero(as_tuple=True)
    image_columns_BM[image_row, (is_image_BT.cumsum(-1) - 1)[image_row, image_column]] = (
        image_column
    )
    return SlotChoices(
        sources_BN,
        chosen_BNK,
        candidates_BNM,
        image_columns_BM,
        (row_S, column_S, slot_S, place_S),
    )


def choice_log_probs(choices: SlotChoices, attention_BNT: Tensor, temperature: float) -> Tensor:
    """Nats, float32, a number a SELECTED position, row-major, with gradient to the attention."""
    num_slots = choices.sources_BN.shape[1]
    columns_BNM = choices.image_columns_BM[:, None].expand(-1, num_slots, -1)
    log_weights_BNM = log_weights(attention_BNT.gather(2, columns_BNM), temperature)
    terms = selection_log_probs(
        log_weights_BNM.flatten(0, 1),
        choices.candidates_BNM.flatten(0, 1),
        choices.chosen_BNK.flatten(0, 1),
    )
    row_S, _, slot_S, place_S = choices.places
    return terms.view(choices.chosen_BNK.shape)[row_S, slot_S, place_S]


def log_weights(attention: Tensor, temperature: float) -> Tensor:
    """log(attention) / temperature; an attention of 0 counts as the smallest positive number."""
    return attention.clamp(min=torch.finfo(attention.dtype).tiny).log() / temperature
