"""Errors of Ray's workers as the driver raises them: the typed cause, not Ray's wrapping of it."""

from __future__ import annotations

from typing import Any

import ray

from grpo_latent.errors import GrpoLatentError


def get(reference: ray.ObjectRef, what: str, log: object) -> Any:
    """The value of a task.

    Args:
        what: the task in a word, for the message.
        log: where the traceback can be read.

    Raises:
        GrpoLatentError: the task raised it.
        RuntimeError: the task failed otherwise; the traceback is printed.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        print(error, flush=True)  # into the log: it has the worker's traceback
        if isinstance(error.cause, GrpoLatentError):
            raise error.cause from None
        raise RuntimeError(f"{what} failed: {_last_line(error)}; see {log}") from None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
