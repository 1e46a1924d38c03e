"""How checks compare, and how they say what they found."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_latent.errors import ConformanceError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.testing.cases import TEMPERATURE, Case
from grpo_latent.trajectory import PositionKind, Trajectory

REPLAY_BOUND = 1e-4  # nats: one forward over a whole sequence against one a token
# nats: the same row beside other rows. 1e-5 held with AVX-512 kernels and not with the AVX2 ones of an
# AMD EPYC, where rounding alone exceeds it
ROW_BOUND = 1e-4


def require(
    holds: bool, what: str, got: object = None, expected: str | None = None, fix: str | None = None
) -> None:
    """Raises `ConformanceError` unless `holds`; the runner adds which check it was."""
    if not holds:
        raise ConformanceError(what, got=got, expected=expected, fix=fix)


def rows_of(
    values_BT: Tensor, sequences: LatentSequences, trajectories: list[Trajectory]
) -> list[Tensor]:
    """Cuts the completion out of each row, [T] each, wherever the padding stands."""
    return [
        values_BT[row][sequences.valid_BT[row]][len(trajectory.prompt_ids) :]
        for row, trajectory in enumerate(trajectories)
    ]


@torch.no_grad()
def replayed(
    case: Case, trajectories: list[Trajectory], sequences: LatentSequences
) -> list[Tensor]:
    """Replays each completion's log-probs, 0 where nothing was sampled."""
    return rows_of(
        replay(case.adapter, sequences, temperature=TEMPERATURE)[0], sequences, trajectories
    )


def require_replay(
    case: Case, trajectories: list[Trajectory], sequences: LatentSequences, what: str
) -> None:
    """Requires that rollout log-probs equal replayed ones at every action."""
    for row, (trajectory, values_T) in enumerate(
        zip(trajectories, replayed(case, trajectories, sequences), strict=True)
    ):
        difference_T = (values_T - trajectory.rollout_log_probs).abs() * trajectory.response_mask()
        worst = int(difference_T.argmax())
        require(
            bool(difference_T.max() <= REPLAY_BOUND),
            what,
            got=f"{float(difference_T[worst]):.3g} nats in row {row} at position {worst}, kind "
            f"{int(trajectory.kinds[worst])}",
            expected=f"<= {REPLAY_BOUND} nats at every action",
        )


def require_equal_rows(
    first: Trajectory, second: Trajectory, what: str, bound: float = ROW_BOUND
) -> None:
    """Requires the same tokens and kinds, and log-probs and vectors up to rounding."""
    same = torch.equal(first.token_ids, second.token_ids) and torch.equal(
        first.kinds, second.kinds
    )
    got = f"tokens {first.token_ids.tolist()} and {second.token_ids.tolist()}"
    require(same, what, got=got, expected="the same tokens and kinds")
    gap = float((first.rollout_log_probs - second.rollout_log_probs).abs().max())
    require(
        gap <= bound, what, got=f"log-probs that differ by {gap:.3g} nats", expected=f"<= {bound}"
    )
    if len(first.latents):
        gap = relative(first.latents, second.latents)
        require(
            gap <= 1e-4,
            what,
            got=f"recorded vectors that differ by {gap:.3g}",
            expected="<= 1e-4 of their size",
        )


def relative(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the largest number of `second`."""
    return float((first - second).abs().max() / second.abs().max().clamp(min=1e-6))


def first_positions(trajectory: Trajectory, length: int) -> Trajectory:
    """Cuts a completion after its first `length` positions."""
    cut = trajectory.kinds[:length]
    num_recorded = int(trajectory.recorded_mask[:length].sum())
    by_position = ("token_ids", "rollout_log_probs", "sampling_log_probs")
    fields = {name: getattr(trajectory, name)[:length] for name in by_position}
    num_selected = int((cut == PositionKind.SELECTED).sum())
    return replace(
        trajectory,
        **fields,
        kinds=cut,
        latents=trajectory.latents[:num_recorded],
        selected_idx=trajectory.selected_idx[:num_selected],
    )


def loss_of(adapter: ModelAdapter, sequences: LatentSequences) -> Tensor:
    """Makes one scalar that reacts to every action: the mean log-prob."""
    log_probs_BT, _ = replay(adapter, sequences, temperature=TEMPERATURE)
    return log_probs_BT.sum() / sequences.action_mask_BT().sum()
