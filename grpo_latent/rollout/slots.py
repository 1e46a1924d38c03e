"""Decoding after prompt slots (IVT-LR, Coconut): the slots run once a prompt, then text is decoded as everywhere.

Deterministic selection does not depend on a trajectory's seed, so the G trajectories of a prompt share their slots; with
random selection (Plackett–Luce) the prompt is prefilled once, and each trajectory has slots of its own. They stand at its
beginning, as SELECTED and LATENT positions, and count towards `max_new_tokens`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from grpo_latent.errors import RolloutError
from grpo_latent.models.slots import SlotDraws, SlotRecord, prefill_with_slots
from grpo_latent.rollout.decoding import DecodingBatch
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.prefill import Prefill
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.rollout.sampling import slot_uniforms
from grpo_latent.trajectory import Trajectory


class SlotDecodingBatch(DecodingBatch):
    """`DecodingBatch` whose completions begin with slots.

    `limit_N` is the number of text positions that each row of the records may still take.

    Args:
        selection_temperature: of Plackett–Luce selection; None takes the image positions of most attention, and so does
            greedy decoding.
    """

    def __init__(self, *args, selection_temperature: float | None = None):
        self.selection_temperature = selection_temperature
        super().__init__(*args)

    def _prefill(self, requests: list[RolloutRequest]) -> Prefill:
        num_slots = [self.config.steps if request.steps is None else request.steps for request in requests]
        overrides = [request.latent_override for request in requests]
        is_given = any(override is not None for override in overrides)
        prompts_B = torch.arange(len(requests), device=self.adapter.device)
        prefill = prefill_with_slots(
            self.adapter,
            *self._padded_prompts(requests),
            torch.tensor(num_slots, device=self.adapter.device),
            self.config.top_k_image,
            feed=self._feed(OverrideTable(requests, prompts_B, self.adapter.hidden_size)) if is_given else None,
            selected_idx=[None if override is None else override.selected_idx for override in overrides],
            draws=None if is_given else self._draws(requests, num_slots),
        )
        rows = [request for request in requests for _ in request.seeds]
        # one record a row: a prompt's rows share theirs, unless each has drawn its own
        self.records = prefill.records
        if len(self.records) != len(rows):
            pairs = zip(requests, prefill.records, strict=True)
            self.records = [record for request, record in pairs for _ in request.seeds]
        limits = []
        for request, record in zip(rows, self.records, strict=True):
            limits.append(self.sampling.max_new_tokens - record.kinds.shape[0])
            self._check(request, record, limits[-1])
        self.limit_N = torch.tensor(limits, device=self.adapter.device)
        self._num_prefilled = prefill.hidden_BH.shape[0]
        return Prefill(prefill.hidden_BH, prefill.cache, prefill.kinds_BS, prefill.valid_BS, prefill.next_position_B)

    def _draws(self, requests: list[RolloutRequest], num_slots: list[int]) -> SlotDraws | None:
        if self.selection_temperature is None or self.config.top_k_image == 0:
            return None
        group_sizes = torch.tensor([len(request.seeds) for request in requests])
        rows_N = torch.repeat_interleave(torch.arange(len(requests)), group_sizes).to(self.adapter.device)
        uniforms_NSM = None
        if self.sampling.temperature > 0:
            seeds_N = np.array([seed for request in requests for seed in request.seeds], dtype=np.uint64)
            counts = [int((request.prompt_ids == self.adapter.image_token_id).sum()) for request in requests]
            slots = [slot_uniforms(seeds_N, slot, max(*counts, 1)) for slot in range(max(*num_slots, 1))]
            uniforms_NSM = torch.stack(slots, 1).to(self.adapter.device)
        return SlotDraws(rows_N, self.selection_temperature, uniforms_NSM)

    def _rows_of_prefill(self, row_to_prompt_N: Tensor) -> Tensor:
        has_own = self._num_prefilled == row_to_prompt_N.shape[0]
        return torch.arange(self._num_prefilled, device=row_to_prompt_N.device) if has_own else row_to_prompt_N

    def _check(self, request: RolloutRequest, record: SlotRecord, limit: int) -> None:
        where = f"request of group {request.group_id!r}"
        if limit < 1:
            raise RolloutError(
                "no room for text after the slots",
                where=where,
                got=f"max_new_tokens {self.sampling.max_new_tokens}, slots of {record.kinds.shape[0]} positions",
                expected="max_new_tokens beyond the slots",
                fix="Raise the response length, or lower latent.steps or latent.top_k_image.",
            )

    @staticmethod
    def _feed(table: OverrideTable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def feed(block_BLH: Tensor, kinds_BL: Tensor, used_BL: Tensor) -> Tensor:
            rows_B = torch.arange(block_BLH.shape[0], device=block_BLH.device)
            return table.feed(rows_B, block_BLH, kinds_BL, used_BL, span_M=torch.zeros_like(rows_B))

        return feed

    def _is_after_span_N(self) -> Tensor:
        return torch.ones_like(self.done_N)

    def _record(self, position: int, kinds_N: Tensor, token_ids_N: Tensor, full_N: Tensor, drawn_N: Tensor) -> None:
        super()._record(position, kinds_N, token_ids_N, full_N, drawn_N)
        reaches_limit_N = (self.limit_N[self.rows_N] <= position + 1) & ~self.done_N
        self.lengths[self.rows_N[reaches_limit_N]] = position + 1
        self.done_N |= reaches_limit_N

    def trajectories(self, requests: list[RolloutRequest], policy_version: int) -> list[list[Trajectory]]:
        groups, records = super().trajectories(requests, policy_version), iter(self.records)
        return [[self._with_slots(trajectory, next(records)) for trajectory in group] for group in groups]

    def _with_slots(self, trajectory: Trajectory, record: SlotRecord) -> Trajectory:
        kinds, latents = record.kinds.cpu(), record.latents.float().cpu()
        log_probs = record.log_probs.float().cpu()
        return dataclasses.replace(
            trajectory,
            token_ids=torch.cat([torch.full_like(kinds, self.config.latent_id), trajectory.token_ids]),
            kinds=torch.cat([kinds, trajectory.kinds]),
            latents=latents,
            rollout_log_probs=torch.cat([log_probs, trajectory.rollout_log_probs]),
            sampling_log_probs=torch.cat([log_probs, trajectory.sampling_log_probs]),
            selected_idx=record.selected_idx.cpu(),
        )
