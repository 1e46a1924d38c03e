"""An exception of a reward function in one line: what it is, and where in the user's file."""

from __future__ import annotations

import os
import traceback

MAX_TEXT_CHARS = 120  # type and place stand beside it in a message


def in_one_line(error: BaseException, reward_file: str | None) -> str:
    """Says type, text, and the line of the reward file, or of a file beside it, that it came by.

    >>> in_one_line(ValueError("no\\nnumber"), None)
    'ValueError: no number'

    Args:
        reward_file: None where it is not known: the place is then where the exception was raised.
            Where no line of it had part in it, no place is named.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    if reward_file is not None:
        folder = _folder(reward_file)
        frames = [frame for frame in frames if _folder(frame.filename) == folder]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_text(error)}{place}"


def _folder(file: str) -> str:
    return os.path.dirname(os.path.abspath(file))


def _text(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # its class is the user's
        return "its text cannot be had"
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 1]}…"
