"""A barrier in front of a rollout engine, so that what it batches never depends on timing.

    requests of a wave, in any order ──▶ complete? ──▶ sorted by row ──▶ engine ──▶ a result each

A *wave* is what the trainer dispatches at once: the prompts of one training step or one validation
batch. Every request carries the rows that its wave will bring to this server; the engine runs when
the last of them is here. Rounding then depends on the wave alone, and a resumed run repeats an
uninterrupted one to the bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from grpo_latent.errors import RolloutError
from grpo_latent.verl_plugin.boot.threads import in_thread

NUM_NAMED = 8  # rows that a message lists
# of a server at a time. Every request of a wave is a call that waits at the barrier: with Ray's
# own limit of 1000 a larger wave, such as the rows of a validation, would never become complete
MAX_CALLS = 1_000_000


@dataclass(frozen=True)
class Ticket:
    """Where a request belongs.

    Attributes:
        wave_id: unique to the dispatch.
        row: position of the prompt in the dispatched batch.
        rows: all rows that the wave brings to the same server, sorted.
        replica: index of that server.
    """

    wave_id: str
    row: int
    rows: tuple[int, ...]
    replica: int


@dataclass
class _Wave:
    rows: tuple[int, ...]
    payloads: dict[int, Any] = field(default_factory=dict)
    futures: dict[int, asyncio.Future] = field(default_factory=dict)


class Waves:
    """The open waves of one server. All methods belong to one event loop.

    Args:
        run: gets the payloads of a complete wave in the order of their rows, returns one result
            each. Runs in a thread of its own, one wave at a time.
        timeout_s: how long an incomplete wave may stay so.
    """

    def __init__(
        self, run: Callable[[list[Any]], list[Any]], timeout_s: float, where: str, initializer=None
    ):
        self._run, self._timeout_s, self._where = run, timeout_s, where
        self._waves: dict[str, _Wave] = {}
        self._failed: dict[str, BaseException] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, initializer=initializer)

    async def join(self, ticket: Ticket, payload: Any) -> Any:
        """The result of this request, once its wave has run.

        Raises:
            RolloutError: the wave stayed incomplete, a row came twice or is not of the wave; or
                what `fail` was given.
        """
        if ticket.wave_id in self._failed:
            raise self._failed[ticket.wave_id]
        wave = self._waves.setdefault(ticket.wave_id, _Wave(ticket.rows))
        if ticket.row not in wave.rows or ticket.row in wave.payloads or ticket.rows != wave.rows:
            raise RolloutError(
                "a request does not fit its wave",
                where=f"{self._where}, wave {ticket.wave_id}",
                got=f"row {ticket.row}, arrived so far {sorted(wave.payloads)[:NUM_NAMED]}",
                expected="each row of the wave once",
            )
        loop = asyncio.get_running_loop()
        wave.payloads[ticket.row] = payload
        future = wave.futures[ticket.row] = loop.create_future()
        if len(wave.payloads) == len(wave.rows):
            loop.create_task(self._run_wave(ticket.wave_id))
            return await future
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._timeout_s)
        except TimeoutError:
            # complete meanwhile: the engine is running, however long it takes
            if ticket.wave_id not in self._waves:
                return await future
            missing = sorted(set(wave.rows) - set(wave.payloads))
            raise RolloutError(
                "a rollout wave did not become complete",
                where=f"{self._where}, wave {ticket.wave_id}",
                got=f"{len(missing)} of {len(wave.rows)} rows missing after "
                f"{self._timeout_s:g} s: {missing[:NUM_NAMED]}",
                expected="a request for every row",
                fix="See the log of the agent loop workers for these rows; "
                "latent.rollout_timeout_s sets the time.",
            ) from None

    def fail(self, wave_id: str, error: BaseException) -> None:
        """Ends a wave that cannot become complete.

        Whoever waits, or comes later, gets `error` at once.
        """
        self._failed[wave_id] = error
        wave = self._waves.pop(wave_id, None)
        for future in wave.futures.values() if wave is not None else ():
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: a waiter that has left is no reason for a warning

    async def run_alone(self, function: Callable, *args) -> Any:
        """Runs `function` in the engine's thread, so that no wave runs meanwhile."""
        return await in_thread(self._executor, function, *args)

    async def _run_wave(self, wave_id: str) -> None:
        wave = self._waves.pop(wave_id)
        ordered = [wave.payloads[row] for row in wave.rows]
        try:
            results = await self.run_alone(self._run, ordered)
        except Exception as error:
            results = [error] * len(ordered)
        for row, result in zip(wave.rows, results, strict=True):
            future = wave.futures[row]
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
