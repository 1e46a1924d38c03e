"""What the worker remembers of each request: kinds, latents, log-probs and the mechanism's state
at every position.

All of it is addressed by (slot, completion position), so every step is a function of what the
scheduler says it computes now. A request that was preempted, whose prompt is cut into chunks, or
that loses a token in flight simply asks for a position again: nothing has to be rolled back, and
no sampled id has to reach the CPU first.

Letters: S slots, L positions, C latents a slot, N rows of a step, H hidden, V vocabulary, D
columns of state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from grpo_latent.errors import RolloutError
from grpo_latent.latent.mechanisms import HiddenSource, Mechanism, RowStates
from grpo_latent.rollout.sampling import sample, uniforms
from grpo_latent.rollout.vllm.middleware import STEPS_FIELD
from grpo_latent.trajectory import PositionKind

# the last two columns of the state before each position: latents so far, and the kind of the
# position before it; the mechanism's own stand in front
_NUM_LATENTS, _KIND = -2, -1
_MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class RowSampling:
    """How a recorded request draws: values of `rollout.protocol.SamplingParams`."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class LatentRequest:
    """What a request asks of the worker: `SamplingParams.extra_args["latent"]` in vLLM's terms.

    `key` names the record that `pop` returns; None (a served request) keeps none, and vLLM's
    sampler draws its text. Such a request may set `extra_args["latent_steps"]`, which `middleware`
    has checked for HTTP clients.
    """

    key: str | None = None
    steps: int | None = None
    sampling: RowSampling | None = None
    seed: int = 0

    @staticmethod
    def from_extra_args(extra_args: dict | None) -> LatentRequest:
        """Of a rollout only if all that a rollout sends is there: a worker must outlive what
        clients send.
        """
        extra_args = extra_args or {}
        values = extra_args.get("latent")
        names = ("temperature", "top_k", "top_p")
        if not isinstance(values, dict) or not {"key", "seed", *names} <= set(values):
            steps = extra_args.get(STEPS_FIELD)
            return LatentRequest(
                steps=min(max(steps, 1), _MAX_STEPS) if isinstance(steps, int) else None
            )
        return LatentRequest(
            values["key"],
            values.get("steps"),
            RowSampling(*(values[name] for name in names)),
            values["seed"],
        )


@dataclass(frozen=True)
class StepRows:
    """The rows whose next position is chosen in a step, known to the CPU before the forward ends.

    `rows_N` are row numbers in the batch, `slots_N` slots, `positions_N` completion positions;
    int64.
    """

    rows_N: np.ndarray
    slots_N: np.ndarray
    positions_N: np.ndarray


@dataclass
class _HostSlots:
    """What the scheduler's announcements say of each slot, on the CPU.

    Attributes:
        sampling_S: index of its way of drawing text.
        num_chosen_S: positions that it has chosen.
        draws_SL: the uniform number of each position.
    """

    sampling_S: np.ndarray
    num_chosen_S: np.ndarray
    draws_SL: np.ndarray

    def doubled(self) -> _HostSlots:
        """With as many slots once more, all zero."""
        return _HostSlots(
            *(np.concatenate([array, np.zeros_like(array)]) for array in vars(self).values())
        )


@dataclass
class _DeviceSlots:
    """What each slot has recorded, on the device.

    Attributes:
        steps_S: int64, latent steps a span.
        state_SLD: int32, the state before each position.
        log_probs_SL2: full and drawn.
        latents_SCH: recorded vectors; the last one of a slot is scratch.
    """

    steps_S: Tensor
    state_SLD: Tensor
    log_probs_SL2: Tensor
    latents_SCH: Tensor

    def doubled(self) -> _DeviceSlots:
        """With as many slots once more, all zero."""
        return _DeviceSlots(
            *(torch.cat([tensor, torch.zeros_like(tensor)]) for tensor in vars(self).values())
        )


class LatentTable:
    """Slots for the requests that have started and are not finished; grows when preempted requests
    hold them all.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        modules: nn.Module,
        embed: Callable[[Tensor], Tensor],
        banned_V: Tensor,
        num_slots: int,
        max_length: int,
        max_latents: int,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        self.mechanism, self.modules, self.embed = mechanism, modules, embed
        self.banned_V, self.device = banned_V, banned_V.device
        self.opening_ids = sorted(mechanism.opening_ids)
        self.max_latents = max_latents
        self.slots: dict[str, int] = {}
        self.keys: dict[str, str] = {}  # of the recorded requests, by request
        self.records: dict[str, dict[str, Tensor]] = {}
        self.samplings: list[RowSampling | None] = [
            None
        ]  # ways of drawing text met so far; None is vLLM's sampler
        self._free = list(range(num_slots))[::-1]
        self.host = _HostSlots(
            np.zeros(num_slots, np.int64),
            np.zeros(num_slots, np.int64),
            np.zeros((num_slots, max_length)),
        )
        options = {"device": self.device}
        state_size = mechanism.state_size + 2
        self.on_device = _DeviceSlots(
            torch.zeros(num_slots, dtype=torch.long, **options),
            torch.zeros(num_slots, max_length + 1, state_size, dtype=torch.int32, **options),
            torch.zeros(num_slots, max_length, 2, **options),
            torch.zeros(num_slots, max_latents + 1, hidden_size, dtype=dtype, **options),
        )

    def add(self, request_id: str, request: LatentRequest) -> None:
        if request.key is not None:
            if request.key in self.keys.values():
                raise RolloutError(
                    "two requests share one key",
                    where=request_id,
                    got=request.key,
                    expected="unique keys",
                )
            self.keys[request_id] = request.key
        if not self._free:
            self._grow()
        slot = self.slots[request_id] = self._free.pop()
        if request.sampling not in self.samplings:
            self.samplings.append(request.sampling)
        self.host.sampling_S[slot], self.host.num_chosen_S[slot] = (
            self.samplings.index(request.sampling),
            0,
        )
        if request.sampling is not None:
            seed_1, positions_L = (
                np.array([request.seed], np.uint64),
                np.arange(self.host.draws_SL.shape[1]),
            )
            self.host.draws_SL[slot] = uniforms(seed_1, positions_L).numpy()
        self.on_device.steps_S[slot] = request.steps or self.mechanism.steps

    def _grow(self) -> None:
        num_slots = self.on_device.steps_S.shape[0]
        self.host, self.on_device = self.host.doubled(), self.on_device.doubled()
        self._free = list(range(num_slots, 2 * num_slots))[::-1]

    def finish(self, request_id: str) -> None:
        """Frees the slot; keeps the record if the request has a key."""
        slot, key = self.slots.pop(request_id, None), self.keys.pop(request_id, None)
        if slot is None:
            return
        self._free.append(slot)
        if key is None:
            return
        length = int(self.host.num_chosen_S[slot])
        state_TD = self.on_device.state_SLD[slot, : length + 1].to("cpu", torch.int64)
        num_latents = state_TD[-1, _NUM_LATENTS]
        log_probs_T2 = self.on_device.log_probs_SL2[slot, :length].to("cpu", copy=True)
        self.records[key] = {
            "kinds": state_TD[1:, _KIND],
            "rollout_log_probs": log_probs_T2[:, 0],
            "sampling_log_probs": log_probs_T2[:, 1],
            "latents": self.on_device.latents_SCH[
                slot, : min(int(num_latents), self.max_latents)
            ].to("cpu", copy=True),
            "num_latents": num_latents,
        }

    def pop(self, keys: list[str] | None) -> dict[str, dict[str, Tensor]]:
        """Records of finished requests by key, all of them if `keys` is None; each is returned
        once.

        A finished request whose end vLLM has not announced to the worker yet (it does so with its
        next step) counts.
        """
        wanted = None if keys is None else set(keys)
        for request_id, key in list(self.keys.items()):
            if wanted is None or key in wanted:
                self.finish(request_id)
        return {
            key: self.records.pop(key)
            for key in list(self.records)
            if wanted is None or key in wanted
        }

    def feed(
        self, embeds: Tensor, rows_M: np.ndarray, slots_M: np.ndarray, positions_M: np.ndarray
    ) -> None:
        """Overwrites the input vectors at latent positions, in place.

        Args:
            embeds: [rows of the step, H].
            rows_M, slots_M, positions_M: int64, the step's inputs that are completion positions.
        """
        slots, positions = self._to_device(slots_M), self._to_device(positions_M)
        is_range = (
            rows_M[-1] - rows_M[0] + 1 == rows_M.size
        )  # as in a step that only decodes: a view instead of a copy
        rows = slice(rows_M[0], rows_M[-1] + 1) if is_range else self._to_device(rows_M)
        after_MD = self.on_device.state_SLD[slots, positions + 1]
        is_latent_M1 = after_MD[:, _KIND, None] == int(PositionKind.LATENT)
        latents_MH = self.on_device.latents_SCH[
            slots, (after_MD[:, _NUM_LATENTS] - 1).clamp(0, self.max_latents - 1)
        ]
        embeds[rows] = torch.where(is_latent_M1, latents_MH.to(embeds.dtype), embeds[rows])

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def is_served(self, rows: StepRows) -> np.ndarray:
        """bool [N], rows whose text vLLM's sampler draws."""
        return self.host.sampling_S[rows.slots_N] == 0

    def banned(self, rows: StepRows) -> Tensor:
        """bool [N, V] or [1, V], tokens that no row may draw: where a span may not open, `start`
        is one of them.
        """
        slots, _, state_ND = self._state_of(rows)
        return self._banned(rows, slots, self._begin(slots, state_ND), state_ND[:, _NUM_LATENTS])

    def _state_of(self, rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
        """Slots and positions, int64 [N], and the state there, int64 [N, D]."""
        slots, positions = self._to_device(rows.slots_N), self._to_device(rows.positions_N)
        return slots, positions, self.on_device.state_SLD[slots, positions].long()

    def _begin(self, slots: Tensor, state_ND: Tensor) -> RowStates:
        """The mechanism's state of the rows, as it was before the positions that they choose."""
        state = self.mechanism.begin(self.modules, self.on_device.steps_S[slots])
        state.unpack(state_ND[:, :_NUM_LATENTS].unbind(-1))
        return state

    def _banned(
        self, rows: StepRows, slots: Tensor, state: RowStates, num_latents_N: Tensor
    ) -> Tensor:
        is_served_N = self.is_served(rows)
        if not state.is_bounded and not is_served_N.any():
            return self.banned_V[None]
        room_N = state.may_open_N
        if is_served_N.any():
            # a served request must not run out of room for its latents; a recorded one that does
            # is reported by `pop`
            has_room_N = num_latents_N + self.on_device.steps_S[slots] <= self.max_latents
            room_N = room_N & (has_room_N | ~self._to_device(is_served_N))
        banned_NV = self.banned_V.repeat(len(slots), 1)
        banned_NV[:, self.opening_ids] |= ~room_N[:, None]
        return banned_NV

    def choose(
        self, rows: StepRows, hidden_NH: Tensor, logits_NV: Tensor, served_tokens_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decides and records the next position of every row.

        Args:
            hidden_NH: last hidden states after the final norm.
            logits_NV: their logits, nothing masked.
            served_tokens_N: int64, what vLLM's sampler drew for rows without a key.

        Returns:
            token ids int64 [N]; log-probs under the full distribution float32 [N] (0 where nothing
                is sampled or vLLM's
            sampler drew); bool [N], True where the token is forced.
        """
        slots, positions, state_ND = self._state_of(rows)
        state, num_latents_N = self._begin(slots, state_ND), state_ND[:, _NUM_LATENTS]
        banned_NV = self._banned(rows, slots, state, num_latents_N)
        planned_N = state.plan(logits_NV if self.mechanism.reads_logits else None)
        is_latent_N, is_text_N = (
            planned_N == int(PositionKind.LATENT),
            planned_N == int(PositionKind.TEXT),
        )
        tokens_N, log_probs_N2 = self._draw(rows, logits_NV, banned_NV, served_tokens_N)
        tokens_N = torch.where(
            is_latent_N, self.mechanism.placeholder_id(PositionKind.LATENT), tokens_N
        )
        is_forced_N = planned_N == int(PositionKind.FORCED)
        tokens_N = torch.where(
            is_forced_N, self.mechanism.placeholder_id(PositionKind.FORCED), tokens_N
        )
        log_probs_N2 = log_probs_N2 * is_text_N[:, None]
        source = HiddenSource(hidden_NH, lambda: logits_NV, self.embed)
        latents_NH = self.mechanism.make(self.modules, source).to(self.on_device.latents_SCH.dtype)
        kinds_N = state.advance(
            planned_N, tokens_N, latents_NH if self.mechanism.reads_latents else None
        )

        scratch = self.max_latents
        place_N = torch.where(is_latent_N, num_latents_N, scratch).clamp(max=scratch)
        self.on_device.latents_SCH[slots, place_N] = latents_NH
        self.on_device.log_probs_SL2[slots, positions] = log_probs_N2
        columns = (*state.pack(), num_latents_N + is_latent_N, kinds_N)
        self.on_device.state_SLD[slots, positions + 1] = torch.stack(columns, -1).to(torch.int32)
        return tokens_N, log_probs_N2[:, 0], ~is_text_N

    def _draw(
        self, rows: StepRows, logits_NV: Tensor, banned_NV: Tensor, served_tokens_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N] and full and drawn log-probs [N, 2]; rows draw together where their
        sampling is the same.
        """
        draws_N = torch.from_numpy(self.host.draws_SL[rows.slots_N, rows.positions_N])
        ways_N = self.host.sampling_S[rows.slots_N]
        ways = set(ways_N.tolist()) - {0}
        if len(ways) == 1 and ways_N.all():
            tokens_N, *log_probs = self._draw_alike(ways.pop(), logits_NV, draws_N, banned_NV)
            return tokens_N, torch.stack(log_probs, -1)
        tokens_N, log_probs_N2 = (
            served_tokens_N.clone(),
            torch.zeros(len(ways_N), 2, device=self.device),
        )
        for way in ways:
            members = np.nonzero(ways_N == way)[0]
            picked = self._to_device(members)
            banned_MV = banned_NV if banned_NV.shape[0] == 1 else banned_NV[picked]
            tokens_M, *log_probs = self._draw_alike(
                way, logits_NV[picked], draws_N[members], banned_MV
            )
            tokens_N[picked], log_probs_N2[picked] = tokens_M, torch.stack(log_probs, -1)
        return tokens_N, log_probs_N2

    def _draw_alike(self, way: int, logits_MV: Tensor, draws_M: Tensor, banned_MV: Tensor):
        sampling = self.samplings[way]
        return sample(
            logits_MV, draws_M, sampling.temperature, sampling.top_k, sampling.top_p, banned_MV
        )

    def note_chosen(self, rows: StepRows) -> None:
        """Remembers how far each request has come."""
        self.host.num_chosen_S[rows.slots_N] = rows.positions_N + 1
