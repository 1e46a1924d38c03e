"""The gate between rollout and update: the policy that is trained must be the one that acted.

    rollout_log_probs (engine) - old_log_probs (replay), at actions ──ReplayGap──▶ metrics or error

A bound of null lets finite gaps pass, as bf16 makes them; NaN and infinities never do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent import recorded_fields
from grpo_latent.errors import ReplayGapError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.step_rows import StepRows
from grpo_latent.verl_plugin.worker.treated_forward import STATE_ERRORS

KINDS = recorded_fields.field("kinds").column


def replay_columns(options: LatentOptions) -> list[str]:
    """What `check_replay` reads."""
    columns = ["rollout_log_probs", "old_log_probs", "response_mask"]
    columns += [KINDS] if options.act_kinds else []
    return columns + ([STATE_ERRORS] if options.treatment.feeds_mean else [])


def check_replay(rows: StepRows, options: LatentOptions, step: int) -> dict[str, float]:
    """Metrics of the gap, over text and, where latents act, over those.

    Raises:
        ReplayGapError: a gap is above its bound, or not finite.
    """
    rollout, old, mask = (
        rows.tensors(name) for name in ("rollout_log_probs", "old_log_probs", "response_mask")
    )
    gap = replay_gap(rollout, old, mask)
    metrics = {"latent/replay_logp_gap_max": gap.maximum, "latent/replay_logp_gap_mean": gap.mean}
    if options.treatment.feeds_mean:
        metrics |= state_error_metrics(rows.tensors(STATE_ERRORS))
    gap.check(options.replay_logp_gap_bound, step, f"trajectory {rows.keys[gap.row]}")
    if options.act_kinds:
        gap = replay_gap(rollout, old, act_masks(rows.tensors(KINDS), mask, options.act_kinds))
        metrics["latent/replay_density_gap_max"] = gap.maximum
        describe = f"latent log-density, trajectory {rows.keys[gap.row]}"
        gap.check(options.density_gap_bound, step, describe, "latent.treatment.density_gap_bound")
    return metrics


@dataclass(frozen=True)
class ReplayGap:
    """Differences of rollout and replayed log-probs over the actions of a batch, in nats."""

    maximum: float
    mean: float
    row: int
    position: int

    def check(
        self,
        bound: float | None,
        step: int,
        describe: str,
        key: str = "latent.replay_logp_gap_bound",
    ) -> None:
        """Raises `ReplayGapError` above `bound`, and always where a log-prob is not finite."""
        where = f"step {step}, {describe}, completion position {self.position}"
        if not math.isfinite(self.maximum):
            raise ReplayGapError(
                "a log-prob of an action is not finite",
                where=where,
                got=f"{self.maximum:.3g} nats between rollout and replay",
                expected="finite log-probs from both",
                fix="NaN or infinities stand in the weights or the recorded vectors, and "
                "an update would spread them.",
            )
        if bound is None or self.maximum <= bound:
            return
        raise ReplayGapError(
            "replayed log-probs differ from the rollout's",
            where=where,
            got=f"{self.maximum:.3g} nats",
            expected=f"<= {key}={bound:g}",
            fix="The trained policy is not the one that acted. If the gap is rounding "
            "(bf16), raise the bound.",
        )


def replay_gap(
    rollout_rows: Iterable[Tensor], old_rows: Iterable[Tensor], mask_rows: Iterable[Tensor]
) -> ReplayGap:
    """The gap over all rows, each a completion [T], `mask` nonzero at actions; 0 without any."""
    total, count, worst = 0.0, 0, ReplayGap(0.0, 0.0, 0, 0)
    for row, (rollout, old, mask) in enumerate(
        zip(rollout_rows, old_rows, mask_rows, strict=True)
    ):
        gaps = (rollout.double() - old.double()).abs().masked_fill(mask == 0, 0.0)
        # a NaN is the worst gap of all; comparisons with it are False
        gaps = gaps.nan_to_num(nan=torch.inf, posinf=torch.inf)
        total, count = total + float(gaps.sum()), count + int((mask != 0).sum())
        if gaps.numel() and float(gaps.max()) > worst.maximum:
            worst = ReplayGap(float(gaps.max()), 0.0, row, int(gaps.argmax()))
    return ReplayGap(worst.maximum, total / max(count, 1), worst.row, worst.position)


def state_error_metrics(error_rows: Iterable[Tensor]) -> dict[str, float]:
    """How far the old policy's replay makes latents other than recorded, the worst of the batch.

    Args:
        error_rows: float [m, 2] a trajectory, `treated_forward.state_errors` of its latents.
    """
    errors_M2 = torch.cat([torch.zeros(1, 2), *(row.cpu() for row in error_rows)]).nan_to_num(
        nan=torch.inf
    )
    absolute, relative = errors_M2.amax(0).tolist()
    return {"latent/replay_state_err": absolute, "latent/replay_state_err_rel": relative}


def act_masks(
    kinds_rows: Iterable[Tensor], mask_rows: Iterable[Tensor], kinds: frozenset[int]
) -> list[Tensor]:
    """bool [T] of each completion, True at positions of `kinds`.

    Args:
        kinds_rows: of prompt and completion, [L]; `mask_rows` give the completions' lengths.
    """
    wanted = torch.tensor(sorted(kinds))
    pairs = zip(kinds_rows, mask_rows, strict=True)
    return [torch.isin(row[len(row) - len(mask) :], wanted.to(row.device)) for row, mask in pairs]
