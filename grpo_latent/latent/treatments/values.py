"""What several treatments ask of a value."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float(values: Tensor) -> Tensor:
    """float64 as it is, all else as float32.

    A log-density is a sum over H, which bf16 would round to whole nats.
    """
    return values if values.dtype == torch.float64 else values.float()


def is_number(value: object) -> bool:
    """Whether a setting is an int or a float; a YAML `true`, which Python counts as 1, is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
