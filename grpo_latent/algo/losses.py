"""The GRPO-latent loss: PPO's clipped ratio on the positions where the policy acted on *text*.

Latent positions and forced delimiters are no actions: `response_mask` is False there, and nothing
at such a position, not even a NaN, reaches the loss or a gradient. The latents enter the log-probs
as recorded inputs of the replay.

Every reduction divides by `Denominators` that the caller took from the whole batch, so the losses
of micro-batches (and of padded or packed layouts) *sum* to the loss of the batch.

Legend: B trajectories, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError, LatentMismatchError

AGGREGATIONS = ("grpo", "token_mean", "dr_grpo")
KL_KINDS = ("k1", "k2", "k3")
LOG_RATIO_BOUND = 20.0  # verl's: keeps exp() finite when a policy has moved absurdly far


@dataclass(frozen=True)
class Denominators:
    """What the reductions divide by: counts over the whole batch, not over a micro-batch.

    Attributes:
        num_tokens: positions where the policy acted.
        num_trajectories: trajectories with at least one action (verl counts all of them, padding
            rows included).
        max_len: constant completion length of `dr_grpo`; None where that aggregation is not used.
    """

    num_tokens: float
    num_trajectories: float
    max_len: float | None = None

    @classmethod
    def of(cls, response_mask_BT: Tensor, max_len: float | None = None) -> Denominators:
        """Those of a batch that is reduced in one piece."""
        return cls(float(response_mask_BT.sum()), float(response_mask_BT.any(-1).sum()), max_len)


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns, with what is reported beside it.

    Attributes:
        loss: scalar with gradient.
        clipfrac: share of actions whose ratio was clipped, detached scalar, per token of this
            micro-batch.
        clipfrac_lower: share of actions that the dual clip bounded.
        approx_kl: mean of old - new log-prob over the actions (k1 estimate of KL(old || new)).
    """

    loss: Tensor
    clipfrac: Tensor
    clipfrac_lower: Tensor
    approx_kl: Tensor


def aggregate(
    values_BT: Tensor, response_mask_BT: Tensor, aggregation: str, denominators: Denominators
) -> Tensor:
    """Reduces per-token values to the scalar that is summed over micro-batches.

        grpo        sum_b [ mean over the actions of b ] / num_trajectories
                    verl: seq-mean-token-mean
        token_mean  sum over all actions / num_tokens
                    verl: token-mean; TRL and LVR: bnpo
        dr_grpo     sum over all actions / (num_trajectories · max_len)
                    verl: seq-mean-token-sum-norm

    Args:
        values_BT: float; anything at all where the mask is False.
        response_mask_BT: bool (or 0/1), True where the policy acted.

    Returns:
        float scalar; 0 where the mask is all False.

    >>> mask = torch.tensor([[True, True, False], [True, False, False]])
    >>> values = torch.tensor([[1.0, 3.0, torch.nan], [8.0, 0.0, 0.0]])
    >>> aggregate(values, mask, "grpo", Denominators.of(mask))
    tensor(5.)
    """
    mask_BT = _bool_mask(response_mask_BT, values_BT)
    per_trajectory_B = torch.where(mask_BT, values_BT, 0.0).sum(-1)
    if aggregation == "token_mean":
        return per_trajectory_B.sum() / max(denominators.num_tokens, 1)
    if aggregation == "grpo":
        return (per_trajectory_B / mask_BT.sum(-1).clamp(min=1)).sum() / max(
            denominators.num_trajectories, 1
        )
    if aggregation == "dr_grpo":
        if denominators.max_len is None or not denominators.max_len > 0:
            # the padded width of the tensors at hand would do, but the loss would then depend on
            # padding
            raise ConfigError(
                "aggregation dr_grpo divides by a constant length",
                where="actor.loss_scale_factor",
                got=denominators.max_len,
                expected="a length > 0 that stays the same over the run",
                fix="Set actor_rollout_ref.actor.loss_scale_factor=${data.max_response_length}.",
            )
        return per_trajectory_B.sum() / (
            max(denominators.num_trajectories, 1) * denominators.max_len
        )
    raise ConfigError(
        "unknown loss aggregation", got=aggregation, expected=f"one of {AGGREGATIONS}"
    )


def kl_penalty(
    log_probs_BT: Tensor,
    ref_log_probs_BT: Tensor,
    response_mask_BT: Tensor,
    kind: str = "k3",
    log_ratio_bound: float = LOG_RATIO_BOUND,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) at tokens that the policy sampled.

    With d = ref - log_prob:  k1 = -d,  k2 = d² / 2,  k3 = e^d - d - 1.

    Source: J. Schulman, "Approximating KL divergence" (2020); LVR uses k3. verl's k3 clamps its
    value to 10, which also cuts the gradient of exactly the tokens that have drifted furthest;
    here only the exponent is bounded.

    Args:
        log_probs_BT, ref_log_probs_BT: float, nats, same temperature and same latents.

    Returns:
        float [B, T], with gradient to `log_probs_BT`; 0 where the policy did not act.
    """
    mask_BT = _bool_mask(response_mask_BT, log_probs_BT)
    d_BT = torch.where(mask_BT, ref_log_probs_BT.detach(), 0.0) - torch.where(
        mask_BT, log_probs_BT, 0.0
    )
    if kind == "k1":
        return -d_BT
    if kind == "k2":
        return 0.5 * d_BT.square()
    if kind == "k3":
        d_BT = d_BT.clamp(-log_ratio_bound, log_ratio_bound)
        return d_BT.exp() - d_BT - 1
    raise ConfigError("unknown KL estimate", got=kind, expected=f"one of {KL_KINDS}")


def policy_loss(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor,
    advantages: Tensor,
    response_mask_BT: Tensor,
    *,
    denominators: Denominators,
    aggregation: str = "token_mean",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    weights_BT: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss on actions of one kind: `clipped_losses`, reduced.

        loss = aggregate(w L)

    LVR (2509.24251) is clip 0.2, no dual clip, `token_mean`, and 0.04 times the aggregated
    `kl_penalty` k3 beside it.

    Args:
        log_probs_BT: float32, nats, of the current policy, with gradient.
        old_log_probs_BT: float32, nats, of the policy before the update; equal to `log_probs_BT`
            on the first one.
        advantages: float [B] or [B, T].
        response_mask_BT: bool, True where the policy acted; False at latents, forced delimiters
            and padding.
        weights_BT: float, importance weights of the rollout, multiplied into L.

    Raises:
        ConfigError: clip bounds or an aggregation that do not exist.
        LatentMismatchError: shapes differ.
    """
    mask_BT = _bool_mask(response_mask_BT, log_probs_BT)
    if old_log_probs_BT.shape != mask_BT.shape:
        raise LatentMismatchError(
            "old and new log-probs differ in shape",
            got=tuple(old_log_probs_BT.shape),
            expected=str(tuple(mask_BT.shape)),
        )
    advantages_BT = (
        advantages[:, None].expand_as(log_probs_BT) if advantages.ndim == 1 else advantages
    )
    # masked before any arithmetic: masking a NaN afterwards would still send 0 · NaN backwards
    clipped = clipped_losses(
        torch.where(mask_BT, log_probs_BT, 0.0),
        torch.where(mask_BT, old_log_probs_BT.detach(), 0.0),
        torch.where(mask_BT, advantages_BT.detach(), 0.0),
        clip_low=clip_low,
        clip_high=clip_high,
        clip_ratio_c=clip_ratio_c,
    )
    losses_BT = clipped.losses
    if weights_BT is not None:
        losses_BT = losses_BT * torch.where(mask_BT, weights_BT.detach(), 0.0)

    per_token = Denominators.of(mask_BT)
    clipfrac, clipfrac_lower, approx_kl = (
        aggregate(values_BT.detach().float(), mask_BT, "token_mean", per_token)
        for values_BT in (clipped.was_clipped, clipped.was_bounded, -clipped.log_ratios)
    )
    return PolicyLoss(
        aggregate(losses_BT, mask_BT, aggregation, denominators),
        clipfrac,
        clipfrac_lower,
        approx_kl,
    )


@dataclass(frozen=True)
class ClippedLosses:
    """Values at each action, all of one shape.

    Attributes:
        losses: L of `clipped_losses`, with gradient.
        log_ratios: log rho, bounded, with gradient.
        was_clipped, was_bounded: bool, where the clip and the dual clip decided L.
    """

    losses: Tensor
    log_ratios: Tensor
    was_clipped: Tensor
    was_bounded: Tensor


def clipped_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None,
    log_ratio_bound: float = LOG_RATIO_BOUND,
) -> ClippedLosses:
    """PPO's loss of each action, whatever is an action: a token, a latent, a choice.

        rho = exp(log_prob - old_log_prob)
        L   = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))     = -min(rho A, clip(rho) A)
        L   = min(L, -A clip_ratio_c)                    where A < 0     (dual clip, where given)

    Sources: PPO (arXiv 1707.06347), clip-higher of DAPO (2503.14476), dual clip (1912.09729).

    Args:
        log_probs, old_log_probs, advantages: float, of one shape, finite; gradient flows to the
            first only.
        log_ratio_bound: log-ratios are clamped to ± this before exp.

    Raises:
        ConfigError: clip bounds that do not exist.
    """
    _check_clip(clip_low, clip_high, clip_ratio_c)
    advantages = advantages.detach()
    log_ratios = (log_probs - old_log_probs.detach()).clamp(-log_ratio_bound, log_ratio_bound)
    ratios = log_ratios.exp()
    unclipped = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    was_clipped = clipped > unclipped
    was_bounded = torch.zeros_like(was_clipped)
    if clip_ratio_c is not None:
        bound = -advantages * clip_ratio_c
        was_bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(advantages < 0, torch.minimum(losses, bound), losses)
    return ClippedLosses(losses, log_ratios, was_clipped, was_bounded)


def check_latents_do_not_act(response_mask_BT: Tensor, latent_mask_BT: Tensor) -> None:
    """Raises `LatentMismatchError` where a latent position is marked as an action of the text.

    Its log-prob would be that of a placeholder id, or a log-density clipped with the text's
    bounds.
    """
    both_BT = _bool_mask(response_mask_BT, latent_mask_BT) & latent_mask_BT.bool()
    if bool(both_BT.any()):
        b, t = both_BT.nonzero()[0].tolist()
        raise LatentMismatchError(
            "a latent position is marked as an action",
            where=f"trajectory {b}, position {t}",
            got=f"{int(both_BT.sum())} such positions",
            expected="response_mask & latent_mask all False",
            fix="Build response_mask from position kinds, as "
            "grpo_latent.trajectory.response_mask does.",
        )


def _bool_mask(mask_BT: Tensor, like_BT: Tensor) -> Tensor:
    if mask_BT.shape != like_BT.shape:
        raise LatentMismatchError(
            "mask and values differ in shape",
            got=tuple(mask_BT.shape),
            expected=str(tuple(like_BT.shape)),
        )
    return mask_BT.bool()


def _check_clip(clip_low: float, clip_high: float, clip_ratio_c: float | None) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(
            "clip bounds of the ratio are not usable",
            where="actor.clip_ratio_low, clip_ratio_high",
            got=(clip_low, clip_high),
            expected="both >= 0",
        )
    if clip_ratio_c is not None and not clip_ratio_c > 1:
        raise ConfigError(
            "dual clip bounds the ratio from above",
            where="actor.clip_ratio_c",
            got=clip_ratio_c,
            expected="> 1",
        )
