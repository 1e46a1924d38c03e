"""Our registered functions against verl's own, where verl's are right and where not."""

import math

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_policy_loss_vanilla,
    compute_rloo_outcome_advantage,
    get_adv_estimator_fn,
    get_policy_loss_fn,
)
from verl.trainer.ppo.core_algos import (
    kl_penalty as verl_kl_penalty,
)
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from grpo_latent.algo.losses import kl_penalty
from grpo_latent.errors import ConfigError, RewardError
from grpo_latent.verl_plugin.worker import algo  # registers

MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
GLOBAL = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 12, "loss_scale_factor": 32}
LOCAL = {
    "dp_size": 1,
    "batch_num_tokens": None,
    "global_batch_size": None,
    "loss_scale_factor": 32,
}


def actor_config(info, **changes):
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_high=0.28,
        **changes,
    )
    config.global_batch_info.update(info)
    return config


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_prob, old_log_prob = (torch.randn(6, 9, generator=generator) * 0.5 - 1 for _ in range(2))
    advantages = torch.randn(6, 1, generator=generator).expand(6, 9).contiguous()
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[:, 0] = True
    mask[2] = False  # a padding row
    return old_log_prob, log_prob.requires_grad_(), advantages, mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_policy_loss_equals_vanilla(mode, info, with_weights):
    old_log_prob, log_prob, advantages, mask = random_batch()
    weights = (
        torch.rand(6, 9, generator=torch.Generator().manual_seed(7)) if with_weights else None
    )
    results = []
    for function in (compute_policy_loss_vanilla, get_policy_loss_fn("grpo_latent")):
        loss, metrics = function(
            old_log_prob,
            log_prob,
            advantages,
            mask,
            mode,
            actor_config(info, clip_ratio_c=1.5),
            weights,
        )
        (gradient,) = torch.autograd.grad(loss, log_prob)
        results.append((loss, gradient, metrics))
    (verl_loss, verl_gradient, verl_metrics), (loss, gradient, metrics) = results
    torch.testing.assert_close(loss, verl_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, verl_gradient, rtol=1e-6, atol=1e-6)
    assert metrics == pytest.approx(verl_metrics, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] > 0 and metrics["actor/pg_clipfrac_lower"] > 0


def test_vanilla_lets_a_masked_nan_through_and_ours_does_not():
    old_log_prob, log_prob, advantages, mask = random_batch()
    dirty = torch.where(mask, log_prob.detach(), float("nan"))
    config = actor_config(GLOBAL)
    clean_loss, _ = get_policy_loss_fn("grpo_latent")(
        old_log_prob, log_prob, advantages, mask, "seq-mean-token-mean", config
    )
    loss, metrics = get_policy_loss_fn("grpo_latent")(
        old_log_prob, dirty, advantages, mask, "seq-mean-token-mean", config
    )
    assert loss.item() == clean_loss.item() and all(np.isfinite(list(metrics.values())))
    verl_loss, _ = compute_policy_loss_vanilla(
        old_log_prob, dirty, advantages, mask, "seq-mean-token-mean", config
    )
    assert torch.isnan(verl_loss), (
        "verl now selects with the mask: our own policy loss may no longer be needed"
    )


@pytest.mark.parametrize("name", ["gspo", "cispo"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_verls_gspo_and_cispo_honour_the_latent_mask(name, mode):
    """Whatever finite log-probs stand at latent positions: same loss, and no gradient there."""
    old_log_prob, log_prob, advantages, mask = random_batch()
    results = []
    for garbage in (0.0, -40.0, 3.0):
        x = torch.where(mask, log_prob.detach(), garbage).requires_grad_()
        loss, _ = get_policy_loss_fn(name)(
            torch.where(mask, old_log_prob, -garbage),
            x,
            advantages,
            mask,
            mode,
            actor_config(GLOBAL),
            None,
        )
        loss.backward()
        assert torch.count_nonzero(x.grad[~mask]) == 0 and torch.count_nonzero(x.grad[mask]) > 0
        results.append((loss.detach(), x.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_equals_verls_while_the_policy_is_near_its_reference(kind):
    old_log_prob, log_prob, _, mask = random_batch()
    ours = kl_penalty(log_prob, old_log_prob, mask, kind)
    torch.testing.assert_close(
        ours[mask], verl_kl_penalty(log_prob, old_log_prob, kind)[mask], rtol=1e-6, atol=1e-6
    )


def ragged(rows):
    return tu.nested_tensor_from_tensor_list([torch.as_tensor(row) for row in rows])


@pytest.mark.parametrize("below", [0.5, 4.0, 12.0])  # nats under the reference, the first token
def test_a_token_far_below_its_reference_is_pulled_back_by_ours_and_not_by_verls(below):
    """In verl's own `ppo_loss`: d KL / d log_prob = 1 - e^(ref - log_prob)."""
    lengths = (3, 2)
    gradients = {}
    for kind in ("low_var_kl", algo.UNCLAMPED_KL):
        config = actor_config(
            LOCAL,
            use_kl_loss=True,
            kl_loss_coef=0.5,
            kl_loss_type=kind,
            policy_loss=PolicyLossConfig(loss_mode="grpo_latent"),
        )
        # a prompt of one token: the score of token t stands at t, the last value is nobody's
        log_probs = torch.full((sum(lengths) + 2,), -1.0)
        log_probs[0] -= below
        log_probs.requires_grad_(True)
        rows = [[-1.0] * length for length in lengths]
        fields = {
            "prompts": ragged([[0]] * 2),
            "responses": ragged([[0] * length for length in lengths]),
            "response_mask": ragged([[1] * length for length in lengths]),
            "old_log_probs": ragged(rows),
            "advantages": ragged([[0.0] * length for length in lengths]),
            "ref_log_prob": ragged(rows),
        }
        data = tu.get_tensordict(
            fields, {"dp_size": 1, "batch_num_tokens": sum(lengths), "global_batch_size": 2}
        )
        output = {
            "log_probs": torch.nested.nested_tensor_from_jagged(log_probs, torch.tensor([0, 4, 7]))
        }
        loss, _ = ppo_loss(config, output, data)
        loss.backward()
        gradients[kind] = log_probs.grad
    own, verls = gradients[algo.UNCLAMPED_KL], gradients["low_var_kl"]
    assert own[0].item() == pytest.approx(0.5 * (1 - math.exp(below)) / sum(lengths), rel=1e-5)
    assert torch.count_nonzero(own) == 1
    if below < 2.6:
        torch.testing.assert_close(own, verls)
    else:
        assert torch.count_nonzero(verls) == 0, "verl clamps no more: ours has no reason to be"


def advantage_inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(8, 5, generator=generator) < 0.8
    mask[:, 0] = True
    rewards = torch.zeros(8, 5)
    rewards[:, -1] = torch.randint(0, 3, (8,), generator=generator).float()
    index = np.array(["u0", "u1"] * 4, dtype=object)
    return rewards, mask, index


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_equal_verls_grpo(normalise):
    rewards, mask, index = advantage_inputs()
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, index, 1e-6, normalise)
    config = {"norm_adv_by_std_in_grpo": normalise, "adv_eps": 1e-6}
    advantages, returns = get_adv_estimator_fn("grpo_latent")(
        token_level_rewards=rewards, response_mask=mask, index=index, config=config
    )
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(returns, advantages) and returns is not advantages


def test_advantages_equal_verls_rloo():
    rewards, mask, index = advantage_inputs()
    expected, _ = compute_rloo_outcome_advantage(rewards, mask, index)
    advantages, _ = get_adv_estimator_fn("grpo_latent_rloo")(
        token_level_rewards=rewards, response_mask=mask, index=index, config={}
    )
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)


def test_default_eps_is_1e_4():
    rewards, mask, index = advantage_inputs()
    default, _ = get_adv_estimator_fn("grpo_latent")(rewards, mask, index)
    explicit, _ = get_adv_estimator_fn("grpo_latent")(rewards, mask, index, {"adv_eps": 1e-4})
    other, _ = get_adv_estimator_fn("grpo_latent")(rewards, mask, index, {"adv_eps": 1e-2})
    assert torch.equal(default, explicit) and not torch.equal(default, other)


def test_group_of_one_and_nan_are_refused_where_verl_goes_on():
    rewards, mask, index = advantage_inputs()
    index[0] = "alone"
    assert torch.isfinite(compute_grpo_outcome_advantage(rewards, mask, index)[0]).all()
    with pytest.raises(ConfigError, match="group of one"):
        get_adv_estimator_fn("grpo_latent")(rewards, mask, index)
    rewards, mask, index = advantage_inputs()
    rewards[3, -1] = float("nan")
    with pytest.raises(RewardError, match="group 'u1' trajectory 3"):
        get_adv_estimator_fn("grpo_latent")(rewards, mask, index)


def test_verls_padding_rows_and_dropped_rows_are_left_out():
    rewards, mask, index = advantage_inputs()
    expected, _ = get_adv_estimator_fn("grpo_latent")(rewards, mask, index)
    padded_rewards = torch.cat([rewards, torch.full((2, 5), float("nan"))])
    padded_mask = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)])
    padded_index = np.concatenate([index, np.array(["u0", "pad"], dtype=object)])
    advantages, _ = get_adv_estimator_fn("grpo_latent")(padded_rewards, padded_mask, padded_index)
    assert torch.equal(advantages[:8], expected) and torch.count_nonzero(advantages[8:]) == 0


def test_malformed_loss_configs():
    old_log_prob, log_prob, advantages, mask = random_batch()
    loss = get_policy_loss_fn("grpo_latent")
    with pytest.raises(ConfigError, match="loss_agg_mode"):
        loss(old_log_prob, log_prob, advantages, mask, "mean", actor_config(GLOBAL))
    with pytest.raises(ConfigError, match="loss_scale_factor"):
        loss(
            old_log_prob,
            log_prob,
            advantages,
            mask,
            "seq-mean-token-sum-norm",
            actor_config({**GLOBAL, "loss_scale_factor": None}),
        )
    with pytest.raises(ConfigError, match="common denominator"):
        loss(
            old_log_prob,
            log_prob,
            advantages,
            mask,
            "token-mean",
            actor_config({**GLOBAL, "batch_num_tokens": None}),
        )
    with pytest.raises(ConfigError, match="actor's config"):
        loss(old_log_prob, log_prob, advantages, mask)
