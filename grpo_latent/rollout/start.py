"""Begins the rows of a batch: prefills prompts once each, and runs their slots if there are any.

    prompt_start   B prompts ──a forward a length──▶ keys and values, shared by a prompt's rows
    slot_start     B prompts ──▶ slots ──▶ the same; with drawn image positions, one a row

The decoding loop goes on from either in the same way.

Legend: B prompts, P prompt columns (slots included), N rows, S slots, M image positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_latent.errors import RolloutError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.sequences import prompt_sequences
from grpo_latent.models.slot_choice import SlotDraws
from grpo_latent.models.slots import SlotRecord, prefill_with_slots
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.prefill import Prefill, prefill_prompts
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import slot_uniforms


@dataclass(frozen=True)
class Start:
    """What decoding goes on from.

    Attributes:
        prefill: of B prompts, or of N rows.
        row_to_prefill_N: int64, the row of `prefill` that each row goes on from.
        records: the slots of each row, which stand in front of what is decoded; None without
            slots.
        limits_N: int64, positions that each row may still take; None where all may take
            `max_new_tokens`.
    """

    prefill: Prefill
    row_to_prefill_N: Tensor
    records: list[SlotRecord] | None = None
    limits_N: Tensor | None = None


def rows_of_prompts(requests: list[RolloutRequest], device: torch.device) -> Tensor:
    """int64 [N], the prompt of each row."""
    group_sizes = torch.tensor([len(request.seeds) for request in requests])
    return torch.repeat_interleave(torch.arange(len(requests)), group_sizes).to(device)


def prompt_start(adapter: ModelAdapter, requests: list[RolloutRequest]) -> Start:
    """Prefills the prompts, with little padding."""
    prompts = [request.prompt_ids for request in requests]
    images = [request.images for request in requests]
    prefill = prefill_prompts(prompts, images, adapter, adapter.mechanism.visibility)
    return Start(prefill, rows_of_prompts(requests, adapter.device))


def slot_start(
    adapter: ModelAdapter,
    requests: list[RolloutRequest],
    sampling: SamplingParams,
    selection_temperature: float | None = None,
) -> Start:
    """Prefills the prompts and runs their slots, which count towards `max_new_tokens`.

    Deterministic selection does not depend on a trajectory's seed, so the rows of a prompt share
    their slots; with random selection (Plackett–Luce) the prompt is prefilled once, and each row
    has slots of its own.

    Args:
        selection_temperature: of Plackett–Luce selection; None takes the image positions of most
            attention, and so does greedy decoding.
    """
    device = adapter.device
    num_slots = [adapter.mechanism.num_slots(request.steps) for request in requests]
    overrides = [request.latent_override for request in requests]
    is_given = any(override is not None for override in overrides)
    feed = None
    if is_given:
        prompts_B = torch.arange(len(requests), device=device)
        feed = _feed(OverrideTable(requests, prompts_B, adapter.hidden_size))
    draws = None
    # an override names vectors and image positions of slots that a prompt's rows share
    may_draw = adapter.has_vision and adapter.mechanism.top_k_image > 0 and not is_given
    if selection_temperature is not None and may_draw:
        draws = _draws(adapter, requests, num_slots, sampling, selection_temperature)
    prefill = prefill_with_slots(
        adapter,
        prompt_sequences(
            [request.prompt_ids for request in requests],
            [request.images for request in requests],
            adapter,
            "full",
        ),
        torch.tensor(num_slots, device=device),
        adapter.mechanism.top_k_image,
        feed=feed,
        selected_idx=[
            None if override is None else override.selected_idx for override in overrides
        ],
        draws=draws,
    )
    rows = [request for request in requests for _ in request.seeds]
    # one record a row: a prompt's rows share theirs, unless each has drawn its own
    has_own = len(prefill.records) == len(rows)
    pairs = zip(rows if has_own else requests, prefill.records, strict=True)
    records = [record for request, record in pairs for _ in ([0] if has_own else request.seeds)]
    limits = []
    for request, record in zip(rows, records, strict=True):
        limits.append(sampling.max_new_tokens - record.kinds.shape[0])
        _check_room(request, record, sampling)
    return Start(
        Prefill(
            prefill.hidden_BH,
            prefill.cache,
            prefill.kinds_BS,
            prefill.valid_BS,
            prefill.next_position_B,
        ),
        torch.arange(len(rows), device=device) if has_own else rows_of_prompts(requests, device),
        records,
        torch.tensor(limits, device=device),
    )


def _draws(
    adapter: ModelAdapter,
    requests: list[RolloutRequest],
    num_slots: list[int],
    sampling: SamplingParams,
    temperature: float,
) -> SlotDraws:
    """What each row's slots draw by; greedy decoding draws nothing, and takes the best."""
    uniforms_NSM = None
    if sampling.temperature > 0:
        seeds_N = np.array(
            [seed for request in requests for seed in request.seeds], dtype=np.uint64
        )
        image_token_id = adapter.image_token_id
        assert image_token_id is not None  # the adapter has vision
        counts = [int(request.prompt_ids.eq(image_token_id).sum()) for request in requests]
        slots = [
            slot_uniforms(seeds_N, slot, max(*counts, 1)) for slot in range(max(*num_slots, 1))
        ]
        uniforms_NSM = torch.stack(slots, 1).to(adapter.device)
    return SlotDraws(rows_of_prompts(requests, adapter.device), temperature, uniforms_NSM)


def _check_room(request: RolloutRequest, record: SlotRecord, sampling: SamplingParams) -> None:
    """Raises `RolloutError` where slots leave no position to text, which is what acts."""
    if sampling.max_new_tokens - record.kinds.shape[0] < 1:
        raise RolloutError(
            "no room for text after the slots",
            where=f"request of group {request.group_id!r}",
            got=f"max_new_tokens {sampling.max_new_tokens}, "
            f"slots of {record.kinds.shape[0]} positions",
            expected="max_new_tokens beyond the slots",
            fix="Raise the response length, or lower latent.steps or latent.top_k_image.",
        )


def _feed(table: OverrideTable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The override as a hook of `prefill_with_slots`; all slots count as span 0."""

    def feed(block_BLH: Tensor, kinds_BL: Tensor, used_BL: Tensor) -> Tensor:
        rows_B = torch.arange(block_BLH.shape[0], device=block_BLH.device)
        return table.feed(rows_B, block_BLH, kinds_BL, used_BL, span_M=torch.zeros_like(rows_B))

    return feed
