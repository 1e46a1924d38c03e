"""How a decoding step is run: over keys and values that grow, or in fixed shapes, captured.

    GrowingSteps   as many keys as there are; what a CPU does, where a shape costs nothing
    StaticSteps    (rows, room): keys in a room of fixed length, what is not filled hidden by the
                   bias; one CUDA graph a shape is captured and replayed, or none (`capture` None)

`GraphCapture` is the only code here that needs CUDA.

Legend: N rows, M of them that are kept, S positions so far, H hidden, C position components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.kv_cache import RolloutCache
from grpo_latent.models.kv_rooms import RoomCache, room_for

Step = Callable[[], Tensor]
DECODINGS = GROWING, STATIC, GRAPHS = "growing", "static", "graphs"
_ATTRIBUTE = "_grpo_latent_steps"


def steps_of(adapter: ModelAdapter, decoding: str | None) -> GrowingSteps | StaticSteps:
    """The steps of one model; static ones, which hold memory and graphs, are made once.

    Args:
        decoding: one of `DECODINGS`; None: `graphs` on CUDA, else `growing`.

    Raises:
        ConfigError: no such way, or graphs elsewhere than on CUDA.
    """
    is_cuda = adapter.device.type == "cuda"
    if decoding is None:
        decoding = GRAPHS if is_cuda else GROWING
    check_choice(decoding, DECODINGS, "decoding")
    if decoding == GROWING:
        return GrowingSteps(adapter)
    if decoding == GRAPHS and not is_cuda:
        raise ConfigError(
            "graphs are CUDA's",
            where="decoding",
            got=f"{decoding} on {adapter.device}",
            expected=f"{GROWING} or {STATIC}",
        )
    known = getattr(adapter.decoder, _ATTRIBUTE, {})
    if decoding not in known:
        capture = GraphCapture() if decoding == GRAPHS else None
        known = known | {decoding: StaticSteps(adapter, capture)}
        # object.__setattr__: no module state, which must not enter state_dict
        object.__setattr__(adapter.decoder, _ATTRIBUTE, known)
    return known[decoding]


class GrowingSteps:
    """Steps over a `RolloutCache`."""

    is_static = False

    def __init__(self, adapter: ModelAdapter):
        self._adapter = adapter

    def begin(self, prefilled: Cache, row_to_prompt_N: Tensor, capacity: int) -> None:
        """Goes on from prompts that were prefilled once each, up to `capacity` positions."""
        self._cache = RolloutCache(prefilled, row_to_prompt_N, capacity)

    def keep_rows(self, rows_M: Tensor) -> None:
        """Goes on with the rows `rows_M` only."""
        self._cache.keep_rows(rows_M)

    def run(self, embeds_NH: Tensor, bias_NS: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states [N, H] of one more position.

        Args:
            bias_NS: additive, over all positions with this one.
            position_ids: int64, [N, 1] or [C, N, 1].
        """
        return self._adapter.decode_hidden(
            embeds_NH, bias_NS[:, None, None], position_ids, self._cache
        )

    def end(self) -> None:
        """Lets go of the batch's keys and values."""
        del self._cache


@dataclass(frozen=True)
class StepInputs:
    """What a captured step reads, at addresses that stay."""

    embeds_NH: Tensor
    bias_NR: Tensor  # over the whole room
    position_ids: Tensor


class StaticSteps:
    """Steps in fixed shapes; implements what `GrowingSteps` does. Outlives its batches.

    Args:
        capture: makes of a step what runs it again with whatever its inputs then hold; None: the
            step itself is run each time.

    Attributes:
        num_captures: since the engine was made.
    """

    is_static = True

    def __init__(self, adapter: ModelAdapter, capture: Callable[[Step], Step] | None):
        self._adapter = adapter
        self._capture = capture
        self.num_captures = 0
        self.forget()

    def forget(self) -> None:
        """Gives up all memory, and what was captured over it."""
        self._cache: RoomCache | None = None
        self._addresses: tuple[int, ...] = ()
        self._num_moves = 0
        self._captured: dict[tuple[int, int], tuple[StepInputs, Step]] = {}
        self._shape = (0, 0)
        self._length = 0

    def begin(self, prefilled: Cache, row_to_prompt_N: Tensor, capacity: int) -> None:
        weights = tuple(p.data_ptr() for p in self._adapter.model.parameters())
        if self._cache is None or weights != self._addresses:
            # a graph reads weights where they were; after a move that is somebody else's memory
            self.forget()
            self._cache = RoomCache(len(prefilled.layers), self._adapter.device)
            self._addresses = weights
        self._length = prefilled.get_seq_length()
        room = room_for(self._length + 1)
        self._cache.fill(prefilled, row_to_prompt_N, room, room_for(capacity))
        self._enter(len(row_to_prompt_N), room)

    def keep_rows(self, rows_M: Tensor) -> None:
        self._lay_out(rows_M, self._shape[1])

    def run(self, embeds_NH: Tensor, bias_NS: Tensor, position_ids: Tensor) -> Tensor:
        length = bias_NS.shape[1]
        if length > self._shape[1]:
            rows_N = torch.arange(self._shape[0], device=embeds_NH.device)
            self._lay_out(rows_N, room_for(length))
        assert self._cache is not None, "after `begin`"
        self._cache.column_1.fill_(length - 1)
        known = self._captured.get(self._shape)
        if known is None:
            inputs = self._make_inputs(embeds_NH, position_ids)
            self._write(inputs, embeds_NH, bias_NS, position_ids)
            known = self._captured[self._shape] = (inputs, self._captured_step(inputs))
        else:
            self._write(known[0], embeds_NH, bias_NS, position_ids)
        self._length = length
        # a copy: the next step writes over it, and latents of this one are recorded later
        return known[1]().clone()

    def end(self) -> None:
        """Nothing: memory and graphs serve the next batch."""

    def _lay_out(self, rows_M: Tensor, room: int) -> None:
        assert self._cache is not None, "after `begin`"
        self._cache.keep(rows_M, self._length, room)
        self._enter(len(rows_M), room)

    def _enter(self, num_rows: int, room: int) -> None:
        """Goes on in another shape, whose room is hidden but for what each step shows of it."""
        assert self._cache is not None
        if self._cache.num_moves != self._num_moves:
            self._captured = {}
            self._num_moves = self._cache.num_moves
        self._shape = (num_rows, room)
        if self._shape in self._captured:
            bias_NR = self._captured[self._shape][0].bias_NR
            bias_NR.fill_(torch.finfo(bias_NR.dtype).min)

    def _make_inputs(self, embeds_NH: Tensor, position_ids: Tensor) -> StepInputs:
        with torch.inference_mode(False):  # they are written to outside of it, too
            bias_NR = torch.full(
                self._shape,
                torch.finfo(self._adapter.dtype).min,
                dtype=self._adapter.dtype,
                device=embeds_NH.device,
            )
            return StepInputs(
                torch.empty(embeds_NH.shape, dtype=embeds_NH.dtype, device=embeds_NH.device),
                bias_NR,
                torch.empty(position_ids.shape, dtype=torch.long, device=embeds_NH.device),
            )

    @staticmethod
    def _write(
        inputs: StepInputs, embeds_NH: Tensor, bias_NS: Tensor, position_ids: Tensor
    ) -> None:
        inputs.embeds_NH.copy_(embeds_NH)
        inputs.bias_NR[:, : bias_NS.shape[1]] = bias_NS
        inputs.position_ids.copy_(position_ids)

    def _captured_step(self, inputs: StepInputs) -> Step:
        cache = self._cache
        assert cache is not None

        def step() -> Tensor:
            return self._adapter.decode_hidden(
                inputs.embeds_NH, inputs.bias_NR[:, None, None], inputs.position_ids, cache
            )

        if self._capture is None:
            return step
        self.num_captures += 1
        return self._capture(step)


class GraphCapture:
    """Captures steps as CUDA graphs that share their memory.

    Sharing is safe because no two run at once, and each result is copied before the next.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # what libraries set up at their first call may not be captured
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads of a rollout server may use CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
