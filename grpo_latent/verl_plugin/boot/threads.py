"""Functions that run in a thread while a coroutine waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")


async def in_thread(
    executor: Executor | None,
    function: Callable[Args, Result],
    *args: Args.args,
    **kwargs: Args.kwargs,
) -> Result:
    """What `function` returns, run by `executor`, or by asyncio's own threads where that is None.

    A StopIteration comes as a RuntimeError, since asyncio cannot hand one on and whoever waits
    would wait for ever; so does a SystemExit, which would end the event loop and all that waits
    in it.
    """

    def call() -> Result:
        try:
            return function(*args, **kwargs)
        except (StopIteration, SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError(f"{function} raised {error!r}") from error

    return await asyncio.get_running_loop().run_in_executor(executor, call)
