"""Decoding after prompt slots (IVT-LR, Coconut): the slots run once a prompt, then text is decoded as everywhere.

Which image embeddings a slot takes does not depend on a trajectory's seed, so the G trajectories of a prompt share their
slots; each records them at its beginning, as SELECTED and LATENT positions. They count towards `max_new_tokens`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_latent.errors import RolloutError
from grpo_latent.models.slots import SlotRecord, prefill_with_slots
from grpo_latent.rollout.decoding import DecodingBatch
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.trajectory import Trajectory


class SlotDecodingBatch(DecodingBatch):
    """`DecodingBatch` whose completions begin with slots.

    `limit_N` is the number of text positions that each row of the records may still take.
    """

    def _prefill(self, requests: list[RolloutRequest]):
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
        )
        self.records = prefill.records
        limits = []
        for request, record in zip(requests, prefill.records, strict=True):
            limit = self.sampling.max_new_tokens - record.kinds.shape[0]
            self._check(request, record, limit)
            limits += [limit] * len(request.seeds)
        self.limit_N = torch.tensor(limits, device=self.adapter.device)
        return prefill.hidden_BH, prefill.cache, prefill.kinds_BS, prefill.valid_BS, prefill.next_position_B

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
        groups = super().trajectories(requests, policy_version)
        return [
            [self._with_slots(trajectory, record) for trajectory in group]
            for group, record in zip(groups, self.records, strict=True)
        ]

    def _with_slots(self, trajectory: Trajectory, record: SlotRecord) -> Trajectory:
        kinds, latents = record.kinds.cpu(), record.latents.float().cpu()
        nothing = torch.zeros(kinds.shape[0])
        return dataclasses.replace(
            trajectory,
            token_ids=torch.cat([torch.full_like(kinds, self.config.latent_id), trajectory.token_ids]),
            kinds=torch.cat([kinds, trajectory.kinds]),
            latents=latents,
            rollout_log_probs=torch.cat([nothing, trajectory.rollout_log_probs]),
            sampling_log_probs=torch.cat([nothing, trajectory.sampling_log_probs]),
            selected_idx=record.selected_idx.cpu(),
        )
