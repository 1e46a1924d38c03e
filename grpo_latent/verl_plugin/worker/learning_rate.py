"""A learning rate that is changed on the way."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def scale_learning_rate(optimizer: Optimizer, schedule: LRScheduler, factor: float) -> None:
    """Multiplies the rates that an optimizer has and those that its schedule will give.

    The states of both hold them, so the factor survives saving and loading.
    """
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    schedule._last_lr = [rate * factor for rate in schedule._last_lr]
