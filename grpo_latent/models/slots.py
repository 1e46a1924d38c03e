"""Latent steps at slots of the prompt, run right after it.

IVT-LR (2510.12603 section 3) and, without images, Coconut (2412.06769).

    [prompt]  ─▶  h, attention of the last position
        slot 1:   [K image embeddings, chosen by that attention][h]   ─▶  h, attention of the slot
        slot 2:   [K more, not chosen before][h]                      ─▶  …
        then text is decoded from the last slot's h

An inserted image embedding has the kind SELECTED, the slot the kind LATENT. Keys and values of all
that came before are reused: one forward of K + 1 positions a slot (the published code recomputes
the prefix for each). Rows may differ in slots and in the image positions left to choose: K counts
as "at most K", a row takes what is left, and a row without images only its h. Columns that a row
does not use are padding.

Legend: B prompts, P prompt columns, L slot columns, S = P + L, M image embeddings of all prompts,
H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from grpo_latent.algo.selection import NOT_CHOSEN
from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import recording_last_row
from grpo_latent.models.kv_cache import caching_layers
from grpo_latent.models.positions import count_on, next_positions, with_components
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.slot_choice import SlotChooser, SlotDraws
from grpo_latent.models.visibility import attention_bias
from grpo_latent.models.vision_cache import encoding_once
from grpo_latent.trajectory import PositionKind

FeedHook: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SlotRecord:
    """The slots of one row, as they stand at the beginning of its trajectories.

    These are all of a prompt's, or with `SlotDraws` one.

    Attributes:
        kinds: int64 [L], SELECTED and LATENT.
        latents: float [L, H], the vectors fed.
        selected_idx: int64, one per SELECTED position: which of the prompt's image positions,
            counted from 0.
        log_probs: float32 [L], nats, of the draws at SELECTED positions; 0 elsewhere, and without
            draws.
    """

    kinds: Tensor
    latents: Tensor
    selected_idx: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class SlotPrefill:
    """What text is decoded from.

    Attributes:
        hidden_BH: last hidden state of each prompt's last position, slots included.
        cache: keys and values of S columns.
        kinds_BS, valid_BS: int64 and bool; columns that a row does not use are not valid.
        next_position_B: int64, position id of the first text token.
        records: one a row. Rows are the prompts, or with `SlotDraws` the rows of those.
    """

    hidden_BH: Tensor
    cache: Cache
    kinds_BS: Tensor
    valid_BS: Tensor
    next_position_B: Tensor
    records: list[SlotRecord]


def prefill_with_slots(
    adapter: ModelAdapter,
    prompts: LatentSequences,
    num_slots_B: Tensor,
    top_k_image: int,
    cut: bool = True,
    feed: FeedHook | None = None,
    selected_idx: Sequence[Tensor | None] = (),
    draws: SlotDraws | None = None,
) -> SlotPrefill:
    """Forward over prompts, then over their slots.

    Args:
        prompts: padded on the left, as `prompt_sequences` makes them.
        num_slots_B: int64, slots of each prompt.
        top_k_image: image embeddings inserted before each slot (32 published); 0 is Coconut.
        cut: whether the fed h is a constant (IVT-LR) or carries its gradient (Coconut).
        feed: maps what a slot is about to be fed [B, L, H], its kinds and whether each position is
            used, both [B, L], to what it is fed (causal ablations).
        selected_idx: of each row, the image positions to take in turn instead of choosing, or
            None.
        draws: of a random selection; None takes the positions of most attention.

    Raises:
        ConfigError: image embeddings for a model without images.
        LatentMismatchError: `selected_idx` that the prompt's slots cannot take.
    """
    if top_k_image and not adapter.has_vision:
        raise ConfigError(
            "no image embeddings to insert",
            where="latent.top_k_image",
            got=f"{top_k_image} for {type(adapter.model).__name__}",
            expected="0 for a text-only model",
        )
    cache = DynamicCache(config=adapter.text_config)
    images = prompts.images if top_k_image > 0 else None
    bias = prompts.attention_bias(adapter.dtype)
    recording = nullcontext() if images is None else recording_last_row(adapter.text_config)
    with caching_layers(adapter.model), recording as recorder:
        with nullcontext() if images is None else encoding_once(adapter.backbone):
            embeddings_MH = None if images is None else adapter.encode_images(images)
            # padded on the left: the last column is each prompt's last position
            hidden_BH = adapter.forward_hidden(
                prompts.input_ids_BT, bias, prompts.position_ids, prompts.images, cache
            )[:, -1]
        chooser = None
        if recorder is not None and embeddings_MH is not None:
            chooser = SlotChooser(
                adapter, recorder, embeddings_MH, prompts.input_ids_BT, prompts.valid_BT
            )
        next_position_B = next_positions(prompts.position_ids)
        rows = _SlotRows(hidden_BH, next_position_B, prompts.kinds_BT, prompts.valid_BT)
        feeder = _SlotFeeder(adapter, cache, rows, chooser, feed)
        if draws is not None:
            num_slots_B = num_slots_B[draws.row_to_prompt_N]
            feeder.draw(draws)
        if chooser is not None and any(idx is not None for idx in selected_idx):
            chooser.take_recorded(selected_idx, num_slots_B, top_k_image)
        for slots_left in range(int(num_slots_B.max()), 0, -1):
            # a row with fewer slots begins later, so that all rows end in one column
            feeder.feed(num_slots_B >= slots_left, top_k_image, cut)
    return feeder.result()


@dataclass
class _SlotRows(RowTensors):
    """What is known of each row.

    Attributes:
        hidden_BH: of its last position.
        next_position_B: position id of its next one.
        kinds_BS, valid_BS: of all columns so far.
    """

    hidden_BH: Tensor
    next_position_B: Tensor
    kinds_BS: Tensor
    valid_BS: Tensor


class _SlotFeeder:
    """Feeds one slot after the other.

    Args:
        chooser: of the image embeddings before each slot; None where there are none.
        feed_hook: `feed` of `prefill_with_slots`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        cache: DynamicCache,
        rows: _SlotRows,
        chooser: SlotChooser | None,
        feed_hook: FeedHook | None,
    ):
        self.adapter = adapter
        self.cache = cache
        self.rows = rows
        self.chooser = chooser
        self.feed_hook = feed_hook
        self.prompt_length = rows.kinds_BS.shape[1]
        self.fed_BLH: list[Tensor] = []
        self.selected_BL: list[Tensor] = []
        self.log_probs_BL: list[Tensor] = []

    def draw(self, draws: SlotDraws) -> None:
        """Goes on with the rows of `draws`."""
        self.cache.batch_select_indices(draws.row_to_prompt_N)
        self.rows = self.rows.keep(draws.row_to_prompt_N)
        if self.chooser is not None:
            self.chooser.draw(draws)

    def feed(self, active_B: Tensor, top_k: int, cut: bool) -> None:
        """One slot for the active rows: its image embeddings, then h."""
        hidden_BH = self.rows.hidden_BH.detach() if cut else self.rows.hidden_BH
        block_BLH = self.adapter.make(hidden_BH)[:, None]
        selected_BL = torch.full_like(active_B, NOT_CHOSEN, dtype=torch.long)[:, None]
        log_probs_BL = torch.zeros(active_B.shape[0], 1, device=active_B.device)
        is_used_BL = active_B[:, None]
        if self.chooser is not None:
            choice = self.chooser.choose(active_B, top_k)
            log_probs_BL = torch.cat([choice.log_probs_BK, log_probs_BL], 1)
            # h last: the next slot, or the text, goes on from its hidden state
            block_BLH = torch.cat([choice.embeddings_BKH.to(block_BLH.dtype), block_BLH], 1)
            selected_BL = torch.cat([choice.own_idx_BK, selected_BL], 1)
            is_used_BL = torch.cat([choice.is_chosen_BK, is_used_BL], 1)
        self.log_probs_BL.append(log_probs_BL)
        self._forward(active_B, block_BLH, selected_BL, is_used_BL)

    def _forward(
        self, active_B: Tensor, block_BLH: Tensor, selected_BL: Tensor, is_used_BL: Tensor
    ) -> None:
        num_before = self.rows.kinds_BS.shape[1]
        kinds_BL = torch.full_like(selected_BL, int(PositionKind.SELECTED))
        kinds_BL[:, -1] = int(PositionKind.LATENT)
        if self.feed_hook is not None:
            block_BLH = self.feed_hook(block_BLH, kinds_BL, is_used_BL)
        self.rows.kinds_BS = torch.cat([self.rows.kinds_BS, kinds_BL], 1)
        self.rows.valid_BS = torch.cat([self.rows.valid_BS, is_used_BL], 1)
        hidden_BLH = self.adapter.decoder(
            inputs_embeds=block_BLH,
            attention_mask=attention_bias(
                self.rows.kinds_BS, self.rows.valid_BS, "full", self.adapter.dtype, num_before
            ),
            position_ids=with_components(
                count_on(self.rows.next_position_B, is_used_BL), self.adapter.has_mrope
            ),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        # columns that a row does not use count no positions
        self.rows.next_position_B = self.rows.next_position_B + is_used_BL.sum(-1)
        self.rows.hidden_BH = torch.where(
            active_B[:, None], hidden_BLH[:, -1], self.rows.hidden_BH
        )
        if self.chooser is not None:
            self.chooser.look_again(active_B)
        self.fed_BLH.append(block_BLH)
        self.selected_BL.append(selected_BL)

    def result(self) -> SlotPrefill:
        """What the rows have come to, and what was fed to each."""
        used_BL = self.rows.valid_BS[:, self.prompt_length :]
        kinds_BL = self.rows.kinds_BS[:, self.prompt_length :]
        counts = used_BL.sum(-1).tolist()

        def rows_of(blocks: list[Tensor], nothing: Tensor) -> tuple[Tensor, ...]:
            """What each row uses of the slots' columns."""
            # a boolean index goes row by row, so that `split` gives each row its own
            values = torch.cat(blocks, 1)[used_BL] if blocks else nothing
            return values.split(counts)

        kinds = rows_of([kinds_BL], kinds_BL[:0, 0:0].flatten())
        latents = rows_of(self.fed_BLH, self.rows.hidden_BH[:0])
        selected = rows_of(self.selected_BL, kinds_BL[:0, 0:0].flatten())
        log_probs = rows_of(
            self.log_probs_BL, self.rows.hidden_BH.new_zeros(0, dtype=torch.float32)
        )
        records = [
            SlotRecord(
                row_kinds,
                row_latents,
                row_selected[row_kinds == PositionKind.SELECTED],
                row_log_probs,
            )
            for row_kinds, row_latents, row_selected, row_log_probs in zip(
                kinds, latents, selected, log_probs, strict=True
            )
        ]
        return SlotPrefill(
            self.rows.hidden_BH,
            self.cache,
            self.rows.kinds_BS,
            self.rows.valid_BS,
            self.rows.next_position_B,
            records,
        )
