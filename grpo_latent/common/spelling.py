"""The fix of a misspelt name: the nearest one that there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_fix(line: str, name: object, names: Iterable[str]) -> str | None:
    """`line` with the name nearest to `name` in the place of {}; None where none is near.

    >>> nearest_fix("Write grpo-latent {}", "trian", ["train", "sft"])
    'Write grpo-latent train, the nearest spelling.'
    >>> nearest_fix("Set mode={}", 3, ["fast", "slow"])
    """
    near = difflib.get_close_matches(str(name), list(names), 1)
    return line.replace("{}", near[0]) + ", the nearest spelling." if near else None
