"""Records what a batch decodes, and makes trajectories of it.

Records are by *record row*, the row that a trajectory had when the batch began; rows that decode
may be fewer.

Legend: R record rows, N rows still decoding, M some of them, T completion positions, H hidden, A
numbers of aux a latent.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from grpo_latent.models.slots import SlotRecord
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.trajectory import Trajectory

EOS, LIMIT = 1, 2  # why a row ends


class Recorder:
    """Fills tensors [R, T] column by column, and keeps recorded vectors in the order they came.

    What a row holds beyond its length (a row that has stopped idles along for a while) is never
    read.
    """

    def __init__(self, num_rows: int, num_positions: int, device: torch.device):
        self.token_ids_RT = torch.zeros(num_rows, num_positions, dtype=torch.long, device=device)
        self.kinds_RT = torch.zeros_like(self.token_ids_RT)
        self.full_log_probs_RT = torch.zeros(num_rows, num_positions, device=device)
        self.drawn_log_probs_RT = torch.zeros_like(self.full_log_probs_RT)
        self.ends_RT = torch.zeros_like(self.token_ids_RT, dtype=torch.int8)
        self._latent_rows: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._aux: list[Tensor] = []

    def add(
        self,
        position: int,
        rows_N: Tensor,
        kinds_N: Tensor,
        token_ids_N: Tensor,
        full_N: Tensor,
        drawn_N: Tensor,
        ends_N: Tensor,
    ) -> None:
        """Records what stands at `position` of the record rows `rows_N`, with both log-probs.

        `ends_N` says which of them end there: `EOS`, `LIMIT`, or 0.
        """
        self.token_ids_RT[rows_N, position] = token_ids_N
        self.kinds_RT[rows_N, position] = kinds_N
        self.full_log_probs_RT[rows_N, position] = full_N
        self.drawn_log_probs_RT[rows_N, position] = drawn_N
        self.ends_RT[rows_N, position] = ends_N

    def add_latents(self, rows_M: Tensor, latents_MH: Tensor, aux_MA: Tensor | None) -> None:
        """Records the vectors of one position of the record rows `rows_M`."""
        # appended, not written to [R, T, H]: most positions have none, and how many is known to
        # the device only
        self._latent_rows.append(rows_M)
        self._latents.append(latents_MH.float())
        if aux_MA is not None:
            self._aux.append(aux_MA)

    def trajectories(
        self, requests: list[RolloutRequest], policy_version: int, hidden_size: int, aux_size: int
    ) -> list[list[Trajectory]]:
        """The records of each request, cut to each trajectory's length, on the CPU."""
        # one transfer each, not one a row
        is_end_RT = self.ends_RT.cpu() > 0
        ended_R = is_end_RT.any(1)
        last_R = is_end_RT.int().argmax(1)
        lengths = torch.where(ended_R, last_R + 1, is_end_RT.shape[1]).tolist()
        stopped = (self.ends_RT.cpu() == EOS).any(1).tolist()
        token_ids_RT = self.token_ids_RT.cpu()
        kinds_RT = self.kinds_RT.cpu()
        full_RT = self.full_log_probs_RT.cpu()
        drawn_RT = self.drawn_log_probs_RT.cpu()
        latents_by_row = self._by_row(self._latents, hidden_size)
        aux_by_row = self._by_row(self._aux, aux_size)
        groups = []
        row = 0
        for request in requests:
            prompt_ids = request.prompt_ids.cpu()
            group = []
            for seed in request.seeds:
                length = lengths[row]
                trajectory = Trajectory(
                    prompt_ids=prompt_ids,
                    # copies, not views that would keep the whole batch alive
                    token_ids=token_ids_RT[row, :length].clone(),
                    kinds=kinds_RT[row, :length].clone(),
                    rollout_log_probs=full_RT[row, :length].clone(),
                    sampling_log_probs=drawn_RT[row, :length].clone(),
                    latents=latents_by_row[row],
                    latent_aux=aux_by_row[row],
                    stop_reason="eos" if stopped[row] else "length",
                    group_id=request.group_id,
                    seed=seed,
                    policy_version=policy_version,
                )
                group.append(trajectory)
                row += 1
            groups.append(group)
        return groups

    def _by_row(self, values: list[Tensor], width: int) -> list[Tensor]:
        """Recorded vectors of each record row, float32 [n, width], in the order of its positions.

        `Trajectory` checks their number against the kinds.
        """
        num_rows = self.token_ids_RT.shape[0]
        if not values:
            return [torch.zeros(0, width) for _ in range(num_rows)]
        rows_L = torch.cat(self._latent_rows).cpu()
        # they came by position, all rows of one after the other: a stable sort by row keeps that
        # order within each row
        values_LW = torch.cat(values).cpu()[rows_L.argsort(stable=True)]
        counts = torch.bincount(rows_L, minlength=num_rows).tolist()
        return [rows.clone() for rows in values_LW.split(counts)]


def with_slots(trajectory: Trajectory, record: SlotRecord, placeholder_id: int) -> Trajectory:
    """The trajectory with the slots of its prompt in front."""
    kinds = record.kinds.cpu()
    log_probs = record.log_probs.float().cpu()
    return dataclasses.replace(
        trajectory,
        token_ids=torch.cat([torch.full_like(kinds, placeholder_id), trajectory.token_ids]),
        kinds=torch.cat([kinds, trajectory.kinds]),
        latents=torch.cat([record.latents.float().cpu(), trajectory.latents]),
        rollout_log_probs=torch.cat([log_probs, trajectory.rollout_log_probs]),
        sampling_log_probs=torch.cat([log_probs, trajectory.sampling_log_probs]),
        selected_idx=record.selected_idx.cpu(),
    )
