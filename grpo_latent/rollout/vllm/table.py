"""Remembers each request in the worker: kinds, latents, log-probs and state at every position.

A request has a *seat*, a row of the table, from its first step to its end. All that is remembered
is addressed by (seat, completion position), so every step is a function of what the scheduler says
it computes now. A request that was preempted, whose prompt is cut into chunks, or that loses a
token in flight simply asks for a position again: nothing has to be rolled back, and no sampled id
has to reach the CPU first.

Legend: S seats, L positions, C latents of a seat, T positions of one completion, N rows of a step,
M some of them, H hidden, V vocabulary, D columns of state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from grpo_latent.errors import RolloutError
from grpo_latent.latent.mechanisms import HiddenSource, Mechanism, RowStates
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.rollout.sampling import Bans, latent_uniforms, sample, seed_bits, uniforms
from grpo_latent.rollout.vllm.request import LatentRequest, RowSampling
from grpo_latent.rollout.vllm.seats import DeviceSeats, HostSeats
from grpo_latent.trajectory import PLACED_KINDS, PositionKind, fed_mask

# the last two columns of the state before each position; the mechanism's own stand in front
_NUM_LATENTS = -2  # latents so far
_KIND = -1  # the kind of the position before it
# way of drawing text, an index of `LatentTable.samplings`
_SERVED = 0  # vLLM's sampler


@dataclass(frozen=True)
class StepRows:
    """The rows whose next position is chosen in a step, known to the CPU before the forward ends.

    Attributes:
        rows_N: int64, row numbers in the batch.
        seats_N: int64.
        positions_N: int64, completion positions.
    """

    rows_N: np.ndarray
    seats_N: np.ndarray
    positions_N: np.ndarray


class LatentTable:
    """Seats the requests that have started and are not finished.

    It grows: preempted requests keep their seats, so there may be more of them than vLLM runs at a
    time.

    Args:
        treatment: what RL makes of latents; it decides what is fed and recorded at them.
        modules: has what the mechanism's `attach` makes.
        embed: token embeddings of ids.
        banned_ids: tokens that are never drawn.
        num_seats: to begin with.
        max_length: longest completion.
        max_latents: C, latents that a completion may hold.
        dtype: of latents.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        treatment: Treatment,
        modules: nn.Module,
        embed: Callable[[Tensor], Tensor],
        banned_ids: Iterable[int],
        num_seats: int,
        max_length: int,
        max_latents: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.mechanism = mechanism
        self.treatment = treatment
        self.modules = modules
        self.embed = embed
        self.bans_2 = Bans.build(banned_ids, mechanism.opening_ids, device)
        self.device = device
        self.max_latents = max_latents
        self.seats: dict[str, int] = {}
        self.keys: dict[str, str] = {}  # of the recorded requests, by request
        self.records: dict[str, dict[str, Tensor]] = {}
        # ways of drawing text met so far; vLLM's own sampler is the one at `_SERVED`
        self.samplings: list[RowSampling | None] = [None]
        self._free = list(range(num_seats))[::-1]
        self.host = HostSeats(
            np.zeros(num_seats, np.int64),
            np.zeros(num_seats, np.int64),
            np.zeros((num_seats, max_length)),
        )
        state_size = mechanism.state_size + 2
        self.on_device = DeviceSeats(
            torch.zeros(num_seats, dtype=torch.long, device=device),
            # one more than positions: before the first, and after the last
            torch.zeros(num_seats, max_length + 1, state_size, dtype=torch.int32, device=device),
            torch.zeros(num_seats, max_length, 2, device=device),
            torch.zeros(num_seats, max_latents + 1, hidden_size, dtype=dtype, device=device),
            torch.zeros(num_seats, max_latents + 1, treatment.aux_size, device=device),
            torch.zeros(num_seats, dtype=torch.long, device=device),
        )

    def add(self, request_id: str, request: LatentRequest) -> None:
        """Gives a request a seat.

        What the last one left there stays: state before position 0 is zero in every seat, since
        nothing is written there, and what lies behind is written before it is read.

        Raises:
            RolloutError: a key that another request holds.
        """
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
        seat = self.seats[request_id] = self._free.pop()
        if request.sampling not in self.samplings:
            self.samplings.append(request.sampling)
        self.host.sampling_S[seat] = self.samplings.index(request.sampling)
        self.host.num_chosen_S[seat] = 0
        if request.sampling is not None:
            # all at once: a step then only looks its numbers up. Text counts from the end of the
            # slots, which engine hf runs with the prompt
            num_slots = self.mechanism.num_slots(request.steps)
            positions_L = np.maximum(np.arange(self.host.draws_SL.shape[1]) - num_slots, 0)
            seed_1 = np.array([request.seed], np.uint64)
            self.host.draws_SL[seat] = uniforms(seed_1, positions_L).numpy()
            self.on_device.seeds_S[seat] = seed_bits([request.seed])[0]
        self.on_device.steps_S[seat] = request.steps or self.mechanism.steps

    def _grow(self) -> None:
        num_seats = self.on_device.steps_S.shape[0]
        self.host = self.host.doubled()
        self.on_device = self.on_device.doubled()
        self._free = list(range(num_seats, 2 * num_seats))[::-1]

    def finish(self, request_id: str) -> None:
        """Frees the seat; keeps the record if the request has a key."""
        seat = self.seats.pop(request_id, None)
        key = self.keys.pop(request_id, None)
        if seat is None:
            return
        self._free.append(seat)
        if key is None:
            return
        length = int(self.host.num_chosen_S[seat])
        state_TD = self.on_device.state_SLD[seat, : length + 1].to("cpu", torch.int64)
        num_latents = state_TD[-1, _NUM_LATENTS]
        log_probs_T2 = self.on_device.log_probs_SL2[seat, :length].to("cpu", copy=True)
        num_kept = min(int(num_latents), self.max_latents)
        self.records[key] = {
            "kinds": state_TD[1:, _KIND],
            "rollout_log_probs": log_probs_T2[:, 0],
            "sampling_log_probs": log_probs_T2[:, 1],
            "latents": self.on_device.latents_SCH[seat, :num_kept].to("cpu", copy=True),
            "latent_aux": self.on_device.aux_SCA[seat, :num_kept].to("cpu", copy=True),
            "num_latents": num_latents,
        }

    def pop(self, keys: list[str] | None) -> dict[str, dict[str, Tensor]]:
        """Hands out the records of finished requests by key, each once; all if `keys` is None.

        A request counts as finished if it is asked for: vLLM announces an end to the worker with
        its next step only.
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
        self, embeds: Tensor, rows_M: np.ndarray, seats_M: np.ndarray, positions_M: np.ndarray
    ) -> None:
        """Overwrites the input vectors at latent positions, in place.

        Args:
            embeds: [rows of the step, H].
            rows_M, seats_M, positions_M: int64, the step's inputs that are completion positions.
        """
        seats = self._to_device(seats_M)
        positions = self._to_device(positions_M)
        # as in a step that only decodes: a view instead of a copy
        is_range = rows_M[-1] - rows_M[0] + 1 == rows_M.size
        rows = slice(rows_M[0], rows_M[-1] + 1) if is_range else self._to_device(rows_M)
        # the state after a position says what stands there; which positions are latent, the device
        # alone knows, so all are rewritten, text with its own
        after_MD = self.on_device.state_SLD[seats, positions + 1]
        is_latent_M1 = fed_mask(after_MD[:, _KIND, None])
        latents_MH = self.on_device.latents_SCH[
            seats, (after_MD[:, _NUM_LATENTS] - 1).clamp(0, self.max_latents - 1)
        ]
        embeds[rows] = torch.where(is_latent_M1, latents_MH.to(embeds.dtype), embeds[rows])

    def _to_device(self, values: np.ndarray) -> Tensor:
        """A copy on the device; nothing waits for it."""
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def is_served(self, rows: StepRows) -> np.ndarray:
        """bool [N], rows whose text vLLM's sampler draws."""
        return self.host.sampling_S[rows.seats_N] == _SERVED

    def bans(self, rows: StepRows) -> Bans:
        """Tokens that no row may draw.

        Where a span may not open, the tokens that open one are among them.
        """
        seats, _, state_ND = self._state_of(rows)
        return self._bans(rows, seats, self._begin(seats, state_ND), state_ND[:, _NUM_LATENTS])

    def _state_of(self, rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
        """Seats and positions, int64 [N], and the state there, int64 [N, D]."""
        seats = self._to_device(rows.seats_N)
        positions = self._to_device(rows.positions_N)
        return seats, positions, self.on_device.state_SLD[seats, positions].long()

    def _begin(self, seats: Tensor, state_ND: Tensor) -> RowStates:
        """The mechanism's state of the rows, as it was before the positions that they choose."""
        state = self.mechanism.begin_at_prompt(self.modules, self.on_device.steps_S[seats])
        state.unpack(state_ND[:, :_NUM_LATENTS].unbind(-1))
        return state

    def _bans(
        self, rows: StepRows, seats: Tensor, state: RowStates, num_latents_N: Tensor
    ) -> Bans:
        is_served_N = self.is_served(rows)
        if not state.is_bounded and not is_served_N.any():
            return self.bans_2.rows(torch.zeros_like(seats[:1]))
        room_N = state.may_open_N
        if is_served_N.any():
            # a served request must not run out of room for its latents; a recorded one that does
            # is reported by `pop`
            has_room_N = num_latents_N + self.on_device.steps_S[seats] <= self.max_latents
            room_N = room_N & (has_room_N | ~self._to_device(is_served_N))
        return self.bans_2.rows((~room_N).long())

    def choose(
        self, rows: StepRows, hidden_NH: Tensor, logits_NV: Tensor, served_tokens_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decides and records the next position of every row.

        Args:
            hidden_NH: last hidden states after the final norm.
            logits_NV: their logits, nothing masked.
            served_tokens_N: int64, what vLLM's sampler drew for rows without a key.

        Returns:
            token ids int64 [N]; log-probs float32 [N] under the full distribution, 0 where nothing
            is sampled or vLLM's sampler drew; bool [N], False where a token was sampled.
        """
        seats, positions, state_ND = self._state_of(rows)
        state = self._begin(seats, state_ND)
        num_latents_N = state_ND[:, _NUM_LATENTS]
        bans = self._bans(rows, seats, state, num_latents_N)
        planned_N = state.plan(logits_NV if self.mechanism.reads_logits else None)
        is_text_N = planned_N == int(PositionKind.TEXT)
        # every row draws and makes a vector, and what is not wanted is overwritten: which rows are
        # in a span, the CPU does not know, and must not wait for
        tokens_N, log_probs_N2 = self._draw(rows, logits_NV, bans, served_tokens_N)
        for kind in PLACED_KINDS:
            is_placed_N = planned_N == int(kind)
            tokens_N = torch.where(is_placed_N, self.mechanism.placeholder_id(kind), tokens_N)
        log_probs_N2 = log_probs_N2 * is_text_N[:, None]
        source = HiddenSource(hidden_NH, lambda: logits_NV, self.embed)
        mean_NH = self.mechanism.make(self.modules, source)
        latents_NH, aux_NA, densities_N = self._draw_latents(rows, mean_NH, logits_NV)
        latents_NH = latents_NH.to(self.on_device.latents_SCH.dtype)
        kinds_N = state.advance(
            planned_N, tokens_N, latents_NH if self.mechanism.reads_latents else None
        )
        is_latent_N = fed_mask(kinds_N)

        # rows that hold no latent here, or have no room for one more, write to the seat's scratch;
        # the record then has fewer latents than its kinds say, which the front end reports
        scratch = self.max_latents
        place_N = torch.where(is_latent_N, num_latents_N, scratch).clamp(max=scratch)
        self.on_device.latents_SCH[seats, place_N] = latents_NH
        self.on_device.aux_SCA[seats, place_N] = aux_NA
        # an action's density stands where a token's log-prob would; a sampled start that is fed as
        # a vector keeps its own
        is_drawn_N = planned_N == int(PositionKind.LATENT)
        recorded_N2 = torch.where(is_drawn_N[:, None], densities_N[:, None], log_probs_N2)
        self.on_device.log_probs_SL2[seats, positions] = recorded_N2
        columns = (*state.pack(), num_latents_N + is_latent_N, kinds_N)
        self.on_device.state_SLD[seats, positions + 1] = torch.stack(columns, -1).to(torch.int32)
        return tokens_N, log_probs_N2[:, 0], ~is_text_N

    def _draw_latents(
        self, rows: StepRows, mean_NH: Tensor, logits_NV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors to feed [N, H], their aux [N, A] and log-densities [N], both 0 for means."""
        treatment = self.treatment
        aux_NA = torch.zeros(len(mean_NH), treatment.aux_size, device=self.device)
        densities_N = torch.zeros(len(mean_NH), device=self.device)
        # slots are fed as they are made, whatever the treatment
        if self.mechanism.has_slots or (treatment.feeds_mean and not treatment.is_action):
            return mean_NH, aux_NA, densities_N
        latents_NH = mean_NH.clone()  # as it is in served rows, which nobody trains on
        ways_N = self.host.sampling_S[rows.seats_N]
        for way in set(ways_N.tolist()) - {_SERVED}:
            temperature = self._sampling_of(way).temperature
            picked = self._to_device(np.nonzero(ways_N == way)[0])
            source = LatentSource(
                mean_NH[picked],
                functools.partial(_scaled, logits_NV[picked], temperature or 1.0),
            )
            num_uniforms = treatment.num_uniforms(mean_NH.shape[1]) if temperature else 0
            uniforms_MU = None
            if num_uniforms:
                seeds_M = self.on_device.seeds_S[self._to_device(rows.seats_N)[picked]]
                positions_M = self._to_device(rows.positions_N)[picked]
                uniforms_MU = latent_uniforms(seeds_M, positions_M, num_uniforms)
            drawn_MH, aux_MA = treatment.draw(source, uniforms_MU, self.embed)
            latents_NH[picked] = drawn_MH.to(latents_NH.dtype)
            if aux_MA is not None:
                aux_NA[picked] = aux_MA
            if treatment.is_action:
                densities_N[picked] = treatment.log_density(source, drawn_MH, aux_MA)
        return latents_NH, aux_NA, densities_N

    def _draw(
        self, rows: StepRows, logits_NV: Tensor, bans: Bans, served_tokens_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N], full and drawn log-probs [N, 2].

        Rows whose sampling is the same draw together, by the same function as engine hf's.
        """
        draws_N = torch.from_numpy(self.host.draws_SL[rows.seats_N, rows.positions_N])
        ways_N = self.host.sampling_S[rows.seats_N]
        ways = set(ways_N.tolist()) - {_SERVED}
        # as in a training run: one way for all, and no rows to pick
        if len(ways) == 1 and ways_N.all():
            tokens_N, *log_probs = self._draw_alike(ways.pop(), logits_NV, draws_N, bans)
            return tokens_N, torch.stack(log_probs, -1)
        tokens_N = served_tokens_N.clone()
        log_probs_N2 = torch.zeros(len(ways_N), 2, device=self.device)
        for way in ways:
            members = np.nonzero(ways_N == way)[0]
            picked = self._to_device(members)
            tokens_M, *log_probs = self._draw_alike(
                way, logits_NV[picked], draws_N[members], bans.rows(picked)
            )
            tokens_N[picked] = tokens_M
            log_probs_N2[picked] = torch.stack(log_probs, -1)
        return tokens_N, log_probs_N2

    def _draw_alike(
        self, way: int, logits_MV: Tensor, draws_M: Tensor, bans: Bans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, full and drawn log-probs, each [M], of rows with one sampling."""
        sampling = self._sampling_of(way)
        return sample(
            logits_MV, draws_M, sampling.temperature, sampling.top_k, sampling.top_p, bans
        )

    def _sampling_of(self, way: int) -> RowSampling:
        """How a way of drawing text draws."""
        sampling = self.samplings[way]
        assert sampling is not None  # way `_SERVED` draws nothing here
        return sampling

    def note_chosen(self, rows: StepRows) -> None:
        """Remembers how far each request has come."""
        self.host.num_chosen_S[rows.seats_N] = rows.positions_N + 1


def _scaled(logits_MV: Tensor, temperature: float) -> Tensor:
    """Logits as a treatment reads them."""
    return logits_MV.float() / temperature
