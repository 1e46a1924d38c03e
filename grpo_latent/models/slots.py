"""Latent steps at slots of the prompt: IVT-LR (2510.12603 section 3) and, without images, Coconut
(2412.06769).

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

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from grpo_latent.algo.selection import (
    NOT_CHOSEN,
    sample_candidates,
    selection_log_probs,
    top_k_candidates,
)
from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.choices import log_weights
from grpo_latent.models.kv_cache import caching_layers
from grpo_latent.models.positions import count_on, next_positions, with_components
from grpo_latent.models.selection import recording_last_row
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.visibility import attention_bias
from grpo_latent.models.vision_cache import encoding_once
from grpo_latent.trajectory import PositionKind


@dataclass(frozen=True)
class SlotDraws:
    """Plackett–Luce selection: image positions drawn without replacement, in proportion to
    attention^(1 / temperature).

    Attributes:
        row_to_prompt_N: int64, the prompt of each row: slots then differ within a group, and run
            once a row.
        uniforms_NSM: float64 in [0, 1), for each row, slot and image position; None takes the
            best, as `top_k` does.
    """

    row_to_prompt_N: Tensor
    temperature: float
    uniforms_NSM: Tensor | None


@dataclass(frozen=True)
class SlotRecord:
    """The slots of one row, as they stand at the beginning of its trajectories: of all of a
    prompt's, or of one.

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
    feed: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
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
    images = prompts.images
    bias = prompts.attention_bias(adapter.dtype)
    selects = top_k_image > 0 and images is not None
    recording = recording_last_row(adapter.text_config) if selects else nullcontext()
    with caching_layers(adapter.model), recording as recorder:
        with encoding_once(adapter.backbone) if selects else nullcontext():
            embeddings_MH = adapter.encode_images(images) if selects else None
            hidden_BH = adapter.forward_hidden(
                prompts.input_ids_BT, bias, prompts.position_ids, images, cache
            )[:, -1]
        feeder = _SlotFeeder(
            adapter,
            cache,
            recorder,
            embeddings_MH,
            prompts.input_ids_BT,
            prompts.kinds_BT,
            prompts.valid_BT,
            hidden_BH,
            next_positions(prompts.position_ids),
        )
        feeder.feed_hook = feed
        if draws is not None:
            num_slots_B = num_slots_B[draws.row_to_prompt_N]
            feeder.draw(draws)
        if selects and any(idx is not None for idx in selected_idx):
            feeder.take_recorded(selected_idx, num_slots_B, top_k_image)
        for slots_left in range(int(num_slots_B.max()), 0, -1):
            # a row with fewer slots begins later, so that all rows end in one column
            feeder.feed(num_slots_B >= slots_left, top_k_image if selects else 0, cut)
    return feeder.result()


@dataclass
class _SlotRows(RowTensors):
    """What is known of each row; the last four are None where no image position is chosen.

    Attributes:
        hidden_BH: of its last position.
        next_position_B: position id of its next one.
        kinds_BS, valid_BS: of all columns so far.
        attention_BP: the last position's, at the prompt's columns.
        candidates_BP: image positions that may still be chosen.
        own_idx_BP: which of its own image positions stands at a column.
        embedding_idx_BP: which of all prompts' image embeddings does.
    """

    hidden_BH: Tensor
    next_position_B: Tensor
    kinds_BS: Tensor
    valid_BS: Tensor
    attention_BP: Tensor | None = None
    candidates_BP: Tensor | None = None
    own_idx_BP: Tensor | None = None
    embedding_idx_BP: Tensor | None = None


class _SlotFeeder:
    """Feeds one slot after the other."""

    def __init__(
        self,
        adapter,
        cache,
        recorder,
        embeddings_MH,
        input_ids_BP,
        kinds_BP,
        valid_BP,
        hidden_BH,
        next_position_B,
    ):
        self.adapter, self.cache, self.recorder, self.embeddings_MH = (
            adapter,
            cache,
            recorder,
            embeddings_MH,
        )
        self.rows = _SlotRows(hidden_BH, next_position_B, kinds_BP, valid_BP)
        self.prompt_length = input_ids_BP.shape[1]
        if recorder is not None:
            is_image_BP = (input_ids_BP == adapter.image_token_id) & valid_BP
            self.rows.candidates_BP = is_image_BP
            self.rows.own_idx_BP = is_image_BP.cumsum(-1) - 1
            self.rows.embedding_idx_BP = (is_image_BP.flatten().cumsum(0) - 1).view_as(is_image_BP)
            self.rows.attention_BP = self._take_attention()
        self.fed_BLH: list[Tensor] = []
        self.selected_BL: list[Tensor] = []
        self.log_probs_BL: list[Tensor] = []
        self.draws: SlotDraws | None = None
        self.feed_hook: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.recorded_BF: Tensor | None = None

    def draw(self, draws: SlotDraws) -> None:
        """Goes on with the rows of `draws`, each of which draws its own image positions."""
        rows_N = draws.row_to_prompt_N
        self.cache.batch_select_indices(rows_N)
        self.rows = self.rows.keep(rows_N)
        self.draws, self.num_drawn_N = draws, torch.zeros_like(rows_N)

    def take_recorded(
        self, selected_idx: Sequence[Tensor | None], num_slots_B: Tensor, top_k: int
    ) -> None:
        """Columns `recorded_BF` of the image positions that rows take in turn; rows that choose
        have -1.
        """
        num_images_B = self.rows.candidates_BP.sum(-1)
        wanted = torch.minimum(num_slots_B * top_k, num_images_B).tolist()
        self.recorded_BF = torch.full(
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
            columns = self.rows.candidates_BP[row].nonzero()[:, 0]
            self.recorded_BF[row, : len(idx)] = columns[idx.to(columns.device)]
        self.num_taken_B = torch.zeros_like(num_images_B)

    def _take_attention(self) -> Tensor:
        return self.recorder.take(self.adapter.text_config.num_hidden_layers)[
            :, : self.prompt_length
        ]

    def feed(self, active_B: Tensor, top_k: int, cut: bool) -> None:
        """One slot for the active rows: its image embeddings, then h."""
        hidden_BH = self.rows.hidden_BH.detach() if cut else self.rows.hidden_BH
        block_BLH = self.adapter.make(hidden_BH)[:, None]
        selected_BL = torch.full_like(active_B, NOT_CHOSEN, dtype=torch.long)[:, None]
        log_probs_BL = torch.zeros(active_B.shape[0], 1, device=active_B.device)
        is_used_BL = active_B[:, None]
        if top_k:
            chosen_BK, log_probs_BK = self._choose(active_B, top_k)
            log_probs_BL = torch.cat([log_probs_BK, log_probs_BL], 1)
            place_BK, is_chosen_BK = chosen_BK.clamp(min=0), chosen_BK != NOT_CHOSEN
            embeddings_BKH = self.embeddings_MH[
                self.rows.embedding_idx_BP.gather(1, place_BK).clamp(min=0)
            ]
            block_BLH = torch.cat([embeddings_BKH.to(block_BLH.dtype), block_BLH], 1)
            selected_BL = torch.cat([self.rows.own_idx_BP.gather(1, place_BK), selected_BL], 1)
            is_used_BL = torch.cat([is_chosen_BK, is_used_BL], 1)
        self.log_probs_BL.append(log_probs_BL)
        self._forward(active_B, block_BLH, selected_BL, is_used_BL)

    def _choose(self, active_B: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Columns of the prompt [B, K], best or drawn first; `NOT_CHOSEN`, where a row has fewer
        left, in front. And the log-probs of draws [B, K]."""
        candidates_BP = self.rows.candidates_BP & active_B[:, None]
        chosen_BK = self._ranked(candidates_BP, active_B, top_k)
        is_missing_BK = chosen_BK == NOT_CHOSEN
        chosen_BK = chosen_BK.gather(
            1, is_missing_BK.long().sort(dim=-1, descending=True, stable=True).indices
        )
        if self.recorded_BF is not None:
            chosen_BK = self._recorded(chosen_BK)
        taken_BP = torch.zeros_like(self.rows.candidates_BP, dtype=torch.long)
        taken_BP.scatter_add_(1, chosen_BK.clamp(min=0), (chosen_BK != NOT_CHOSEN).long())
        self.rows.candidates_BP = self.rows.candidates_BP & (taken_BP == 0)
        if self.draws is None:
            return chosen_BK, torch.zeros(chosen_BK.shape, device=chosen_BK.device)
        weights_BP = log_weights(self.rows.attention_BP, self.draws.temperature)
        return chosen_BK, selection_log_probs(weights_BP, candidates_BP, chosen_BK)

    def _ranked(self, candidates_BP: Tensor, active_B: Tensor, top_k: int) -> Tensor:
        if self.draws is None or self.draws.uniforms_NSM is None:
            return top_k_candidates(self.rows.attention_BP, candidates_BP, top_k)
        # a number a slot and image position: the same ones whatever the row is padded to
        slot_N = self.num_drawn_N.clamp(max=self.draws.uniforms_NSM.shape[1] - 1)
        uniforms_NM = self.draws.uniforms_NSM[
            torch.arange(len(slot_N), device=slot_N.device), slot_N
        ]
        uniforms_BP = uniforms_NM.gather(
            1, self.rows.own_idx_BP.clamp(0, uniforms_NM.shape[1] - 1)
        )
        self.num_drawn_N = self.num_drawn_N + active_B
        weights_BP = log_weights(self.rows.attention_BP, self.draws.temperature)
        return sample_candidates(weights_BP, candidates_BP, top_k, uniforms_BP)

    def _recorded(self, chosen_BK: Tensor) -> Tensor:
        """As many recorded columns as were chosen, in the rows that have them."""
        is_chosen_BK = chosen_BK != NOT_CHOSEN
        place_BK = self.num_taken_B[:, None] + is_chosen_BK.long().cumsum(-1) - 1
        recorded_BK = self.recorded_BF.gather(1, place_BK.clamp(0, self.recorded_BF.shape[1] - 1))
        self.num_taken_B += is_chosen_BK.sum(-1)
        return torch.where(is_chosen_BK & (recorded_BK != NOT_CHOSEN), recorded_BK, chosen_BK)

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
        self.rows.next_position_B = self.rows.next_position_B + is_used_BL.sum(-1)
        self.rows.hidden_BH = torch.where(
            active_B[:, None], hidden_BLH[:, -1], self.rows.hidden_BH
        )
        if self.recorder is not None:
            self.rows.attention_BP = torch.where(
                active_B[:, None], self._take_attention(), self.rows.attention_BP
            )
        self.fed_BLH.append(block_BLH)
        self.selected_BL.append(selected_BL)

    def result(self) -> SlotPrefill:
        used_BL, kinds_BL = (
            self.rows.valid_BS[:, self.prompt_length :],
            self.rows.kinds_BS[:, self.prompt_length :],
        )
        counts = used_BL.sum(-1).tolist()

        def rows_of(parts: list[Tensor], nothing: Tensor) -> tuple[Tensor, ...]:
            """What each row uses of the slots' columns."""
            values = torch.cat(parts, 1)[used_BL] if parts else nothing
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
