"""A child process that runs reward functions, seen from the parent.

It is sent calls, each is waited for, and what hangs is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from grpo_latent.errors import DataError, GrpoLatentError, RewardError
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import Outcome

START_TIMEOUT_S = 180.0  # reward files may import torch, on a cold disk
EXIT_GRACE_S = 1.0  # between a closed connection and the exit code of a dying process


class Call(NamedTuple):
    """One call of a function of the process.

    Attributes:
        function_idx: of the spec list that the process was started with.
        arguments: data_source, solution_str, ground_truth, extra_info.
        probe: also report whether the call changed its `extra_info`.
    """

    function_idx: int
    arguments: dict
    probe: bool = False


class RewardProcess:
    """One persistent child. Not thread-safe: one caller at a time.

    A fresh interpreter and not a fork: the parent holds CUDA, Ray and threads, which a fork would
    copy half of. It is started by command line and not by `multiprocessing`, which would run the
    parent's main script again.

    Args:
        specs: functions to load; loading them is done when the constructor returns.
        timeout_s: for each single call.

    Raises:
        ConfigError: a function cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[FunctionSpec],
        timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
    ):
        self.specs = list(specs)
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.num_starts = 0
        self._child: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._start()

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Runs the calls; one outcome a call, in order.

        A call that hangs or kills the process costs a restart, not the calls after it.

        Raises:
            DataError: a call's arguments cannot be pickled.
        """
        outcomes: list[Outcome] = []
        while len(outcomes) < len(calls):
            connection = self._connection or self._start()
            self._send(connection, calls[len(outcomes) :])
            outcomes += self._receive(connection, len(calls) - len(outcomes))
        return outcomes

    def close(self) -> None:
        """Kills the child and its children. Safe to call again."""
        self._end(grace_s=0.0)

    def _end(self, grace_s: float) -> int | None:
        """Gives the child `grace_s` to end by itself, kills its group; returns its exit code."""
        # taken at once: closing again finds nothing to end
        child, self._child = self._child, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if child is None:
            return None
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        # also where the child has ended: functions may have started processes that live on
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return child.wait()

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "grpo_latent.rewards.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            # a group of its own: killing it also kills what functions have started
            start_new_session=True,
        )
        theirs.close()
        connection = Connection(ours.detach())
        self._connection = connection
        self.num_starts += 1
        connection.send_bytes(pickle.dumps((self.specs, self.timeout_s)))
        try:
            error: GrpoLatentError | None = pickle.loads(_read(connection, self.start_timeout_s))
        except (TimeoutError, EOFError, OSError) as failure:
            timed_out = isinstance(failure, TimeoutError)
            exit_code = self._end(0.0 if timed_out else EXIT_GRACE_S)
            raise RewardError(
                "the reward process did not start",
                kind="timeout" if timed_out else "exception",
                where=", ".join(spec.path for spec in self.specs),
                got=f"nothing for {self.start_timeout_s:g} s"
                if timed_out
                else f"exit code {exit_code} during import",
                expected="files that import within that time",
                fix="Import the reward file in a Python shell and look at what it does at import.",
            ) from failure
        if error is not None:
            self.close()
            raise error
        return connection

    def _send(self, connection: Connection, calls: Sequence[Call]) -> None:
        try:
            message = pickle.dumps([tuple(call) for call in calls])
        except Exception as error:
            raise DataError(
                "a row cannot be sent to the reward process",
                where="extra_info or ground_truth",
                got=f"{type(error).__name__}: {error}",
                expected="plain values: numbers, texts, lists, dicts",
            ) from error
        try:
            connection.send_bytes(message)
        except OSError:
            pass  # the child has died; reading its answer says so and how

    def _receive(self, connection: Connection, num_calls: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while len(outcomes) < num_calls:
            try:
                outcomes.append(pickle.loads(_read(connection, self.timeout_s)))
            except TimeoutError:
                self.close()
                detail = f"no result after {self.timeout_s:g} s"
                return [*outcomes, Outcome("timeout", detail=detail, seconds=self.timeout_s)]
            except (EOFError, OSError):
                detail = f"the process died with exit code {self._end(EXIT_GRACE_S)}"
                return [*outcomes, Outcome("exception", detail=detail)]
        return outcomes

    def __del__(self):
        try:
            self.close()
        except Exception:  # at interpreter shutdown modules may be gone already
            pass


def _read(connection: Connection, timeout_s: float) -> bytes:
    if not connection.poll(timeout_s):
        raise TimeoutError
    return connection.recv_bytes()
