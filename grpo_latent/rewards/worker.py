"""The process that runs foreign reward functions, so that it can be killed.

It is started as `python -m grpo_latent.rewards.worker FD`.

Protocol over the socket FD, pickled both ways: the parent sends the function specs; the child
answers None, or the error that loading them raised. Then, repeatedly: the parent sends a list of
calls, the child one `Outcome` for each, in order.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import faulthandler
import functools
import inspect
import io
import os
import pickle
import sys
import time
from multiprocessing.connection import Connection

from grpo_latent.errors import GrpoLatentError
from grpo_latent.rewards.exceptions import in_one_line
from grpo_latent.rewards.functions import FunctionSpec, load_function, source_file
from grpo_latent.rewards.outcome import Outcome, normalise

ORPHAN_GRACE_S = 5


def main(fd: int) -> None:
    connection = Connection(fd)
    os.set_inheritable(fd, False)
    # what functions print must not be lost in a closed pipe or pretend to be the parent's output
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # a line at a time: the parent ends this process by SIGKILL
    assert isinstance(sys.stdout, io.TextIOWrapper), "of a process of its own"
    sys.stdout.reconfigure(line_buffering=True)
    try:
        specs, timeout_s = pickle.loads(connection.recv_bytes())
        functions = [load_function(spec) for spec in specs]
    except GrpoLatentError as error:
        connection.send_bytes(pickle.dumps(error))
        return
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            calls = pickle.loads(connection.recv_bytes())
        except EOFError:  # the parent is gone
            return
        for function_idx, arguments, probe in calls:
            # The parent kills at `timeout_s`. If it has died itself, this C thread ends the
            # process, GIL or not.
            faulthandler.dump_traceback_later(timeout_s + ORPHAN_GRACE_S, exit=True)
            outcome = call(functions[function_idx], arguments, specs[function_idx], probe)
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(pickle.dumps(outcome))


def call(function, arguments: dict, spec: FunctionSpec, probe: bool = False) -> Outcome:
    """Calls a function on its own copy of the arguments; whatever happens becomes an `Outcome`."""
    # several functions see the same row: none may edit it for the next
    arguments = copy.deepcopy(arguments)
    before = pickle.dumps(arguments["extra_info"]) if probe else b""
    start = time.perf_counter()
    try:
        result = function(**arguments, **spec.kwargs)
        if inspect.isawaitable(result):
            result = _event_loop().run(_await(result))
        outcome = normalise(result, time.perf_counter() - start)
    # foreign code may raise anything, SystemExit too; none of it may end the worker
    except BaseException as error:
        detail = in_one_line(error, source_file(spec))
        return Outcome("exception", detail=detail, seconds=time.perf_counter() - start)
    if probe:
        mutated = pickle.dumps(arguments["extra_info"]) != before
        outcome = dataclasses.replace(outcome, mutated=mutated)
    return outcome


@functools.cache
def _event_loop() -> asyncio.Runner:
    """Gives one event loop to all calls.

    Asynchronous clients that a function keeps are bound to the loop they were made in.
    """
    return asyncio.Runner()


async def _await(awaitable):
    return await awaitable


if __name__ == "__main__":
    main(int(sys.argv[1]))
