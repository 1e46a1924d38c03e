"""Runs one scheduler step of latent decoding, the same for both of vLLM's model runners.

    finish, add     who goes and who comes
    begin           before the forward: recorded vectors go in, rows that choose are noted
    choose          after it: their next positions are decided and recorded

All three read what the scheduler announced, on the CPU, and tensors on the device: nothing waits
for a sampled id, so asynchronous scheduling keeps its overlap.

Legend as in `table`: N requests of a step, M rows among them, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from grpo_latent.errors import RolloutError
from grpo_latent.rollout.vllm.request import LatentRequest
from grpo_latent.rollout.vllm.skeleton import WorkerOptions
from grpo_latent.rollout.vllm.table import LatentTable, StepRows

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors


class LatentSteps:
    """Follows the requests of a worker.

    Args:
        modules: has what the mechanism's `attach` makes; asked for it at every step, as new
            weights may replace it.
        embed: token embeddings of ids.
        num_seats: requests in flight that the table starts with.
        max_length: longest completion.
    """

    def __init__(
        self,
        options: WorkerOptions,
        modules: nn.Module,
        embed: Callable[[Tensor], Tensor],
        *,
        num_seats: int,
        max_length: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.table = LatentTable(
            options.mechanism,
            options.treatment,
            modules,
            embed,
            options.banned_ids,
            num_seats,
            max_length,
            options.room(max_length),
            hidden_size,
            dtype,
            device,
        )
        self.prompt_lengths: dict[str, int] = {}
        self.num_replayed_rows = 0
        self._rows: StepRows | None = None

    @property
    def rows(self) -> StepRows:
        """The rows of this step that choose a position."""
        assert self._rows is not None  # `begin` comes first
        return self._rows

    def add(
        self, request_id: str, prompt_length: int, extra_args: Mapping[str, object] | None
    ) -> None:
        """Notes a request at its first step.

        The V2 runner does so again at its first step after a preemption: it then has its seat
        still.

        Raises:
            RolloutError: its prompt has grown, so that completion positions would move.
        """
        known = self.prompt_lengths.setdefault(request_id, prompt_length)
        if known != prompt_length:
            raise RolloutError(
                "latents cannot go through a request whose prompt grows",
                where=f"request {request_id}",
                got=f"{prompt_length} prompt ids, before {known}",
                expected="no streaming input",
            )
        if request_id not in self.table.seats:
            self.table.add(request_id, LatentRequest.from_extra_args(extra_args))

    def finish(self, request_ids: Iterable[str]) -> None:
        """Notes the end of requests; ids that were never added are passed over."""
        for request_id in request_ids:
            self.prompt_lengths.pop(request_id, None)
            self.table.finish(request_id)

    def begin(
        self,
        embeds: Tensor,
        request_ids: list[str],
        starts_N: np.ndarray,
        counts_N: np.ndarray,
        is_choosing_N: np.ndarray,
    ) -> None:
        """Feeds the recorded vectors of this step's inputs, in place.

        Args:
            embeds: input vectors [rows of the step, H], requests one after the other.
            starts_N: int64, each request's first position of this step in its sequence, prompt
                included.
            counts_N: int64, its number of positions.
            is_choosing_N: bool, False where known tokens are left after this step, so that nothing
                is sampled.
        """
        table = self.table
        seats_N = np.array([table.seats[request_id] for request_id in request_ids])
        positions_N = starts_N - np.array(
            [self.prompt_lengths[request_id] for request_id in request_ids]
        )
        self._feed(embeds, seats_N, positions_N, counts_N)
        rows_M = np.nonzero(is_choosing_N)[0]
        self._rows = StepRows(rows_M, seats_N[rows_M], (positions_N + counts_N)[rows_M])
        table.note_chosen(self._rows)

    def _feed(
        self, embeds: Tensor, seats_N: np.ndarray, positions_N: np.ndarray, counts_N: np.ndarray
    ) -> None:
        """Feeds completion positions; `positions_N` may be negative, inside prompts."""
        if counts_N.max() == 1 and positions_N.min() >= 0:  # a step that only decodes
            self.table.feed(embeds, np.arange(len(seats_N)), seats_N, positions_N)
            return
        first_rows_N = np.cumsum(counts_N) - counts_N
        offsets = np.arange(int(counts_N.sum())) - np.repeat(first_rows_N, counts_N)
        positions = np.repeat(positions_N, counts_N) + offsets
        rows_M = np.nonzero(positions >= 0)[0]
        if rows_M.size:
            self.table.feed(
                embeds, rows_M, np.repeat(seats_N, counts_N)[rows_M], positions[rows_M]
            )
        # beyond the one position that each decoding request feeds: replays after a preemption or
        # in chunks, which a test wants to have happened
        self.num_replayed_rows += rows_M.size - int(((counts_N == 1) & (positions_N >= 0)).sum())

    @property
    def has_served_rows(self) -> bool:
        """Whether vLLM's own sampler draws for a row of this step."""
        return bool(self.table.is_served(self.rows).any())

    def without_banned(self, logits_NV: Tensor) -> Tensor:
        """A copy of the logits for vLLM's own sampler, banned tokens at -inf."""
        masked = logits_NV.clone()
        if self.rows.rows_N.size:
            rows_M = self._row_tensor(logits_NV)
            masked[rows_M] = self.table.bans(self.rows).without(masked[rows_M])
        return masked

    def choose(
        self,
        hidden_NH: Tensor,
        logits_NV: Tensor,
        tokens_N1: Tensor,
        log_probs: LogprobsTensors | None = None,
    ) -> None:
        """Decides, records and writes the next id of every row that chooses one.

        Args:
            hidden_NH: last hidden states after the final norm, a row a request.
            logits_NV: their logits, nothing masked.
            tokens_N1: ids that vLLM's sampler drew; overwritten.
            log_probs: vLLM's `LogprobsTensors` of them, or None; overwritten where its sampler did
                not draw, with 0 where nothing is sampled.
        """
        rows = self.rows
        if not rows.rows_N.size:
            return
        picked: slice | Tensor = (
            slice(None) if rows.rows_N.size == logits_NV.shape[0] else self._row_tensor(logits_NV)
        )
        chosen_M, full_M, is_forced_M = self.table.choose(
            rows, hidden_NH[picked], logits_NV[picked], tokens_N1[picked, 0].long()
        )
        tokens_N1[picked, 0] = chosen_M.to(tokens_N1.dtype)
        if log_probs is None:
            return
        # vLLM's report of a served token is right already, of a forced one it knows nothing
        ours_M = is_forced_M | ~torch.from_numpy(self.table.is_served(rows)).to(logits_NV.device)
        for target, values_M in (
            (log_probs.logprob_token_ids, chosen_M),
            (log_probs.logprobs, full_M),
        ):
            target[picked, 0] = torch.where(ours_M, values_M.to(target.dtype), target[picked, 0])

    def _row_tensor(self, like: Tensor) -> Tensor:
        """Row numbers of this step's choosing rows, where `like` is."""
        return torch.from_numpy(self.rows.rows_N).to(like.device)
