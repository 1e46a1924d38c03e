"""How a step reaches the model: by a keyword of its own, through the module's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

SFT_KEYWORD = "sft_batch"


def route_sft_batches(model: nn.Module, compute: Callable[..., Any]) -> Callable[[], None]:
    """Makes `model(sft_batch=...)` call `compute(...)`, and returns what undoes it.

    Other calls go to the model as before.

    The loss must be computed inside the module's own forward: DistributedDataParallel and FSDP
    prepare and gather parameters there, and accelerate's autocast wraps it.
    """
    forward = model.forward
    own_forward = model.__dict__.get("forward")  # if somebody has patched it already

    def routed(*args, **kwargs):
        if SFT_KEYWORD in kwargs:
            return compute(kwargs.pop(SFT_KEYWORD), **kwargs)
        return forward(*args, **kwargs)

    model.forward = routed

    def undo() -> None:
        # accelerate keeps what it wrapped under a second name
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if own_forward is not None:
            model.forward = own_forward

    return undo
