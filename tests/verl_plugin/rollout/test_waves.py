"""The barrier in front of the engine: order, completeness, failures.

Engines here are plain functions.
"""

import asyncio
import random
import time

import pytest

from grpo_latent.errors import RolloutError
from grpo_latent.verl_plugin.rollout.waves import Ticket, Waves


def tickets(num_rows, wave_id="wave-0"):
    return [Ticket(wave_id, row, tuple(range(num_rows)), 0) for row in range(num_rows)]


async def gather(waves, joins):
    return await asyncio.gather(
        *(waves.join(ticket, payload) for ticket, payload in joins), return_exceptions=True
    )


def test_the_engine_sees_the_rows_in_order_whatever_the_arrival():
    seen = []

    def engine(payloads):
        seen.append(payloads)
        return [payload * 10 for payload in payloads]

    async def scenario():
        waves = Waves(engine, timeout_s=5, where="server 0")
        for attempt in range(5):
            joins = [(ticket, ticket.row) for ticket in tickets(6, f"wave-{attempt}")]
            random.Random(attempt).shuffle(joins)
            results = await gather(waves, joins)
            assert results == [payload * 10 for _, payload in joins]

    asyncio.run(scenario())
    assert seen == [[0, 1, 2, 3, 4, 5]] * 5


def test_waves_that_interleave_stay_apart():
    seen = []

    async def scenario():
        waves = Waves(
            lambda payloads: seen.append(payloads) or payloads, timeout_s=5, where="server 0"
        )
        joins = [(t, f"{t.wave_id}/{t.row}") for name in ("a", "b") for t in tickets(3, name)]
        random.Random(0).shuffle(joins)
        await gather(waves, joins)

    asyncio.run(scenario())
    assert sorted(seen) == [["a/0", "a/1", "a/2"], ["b/0", "b/1", "b/2"]]


def test_an_incomplete_wave_says_what_is_missing():
    async def scenario():
        waves = Waves(lambda payloads: payloads, timeout_s=0.05, where="server 1")
        return await gather(
            waves, [(ticket, 0) for ticket in tickets(5) if ticket.row not in (1, 4)]
        )

    errors = asyncio.run(scenario())
    assert len(errors) == 3 and all(isinstance(error, RolloutError) for error in errors)
    assert "server 1, wave wave-0" in str(
        errors[0]
    ) and "2 of 5 rows missing after 0.05 s: [1, 4]" in str(errors[0])


def test_a_slow_engine_is_no_incomplete_wave():
    async def scenario():
        def engine(payloads):
            time.sleep(0.3)
            return payloads

        waves = Waves(engine, timeout_s=0.1, where="server 0")
        return await gather(waves, [(ticket, ticket.row) for ticket in tickets(3)])

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_an_engine_error_reaches_every_request():
    def engine(payloads):
        raise ZeroDivisionError("engine")

    async def scenario():
        return await gather(Waves(engine, 5, "server 0"), [(ticket, 0) for ticket in tickets(3)])

    assert [repr(error) for error in asyncio.run(scenario())] == [
        "ZeroDivisionError('engine')"
    ] * 3


def test_a_failed_wave_ends_at_once_for_waiting_and_for_late_requests():
    async def scenario():
        waves = Waves(lambda payloads: payloads, timeout_s=60, where="server 0")
        first, second, _ = tickets(3)
        waiting = asyncio.ensure_future(waves.join(first, 0))
        await asyncio.sleep(0)
        waves.fail("wave-0", KeyError("row 2 has no image"))
        return await asyncio.gather(waiting, waves.join(second, 0), return_exceptions=True)

    assert [type(error) for error in asyncio.run(scenario())] == [KeyError, KeyError]


def test_a_row_that_comes_twice_or_belongs_elsewhere_is_refused():
    async def scenario(second):
        waves = Waves(lambda payloads: payloads, timeout_s=0.1, where="server 0")
        return await gather(waves, [(tickets(2)[0], 0), (second, 0)])

    for second in (
        tickets(2)[0],
        Ticket("wave-0", 7, (0, 1), 0),
        Ticket("wave-0", 1, (0, 1, 2), 0),
    ):
        _, error = asyncio.run(scenario(second))
        assert isinstance(error, RolloutError) and "does not fit its wave" in str(error)


@pytest.mark.parametrize("raised", [StopIteration, KeyError, SystemExit])
def test_whatever_an_engine_raises_ends_its_wave(raised):
    """asyncio cannot hand on a StopIteration: who awaited the engine's thread waited for ever."""

    def engine(payloads):
        raise raised("boom")

    async def scenario():
        waves = Waves(engine, timeout_s=5, where="server 0")
        joins = [(ticket, None) for ticket in tickets(2)]
        results = await asyncio.wait_for(gather(waves, joins), 5)
        expected = KeyError if raised is KeyError else RuntimeError
        assert [type(result) for result in results] == [expected] * 2

    asyncio.run(scenario())
