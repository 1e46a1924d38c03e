"""Our advantages and policy loss under verl's names and signatures: adapters, no maths.

    algorithm.adv_estimator=grpo_latent         (r - mean) / (std + eps), a group of one is refused
    algorithm.adv_estimator=grpo_latent_rloo    leave-one-out
    algorithm.norm_adv_by_std_in_grpo=False     without the std (Dr. GRPO)
    algorithm.adv_eps=1e-4                      eps of the std, LVR's 1e-4 where it is not set
    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_latent
                                                verl's `vanilla`, made safe at masked positions
    actor_rollout_ref.actor.kl_loss_type=low_var_kl_unclamped
                                                verl's `low_var_kl` without the clamp of its value

verl's `gspo` and `cispo` are used as they are: a test shows that they give masked positions
neither loss nor gradient. They multiply by the mask instead of selecting with it, so they do need
finite log-probs at latent positions, which the replay gives. The entropy bonus and the sum of the
KL penalty over the same mask are verl's (`workers/utils/losses.py`); it has no register for
estimates of the KL, so `text_kl` stands where its loss looks one up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import kl_penalty as verl_kl_penalty
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.utils import losses as verl_losses

from grpo_latent.algo.advantages import DEFAULT_EPS, group_advantages
from grpo_latent.algo.losses import Denominators, policy_loss
from grpo_latent.algo.losses import kl_penalty as our_kl_penalty
from grpo_latent.errors import ConfigError

NAME = "grpo_latent"
RLOO_NAME = "grpo_latent_rloo"
UNCLAMPED_KL = "low_var_kl_unclamped"
# verl's loss_agg_mode -> ours; the two plain sums are our means over a denominator of 1
AGGREGATION_OF_MODE = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "dr_grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}


@register_adv_est(NAME)
def grpo_latent_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`grpo`, or `dr_grpo` if `algorithm.norm_adv_by_std_in_grpo` is False, for verl's trainer.

    Rows without any action (verl's padding rows, dropped trajectories, whose mask the trainer has
    cleared) are left out of their group and get 0.

    Args:
        token_level_rewards: float [B, T]; the reward of a trajectory is its sum.
        response_mask: [B, T], 1 where the policy acted.
        index: group id of each row [B].
        config: `algorithm` of verl's config.

    Returns:
        advantages and returns, both float [B, T], 0 where the policy did not act.
    """
    normalise = _get(config, "norm_adv_by_std_in_grpo", True)
    return _broadcast(
        token_level_rewards, response_mask, index, "grpo" if normalise else "dr_grpo", config
    )


@register_adv_est(RLOO_NAME)
def grpo_latent_rloo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Leave-one-out; arguments and results as those of `grpo_latent_advantage`."""
    return _broadcast(token_level_rewards, response_mask, index, "rloo", config)


@register_policy_loss(NAME)
def grpo_latent_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`policy_loss` in verl's signature; equal to verl's `vanilla` on ordinary input.

    Differs where `vanilla` goes wrong: a NaN or -inf at a masked position, a micro-batch without
    any action, and `seq-mean-token-sum-norm` without `loss_scale_factor` (verl then divides by the
    padded width of the micro-batch).

    Args: as `verl.trainer.ppo.core_algos.compute_policy_loss_vanilla`, all tensors [B, T].

    Returns:
        scalar loss, and metrics under verl's names.
    """
    if config is None:
        raise ConfigError(
            "the policy loss needs the actor's config",
            where="policy_loss",
            expected="verl's ActorConfig",
        )
    info = config.global_batch_info
    result = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        denominators=denominators(response_mask, loss_agg_mode, info),
        aggregation=AGGREGATION_OF_MODE[loss_agg_mode],
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_ratio_c=config.get("clip_ratio_c", 3.0),  # null switches dual clip off
        weights_BT=rollout_is_weights,
    )
    metrics = {
        "actor/pg_clipfrac": result.clipfrac.item(),
        "actor/ppo_kl": result.approx_kl.item(),
        "actor/pg_clipfrac_lower": result.clipfrac_lower.item(),
    }
    # FSDP averages the gradients of its ranks; each rank's share of the global sum is scaled up
    # for that
    return result.loss * info.get("dp_size", 1), metrics


def text_kl(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL to the reference for `actor.kl_loss_type`: verl's own names, and ours.

    verl clamps the value of `low_var_kl` at 10, and a clamped value has no gradient: a token that
    drifted further than 2.6 nats below its reference is no longer pulled back, and those are the
    tokens that end a run. `low_var_kl_unclamped` bounds the exponent only.

    Args, results: as those of `verl.trainer.ppo.core_algos.kl_penalty`, whose names are these.
    """
    if kl_penalty == UNCLAMPED_KL:
        everywhere = torch.ones_like(logprob, dtype=torch.bool)  # verl masks the sum
        return our_kl_penalty(logprob, ref_logprob, everywhere, "k3")
    return verl_kl_penalty(logprob, ref_logprob, kl_penalty)  # type: ignore[arg-type]  # as above


# verl annotates FloatTensor, which no operation of torch is annotated to return
verl_losses.kl_penalty = text_kl  # type: ignore[assignment]


def _broadcast(
    token_level_rewards, response_mask, index, estimator, config
) -> tuple[Tensor, Tensor]:
    eps = _get(config, "adv_eps", DEFAULT_EPS)
    mask_BT = response_mask.bool()
    with torch.no_grad():
        rewards_B = token_level_rewards.sum(-1)
        advantages_B = group_advantages(rewards_B, index, estimator, eps, valid_N=mask_BT.any(-1))
        advantages_BT = torch.where(mask_BT, advantages_B[:, None], 0.0)
    return advantages_BT, advantages_BT.clone()


def denominators(response_mask: Tensor, mode: str, info: dict) -> Denominators:
    """verl's global counts where the engine gives them, else those of this micro-batch.

    verl does the latter at one rank, too.
    """
    if mode not in AGGREGATION_OF_MODE:
        raise ConfigError(
            "unknown loss aggregation",
            where="actor_rollout_ref.actor.loss_agg_mode",
            got=mode,
            expected=f"one of {tuple(AGGREGATION_OF_MODE)}",
        )
    local = Denominators.of(response_mask.bool())
    num_tokens, num_trajectories = info.get("batch_num_tokens"), info.get("global_batch_size")
    needed = num_tokens if mode == "token-mean" else num_trajectories
    # each rank would divide by its own count, and the mean over ranks would then weigh the actions
    # of a rank with few of them more
    if needed is None and info.get("dp_size", 1) > 1 and mode != "token-sum":
        raise ConfigError(
            "several ranks need a common denominator",
            where="actor.global_batch_info",
            got=dict(info),
            expected="batch_num_tokens and global_batch_size",
            fix="Train through verl's engine workers, which count them over all ranks.",
        )
    max_len = {
        "seq-mean-token-sum": 1,
        "seq-mean-token-sum-norm": info.get("loss_scale_factor"),
    }.get(mode)
    return Denominators(
        num_tokens=1
        if mode == "token-sum"
        else local.num_tokens
        if num_tokens is None
        else num_tokens,
        num_trajectories=local.num_trajectories if num_trajectories is None else num_trajectories,
        max_len=max_len,
    )


def _get(config: Any, key: str, default: Any) -> Any:
    value = None if config is None else config.get(key, None)
    return default if value is None else value
