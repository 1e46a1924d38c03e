"""Errors that cross Ray: the typed cause for the driver, and what one actor may tell another."""

from __future__ import annotations

import pickle
from typing import Any

import ray

from grpo_latent.errors import GrpoLatentError, RolloutError, TrainingError


def get(reference: ray.ObjectRef, what: str, log: object) -> Any:
    """The value of a task.

    Args:
        what: the task in a word, for the message.
        log: where the traceback can be read.

    Raises:
        GrpoLatentError: the task raised it.
        TrainingError: its process died, or Ray lost it.
        RuntimeError: the task failed otherwise; the traceback is printed.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        print(error, flush=True)  # into the log: it has the worker's traceback
        cause = unwrapped(error)
        if isinstance(cause, GrpoLatentError):
            raise cause from None
        raise RuntimeError(f"{what} failed: {_last_line(error)}; see {log}") from None
    except ray.exceptions.RayError as error:  # no task raised it, so there is no traceback
        print(error, flush=True)
        raise TrainingError(
            f"{what} was lost", where="ray", got=first_line(error), fix=f"See {log}."
        ) from None


def unwrapped(error: BaseException) -> BaseException:
    """What was raised in the first place, under a wrapper of Ray for each actor that it passed.

    A wrapper is an instance of its cause's class, too, but says a traceback and has no `what`.
    """
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(
        error.cause, BaseException
    ):
        error = error.cause
    return error


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """The error's class and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def portable(error: BaseException) -> GrpoLatentError:
    """The error itself where another process can have it, else a `RolloutError` with its text.

    Only a `GrpoLatentError` that survives pickling passes. Ray fails a call whose argument is one
    of Ray's own errors, and the class of a foreign one may not be importable where it arrives.
    """
    error = unwrapped(error)
    if isinstance(error, GrpoLatentError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # whatever pickling it raises: its text is what can be told
            pass
    return RolloutError("a rollout failed", where="agent loop", got=first_line(error))
