"""Numbers stay finite: what is asked before a value can reach weights, a checkpoint or a server.

    recorded latents ─▶ log-probs, advantages ─▶ loss ─▶ gradient ─▶ norm ─▶ weights
         (inputs)          (at actions)      (a micro-batch) (elements) │  (before a save, a send)
                                                                        └ overflow: skipped

Each raises `TrainingError` before the optimizer has stepped, so that parameters and the last
checkpoint are what they were. A norm that overflows over finite elements changes nothing either:
that update is skipped and counted, `latent.max_skipped_updates` in a row end the run.

Legend: B trajectories, T positions of completions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import TrainingError

# what the trainer adds to a batch: non-tensors, and columns
STEP, KEYS, PARTITION = "latent_step", "trajectory_keys", "trajectory_partition"
NUMBERS, GROUPS = "trajectory_numbers", "group_numbers"
SEPARATOR = " "
MAX_SHOWN = 8
KEPT = "Parameters and the last checkpoint are as they were."


def step_of(data: TensorDict) -> str:
    """`step 12`, or `an update` where the trainer has not said it."""
    step = tu.get_non_tensor_data(data, STEP, None)
    return "an update" if step is None else f"step {step}"


def keys_of(data: TensorDict) -> list[str] | None:
    """The key of each row in TransferQueue; None where the trainer has not said them."""
    keys = tu.get_non_tensor_data(data, KEYS, None)
    if keys is None or NUMBERS not in data.keys():
        return None
    all_keys = keys.split(SEPARATOR)
    return [all_keys[int(number)] for number in data[NUMBERS].unbind()]


def rows_of(data: TensorDict, is_bad_B: Tensor | None = None) -> str:
    """The trajectories of a micro-batch, or the bad ones, by their keys or by their numbers."""
    num_rows = len(data["input_ids"].offsets()) - 1
    bad = range(num_rows) if is_bad_B is None else is_bad_B.nonzero()[:, 0].tolist()
    keys = keys_of(data)
    if keys is None:
        names = [f"row {row} of the micro-batch" for row in bad]
    else:
        names = [f"trajectory {keys[row]}" for row in bad]
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{', '.join(names[:MAX_SHOWN])}{more}"


def check_at(data: TensorDict, values: Mapping[str, Tensor], mask_BT: Tensor) -> None:
    """Checks values [B, T] where `mask_BT` is True; elsewhere they may be anything.

    Raises:
        TrainingError: the first of them that is not finite, with step and trajectories.
    """
    bad = {name: mask_BT & ~torch.isfinite(value) for name, value in values.items()}
    if not bool(torch.stack([bad_BT.any() for bad_BT in bad.values()]).any()):
        return
    name, bad_BT = next((name, bad_BT) for name, bad_BT in bad.items() if bool(bad_BT.any()))
    got = values[name][bad_BT].flatten().tolist()
    raise TrainingError(
        f"{name}: not finite",
        where=f"{step_of(data)}, {rows_of(data, bad_BT.any(-1))}",
        got=f"{got[:MAX_SHOWN]} at {len(got)} of {int(mask_BT.sum())} positions",
        expected="finite numbers",
        fix=f"{KEPT} Weights or recorded vectors have overflowed, or a term of the loss has: "
        "lower actor_rollout_ref.actor.optim.lr, or train in another dtype.",
    )


def check_loss(data: TensorDict, terms: Mapping[str, Tensor | float]) -> None:
    """Raises `TrainingError` at the first term of a micro-batch's loss that is not finite."""
    values = {name: torch.as_tensor(value).detach() for name, value in terms.items()}
    if bool(torch.stack([torch.isfinite(v).all().cpu() for v in values.values()]).all()):
        return
    name = next(name for name, value in values.items() if not bool(torch.isfinite(value).all()))
    raise TrainingError(
        f"{name}: not finite",
        where=f"{step_of(data)}, {rows_of(data)}",
        got=float(values[name].float().sum()),
        expected="a finite loss",
        fix=f"{KEPT} Look at the coefficients of that term, and at advantages and log-probs of "
        "these trajectories.",
    )


def check_rows(data: TensorDict, name: str, rows: Iterable[Tensor]) -> None:
    """Raises `TrainingError` at a row whose tensor, whatever its shape, is not finite."""
    is_bad_B = torch.stack([~torch.isfinite(row).all() for row in rows])
    if not bool(is_bad_B.any()):
        return
    raise TrainingError(
        f"{name}: not finite",
        where=f"{step_of(data)}, {rows_of(data, is_bad_B)}",
        got=f"{int(is_bad_B.sum())} of {len(is_bad_B)} trajectories",
        expected="finite numbers",
        fix=f"{KEPT} The rollout has recorded them: look at the weights that it ran on.",
    )


def check_gradients(module: nn.Module, where: str, group: Any = None) -> None:
    """Raises `TrainingError` on every rank where some rank's gradient has a NaN or an infinity."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    _check_named(named, where, "gradient", group, f"{KEPT} The update was not made.")


def check_weights(module: nn.Module, where: str, group: Any = None) -> None:
    """Raises `TrainingError` on every rank where some rank's weights are not finite."""
    _check_named(
        list(module.named_parameters()),
        where,
        "weight",
        group,
        "Nothing was written or sent: resume from the last checkpoint, with a lower "
        "actor_rollout_ref.actor.optim.lr.",
    )


def _check_named(
    named: list[tuple[str, Tensor]], where: str, kind: str, group: Any, fix: str
) -> None:
    local = [(name, _local(tensor)) for name, tensor in named]
    if not local:
        return
    flags = torch.stack([torch.isfinite(tensor).all() for _, tensor in local])
    bad = (~flags.all()).int()
    if dist.is_initialized():  # one rank alone would leave the others in their next collective
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    if not int(bad):
        return
    names = [name for (name, _), fine in zip(local, flags.tolist(), strict=True) if not fine]
    shown = ", ".join(names[:MAX_SHOWN]) or "shards of another rank"
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    raise TrainingError(
        f"{kind} not finite",
        where=where,
        got=f"{shown}{more}",
        expected=f"finite {kind}s in all of {len(local)} parameters",
        fix=fix,
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class SkippedUpdates:
    """Counts updates that were not made, and ends the run where they come in a row.

    Args:
        allowed: in a row.
    """

    def __init__(self, allowed: int = 3):
        self.allowed = allowed
        self.in_a_row = 0

    def after(self, grad_norm: float, where: str) -> bool:
        """Whether verl has skipped the update of this norm.

        Raises:
            TrainingError: that was one in a row too many.
        """
        is_skipped = not math.isfinite(grad_norm)
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if self.in_a_row < self.allowed or not is_skipped:
            return is_skipped
        raise TrainingError(
            "updates are skipped one after another",
            where=where,
            got=f"{self.in_a_row} in a row, the last with gradient norm {grad_norm}",
            expected=f"fewer than latent.max_skipped_updates={self.allowed}",
            fix=f"{KEPT} The gradient overflows: lower loss coefficients, or train in another "
            "dtype.",
        )
