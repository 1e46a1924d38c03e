"""Writes of many prompts go as one, and each hears of its own."""

import asyncio

import pytest

from grpo_latent.verl_plugin.rollout import writes
from grpo_latent.verl_plugin.rollout.writes import Writer


class Queue:
    """Takes calls; each lasts until `open` is set, and those with the key `bad` fail."""

    def __init__(self):
        self.calls, self.open = [], asyncio.Event()

    async def async_kv_batch_put(self, keys, partition_id, fields, tags):
        rows = None if fields is None else sorted(fields.keys())
        self.calls.append((keys, partition_id, rows, [tag["n"] for tag in tags]))
        await self.open.wait()
        if "bad" in keys:
            raise ConnectionError("refused")


def run(monkeypatch, scenario):
    async def all_of_it():
        queue = Queue()
        monkeypatch.setattr(writes, "tq", queue)
        await asyncio.wait_for(scenario(queue, Writer()), timeout=10)
        return queue.calls

    return asyncio.run(all_of_it())


def put(writer, key, names=None, partition="train"):
    fields = None if names is None else [dict.fromkeys(names, "x")]
    return asyncio.ensure_future(writer.put([key], partition, [{"n": key}], fields))


def test_what_begins_together_goes_together(monkeypatch):
    async def scenario(queue, writer):
        queue.open.set()
        await asyncio.gather(*[put(writer, key) for key in "abc"])

    assert run(monkeypatch, scenario) == [(["a", "b", "c"], "train", None, ["a", "b", "c"])]


def test_what_comes_during_a_call_goes_in_the_next(monkeypatch):
    async def scenario(queue, writer):
        first = put(writer, "a", ["x"])
        while not queue.calls:
            await asyncio.sleep(0)
        later = [put(writer, "b", ["x"]), put(writer, "c", ["x"])]
        await asyncio.sleep(0)
        assert len(queue.calls) == 1 and not first.done()
        queue.open.set()
        await asyncio.gather(first, *later)

    calls = run(monkeypatch, scenario)
    assert [keys for keys, *_ in calls] == [["a"], ["b", "c"]]


def test_unlike_rows_go_apart(monkeypatch):
    async def scenario(queue, writer):
        queue.open.set()
        await asyncio.gather(
            put(writer, "a", ["x"]),
            put(writer, "b", ["x", "y"]),
            put(writer, "c"),
            put(writer, "d", ["x"], partition="val"),
            put(writer, "e", ["x"]),
        )

    assert [
        (keys, partition, rows) for keys, partition, rows, _ in run(monkeypatch, scenario)
    ] == [
        (["a", "e"], "train", ["x"]),
        (["b"], "train", ["x", "y"]),
        (["c"], "train", None),
        (["d"], "val", ["x"]),
    ]


def test_an_error_reaches_those_of_its_call_and_no_others(monkeypatch):
    async def scenario(queue, writer):
        queue.open.set()
        found = await asyncio.gather(
            put(writer, "a"),
            put(writer, "bad"),
            put(writer, "c", ["x"]),
            return_exceptions=True,
        )
        assert [type(error).__name__ for error in found] == [
            "ConnectionError",
            "ConnectionError",
            "NoneType",
        ]
        await put(writer, "later")

    run(monkeypatch, scenario)


def test_a_cancelled_waiter_stops_nobody_else(monkeypatch):
    async def scenario(queue, writer):
        first, second = put(writer, "a"), put(writer, "b")
        while not queue.calls:
            await asyncio.sleep(0)
        first.cancel()
        queue.open.set()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first

    run(monkeypatch, scenario)
