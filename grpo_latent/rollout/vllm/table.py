"""What the worker remembers of each request: kinds, latents, log-probs and the span state at every position.

All of it is addressed by (slot, completion position), so every step is a function of what the scheduler says it
computes now. A request that was preempted, whose prompt is cut into chunks, or that loses a token in flight simply asks
for a position again: nothing has to be rolled back, and no sampled id has to reach the CPU first.

Letters: S slots, L positions, C latents a slot, N rows of a step, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_latent.errors import RolloutError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.latent.lvr import SpanState
from grpo_latent.rollout.sampling import sample, uniforms
from grpo_latent.rollout.vllm.middleware import STEPS_FIELD
from grpo_latent.trajectory import PositionKind

# columns of the state before each position
_IN_SPAN, _NUM_FED, _NUM_SPANS, _END_IS_DUE, _NUM_LATENTS = range(5)
_MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class RowSampling:
    """How a recorded request draws: values of `rollout.protocol.SamplingParams` and the trajectory's seed."""

    seed: int
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class LatentRequest:
    """What a request asks of the worker: `SamplingParams.extra_args["latent"]` in vLLM's terms.

    `key` names the record that `pop` returns; None (a served request) keeps none, and vLLM's sampler draws its text. Such a
    request may set `extra_args["latent_steps"]`, which `middleware` has checked for HTTP clients.
    """

    key: str | None = None
    steps: int | None = None
    sampling: RowSampling | None = None

    @staticmethod
    def from_extra_args(extra_args: dict | None) -> LatentRequest:
        """Of a rollout only if all that a rollout sends is there: a worker must outlive what clients send."""
        extra_args = extra_args or {}
        values = extra_args.get("latent")
        names = ("seed", "temperature", "top_k", "top_p")
        if not isinstance(values, dict) or not {"key", *names} <= set(values):
            steps = extra_args.get(STEPS_FIELD)
            return LatentRequest(steps=min(max(steps, 1), _MAX_STEPS) if isinstance(steps, int) else None)
        return LatentRequest(values["key"], values.get("steps"), RowSampling(*(values[name] for name in names)))


@dataclass(frozen=True)
class StepRows:
    """The rows whose next position is chosen in a step, known to the CPU before the forward ends.

    `rows_N` are row numbers in the batch, `slots_N` slots, `positions_N` completion positions; int64.
    """

    rows_N: np.ndarray
    slots_N: np.ndarray
    positions_N: np.ndarray
    requests: list[LatentRequest]


class LatentTable:
    """Slots for the requests that have started and are not finished; grows when preempted requests hold them all."""

    def __init__(
        self,
        config: LatentConfig,
        banned_V: Tensor,
        num_slots: int,
        max_length: int,
        max_latents: int,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        self.config, self.banned_V, self.device = config, banned_V, banned_V.device
        self.max_latents = max_latents
        self.requests: dict[str, LatentRequest] = {}
        self.slots: dict[str, int] = {}
        self.num_chosen: dict[str, int] = {}
        self.records: dict[str, dict[str, Tensor]] = {}
        self._free = list(range(num_slots))[::-1]
        options = {"device": self.device}
        self.state_SL = torch.zeros(num_slots, max_length + 1, 5, dtype=torch.int32, **options)
        self.kinds_SL = torch.zeros(num_slots, max_length, dtype=torch.int8, **options)
        self.full_SL = torch.zeros(num_slots, max_length, **options)
        self.drawn_SL = torch.zeros(num_slots, max_length, **options)
        self.latents_SCH = torch.zeros(num_slots, max_latents, hidden_size, dtype=dtype, **options)
        self.steps_S = torch.zeros(num_slots, dtype=torch.long, **options)

    def add(self, request_id: str, request: LatentRequest) -> None:
        if request.key is not None and any(known.key == request.key for known in self.requests.values()):
            raise RolloutError("two requests share one key", where=request_id, got=request.key, expected="unique keys")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.requests[request_id], self.slots[request_id], self.num_chosen[request_id] = request, slot, 0
        self.steps_S[slot] = request.steps or self.config.steps

    def _grow(self) -> None:
        num_slots = self.steps_S.shape[0]
        for name in ("state_SL", "kinds_SL", "full_SL", "drawn_SL", "latents_SCH", "steps_S"):
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, torch.zeros_like(tensor)]))
        self._free = list(range(num_slots, 2 * num_slots))[::-1]

    def finish(self, request_id: str) -> None:
        """Frees the slot; keeps the record if the request has a key."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        slot, length = self.slots.pop(request_id), self.num_chosen.pop(request_id)
        self._free.append(slot)
        if request.key is not None:
            num_latents = int(self.state_SL[slot, length, _NUM_LATENTS])
            self.records[request.key] = {
                "kinds": self.kinds_SL[slot, :length].to("cpu", torch.int64),
                "rollout_log_probs": self.full_SL[slot, :length].to("cpu", copy=True),
                "sampling_log_probs": self.drawn_SL[slot, :length].to("cpu", copy=True),
                "latents": self.latents_SCH[slot, : min(num_latents, self.max_latents)].to("cpu", copy=True),
                "num_latents": torch.tensor(num_latents),
            }

    def pop(self, keys: list[str] | None) -> dict[str, dict[str, Tensor]]:
        """Records of finished requests by key, all of them if `keys` is None; each is returned once.

        A finished request whose end vLLM has not announced to the worker yet (it does so with its next step) counts.
        """
        wanted = None if keys is None else set(keys)
        for request_id, request in list(self.requests.items()):
            if request.key is not None and (wanted is None or request.key in wanted):
                self.finish(request_id)
        return {key: self.records.pop(key) for key in list(self.records) if wanted is None or key in wanted}

    def feed(self, embeds: Tensor, rows_M: np.ndarray, slots_M: np.ndarray, positions_M: np.ndarray) -> None:
        """Overwrites the input vectors at latent positions, in place.

        Args:
            embeds: [rows of the step, H].
            rows_M, slots_M, positions_M: int64, the step's inputs that are completion positions.
        """
        rows, slots, positions = (self._to_device(values) for values in (rows_M, slots_M, positions_M))
        is_latent_M1 = (self.kinds_SL[slots, positions] == PositionKind.LATENT)[:, None]
        latent_idx_M = self.state_SL[slots, positions, _NUM_LATENTS].long().clamp(max=self.max_latents - 1)
        latents_MH = self.latents_SCH[slots, latent_idx_M].to(embeds.dtype)
        embeds[rows] = torch.where(is_latent_M1, latents_MH, embeds[rows])

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def banned(self, rows: StepRows) -> Tensor:
        """bool [N, V] or [1, V], tokens that no row may draw: where a span may not open, `start` is one of them."""
        slots, positions = self._to_device(rows.slots_N), self._to_device(rows.positions_N)
        room_N = torch.ones(len(rows.requests), dtype=torch.bool, device=self.device)
        if self.config.max_spans is not None:
            room_N = self.state_SL[slots, positions, _NUM_SPANS] < self.config.max_spans
        elif all(request.key is not None for request in rows.requests):
            return self.banned_V[None]
        # a served request must not run out of room for its latents; a recorded one that does is reported by `pop`
        is_served_N = self._to_device(np.array([request.key is None for request in rows.requests]))
        num_latents_N = self.state_SL[slots, positions, _NUM_LATENTS] + self.steps_S[slots]
        room_N = room_N & (~is_served_N | (num_latents_N <= self.max_latents))
        banned_NV = self.banned_V.repeat(len(rows.requests), 1)
        banned_NV[:, self.config.start_id] |= ~room_N
        return banned_NV

    def choose(
        self,
        rows: StepRows,
        hidden_NH: Tensor,
        logits_NV: Tensor,
        banned_NV: Tensor,
        served_tokens_N: Tensor,
        feedback,
        end_vector_H: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decides and records the next position of every row.

        Args:
            hidden_NH: last hidden states after the final norm.
            logits_NV: their logits, nothing masked.
            served_tokens_N: int64, what vLLM's sampler drew for rows without a key.
            feedback: hidden [N, H] -> vectors that a latent step feeds.

        Returns:
            token ids int64 [N]; log-probs under the full distribution float32 [N] (0 where nothing is sampled or vLLM's
            sampler drew); bool [N], True where the token is forced.
        """
        slots, positions = self._to_device(rows.slots_N), self._to_device(rows.positions_N)
        state_N5 = self.state_SL[slots, positions]
        state = SpanState(self.config, self.steps_S[slots])
        state.in_span_N, state.end_is_due_N = state_N5[:, _IN_SPAN].bool(), state_N5[:, _END_IS_DUE].bool()
        state.num_fed_N, state.num_spans_N = state_N5[:, _NUM_FED].long(), state_N5[:, _NUM_SPANS].long()
        num_latents_N = state_N5[:, _NUM_LATENTS].long()

        planned_N = state.plan(logits_NV)
        is_latent_N, is_text_N = planned_N == PositionKind.LATENT, planned_N == PositionKind.TEXT
        tokens_N, full_N, drawn_N = self._draw(rows, logits_NV, banned_NV, served_tokens_N)
        tokens_N = torch.where(is_latent_N, self.config.latent_id, tokens_N)
        tokens_N = torch.where(planned_N == PositionKind.FORCED, self.config.end_id, tokens_N)
        full_N, drawn_N = full_N * is_text_N, drawn_N * is_text_N
        latents_NH = feedback(hidden_NH).to(self.latents_SCH.dtype)
        kinds_N = state.advance(planned_N, tokens_N, latents_NH, end_vector_H)

        latent_idx_N = num_latents_N.clamp(max=self.max_latents - 1)
        self.latents_SCH[slots, latent_idx_N] = torch.where(
            is_latent_N[:, None], latents_NH, self.latents_SCH[slots, latent_idx_N]
        )
        self.kinds_SL[slots, positions] = kinds_N.to(torch.int8)
        self.full_SL[slots, positions], self.drawn_SL[slots, positions] = full_N, drawn_N
        columns = (state.in_span_N, state.num_fed_N, state.num_spans_N, state.end_is_due_N, num_latents_N + is_latent_N)
        self.state_SL[slots, positions + 1] = torch.stack([column.to(torch.int32) for column in columns], -1)
        return tokens_N, full_N, ~is_text_N

    def _draw(self, rows: StepRows, logits_NV: Tensor, banned_NV: Tensor, served_tokens_N: Tensor):
        """Token ids and both log-probs, each [N]; rows draw together where their sampling is the same."""
        tokens_N = served_tokens_N.clone()
        full_N = torch.zeros(tokens_N.shape, device=self.device)
        drawn_N = torch.zeros_like(full_N)
        seeds_N = np.array([0 if r.sampling is None else r.sampling.seed for r in rows.requests], dtype=np.uint64)
        draws_N = uniforms(seeds_N, rows.positions_N)
        groups: dict[tuple[float, int, float], list[int]] = {}
        for row, request in enumerate(rows.requests):
            if request.sampling is not None:
                key = (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p)
                groups.setdefault(key, []).append(row)
        for (temperature, top_k, top_p), members in groups.items():
            if len(members) == len(rows.requests):
                return sample(logits_NV, draws_N, temperature, top_k, top_p, banned_NV)
            picked = self._to_device(np.array(members))
            banned_MV = banned_NV if banned_NV.shape[0] == 1 else banned_NV[picked]
            drawn = sample(logits_NV[picked], draws_N[members], temperature, top_k, top_p, banned_MV)
            for target, values in zip((tokens_N, full_N, drawn_N), drawn, strict=True):
                target[picked] = values.to(target.dtype)
        return tokens_N, full_N, drawn_N

    def note_chosen(self, request_ids: list[str], positions_N: np.ndarray) -> None:
        """Remembers how far each request has come."""
        for request_id, position in zip(request_ids, positions_N.tolist(), strict=True):
            self.num_chosen[request_id] = position + 1
