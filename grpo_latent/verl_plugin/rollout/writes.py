"""Writes to TransferQueue, of many prompts in one call.

A call costs its writer, the controller and the storage units milliseconds each, whatever it
carries, and the prompts of a wave begin together and mostly end together. So a write waits for
the one before it, and those that wait meanwhile go as one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict


@dataclass(frozen=True)
class _Write:
    keys: list[str]
    partition_id: str
    tags: list[dict[str, Any]]
    fields: list[dict[str, Any]] | None
    done: asyncio.Future[None]

    @property
    def kind(self) -> tuple[str, frozenset[str] | None]:
        """What writes of one call have in common."""
        names = None if self.fields is None else frozenset(self.fields[0])
        return self.partition_id, names


class Writer:
    """The writes of one event loop, in the order of their calls."""

    def __init__(self) -> None:
        self._waiting: list[_Write] = []
        self._task: asyncio.Task[None] | None = None

    async def put(
        self,
        keys: list[str],
        partition_id: str,
        tags: list[dict[str, Any]],
        fields: list[dict[str, Any]] | None = None,
    ) -> None:
        """Returns when the rows are in the queue.

        Args:
            tags: one a key.
            fields: one a key, all with the same names; None writes tags alone.

        Raises:
            whatever TransferQueue raises at the call that carried them.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(_Write(keys, partition_id, tags, fields, done))
        if self._task is None or self._task.done():
            # begins after all that is ready to run now, which may write too
            self._task = asyncio.ensure_future(self._write_all())
        await done

    async def _write_all(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            alike: defaultdict[Any, list[_Write]] = defaultdict(list)
            for write in taken:
                alike[write.kind].append(write)
            for writes in alike.values():
                error = await _error_of(writes)
                for write in writes:
                    if write.done.done():  # whoever waited was cancelled
                        continue
                    if error is None:
                        write.done.set_result(None)
                    else:
                        write.done.set_exception(error)


async def _error_of(writes: list[_Write]) -> Exception | None:
    """Makes one call for all of them; what it raised."""
    first = writes[0]
    fields = None
    try:
        if first.fields is not None:
            fields = list_of_dict_to_tensordict([row for w in writes for row in w.fields or ()])
        await tq.async_kv_batch_put(
            keys=[key for write in writes for key in write.keys],
            partition_id=first.partition_id,
            fields=fields,
            tags=[tag for write in writes for tag in write.tags],
        )
    except Exception as error:
        return error
    return None
