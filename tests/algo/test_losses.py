"""The policy loss against hand numbers, LVR's formula, finite differences and invariances."""

import math

import pytest
import torch

from grpo_latent.algo.advantages import group_advantages
from grpo_latent.algo.losses import (
    AGGREGATIONS,
    KL_KINDS,
    Denominators,
    aggregate,
    check_latents_do_not_act,
    clipped_losses,
    kl_penalty,
    policy_loss,
)
from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.trajectory import PositionKind, response_mask

MAX_LEN = 9


def random_batch(B=5, T=MAX_LEN, dtype=torch.float64, seed=0):
    """Draws log-probs [B, T], old and reference ones, advantages [B] and a mask.

    The mask has holes (latents) and a ragged right edge.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(B, T, generator=generator, dtype=dtype) * 0.4 - 1.0 for _ in range(3)]
    mask_BT = torch.rand(B, T, generator=generator) < 0.7
    mask_BT &= torch.arange(T)[None] < torch.randint(2, T + 1, (B, 1), generator=generator)
    mask_BT[:, 0] = True
    return *draw, torch.randn(B, generator=generator, dtype=dtype), mask_BT


def with_kl(
    log_probs_BT,
    old_BT,
    ref_BT,
    advantages,
    mask_BT,
    denominators,
    aggregation="token_mean",
    **settings,
):
    """Policy loss + kl_coef · KL, as an actor's loss adds them up."""
    kl_coef, kl_kind = settings.pop("kl_coef"), settings.pop("kl_kind", "k3")
    common = {"denominators": denominators, "aggregation": aggregation}
    loss = policy_loss(log_probs_BT, old_BT, advantages, mask_BT, **common, **settings).loss
    kl_BT = kl_penalty(log_probs_BT, ref_BT, mask_BT, kl_kind)
    return loss + kl_coef * aggregate(kl_BT, mask_BT, aggregation, denominators)


def test_hand_numbers():
    # two actions of one trajectory; ratios 1.5 and 0.5; A = 2, then A = -2
    old_BT = torch.zeros(1, 3)
    log_probs_BT = torch.tensor([[math.log(1.5), math.log(0.5), 7.0]])
    mask_BT = torch.tensor([[True, True, False]])
    kwargs = {"denominators": Denominators.of(mask_BT), "clip_low": 0.2, "clip_high": 0.3}
    up = policy_loss(log_probs_BT, old_BT, torch.tensor([2.0]), mask_BT, **kwargs)
    # -min(1.5·2, 1.3·2) = -2.6 (clipped high), -min(0.5·2, 0.8·2) = -1
    assert up.loss.item() == pytest.approx((-2.6 - 1.0) / 2)
    assert up.clipfrac.item() == 0.5
    down = policy_loss(log_probs_BT, old_BT, torch.tensor([-2.0]), mask_BT, **kwargs)
    # -min(-3, -2.6) = 3, -min(-1, -1.6) = 1.6 (clipped low)
    assert down.loss.item() == pytest.approx((3.0 + 1.6) / 2)
    assert down.approx_kl.item() == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 2)
    dual = policy_loss(
        log_probs_BT, old_BT, torch.tensor([-2.0]), mask_BT, clip_ratio_c=1.2, **kwargs
    )
    assert dual.loss.item() == pytest.approx((2.4 + 1.6) / 2)
    assert dual.clipfrac_lower.item() == 0.5


def test_lvrs_formula():
    """LVR's formula, written out one position at a time.

    -min(rho A, clip(rho) A) + beta (e^d - d - 1), token mean.
    """
    log_probs_BT, old_BT, ref_BT, advantages_B, mask_BT = random_batch()
    total = 0.0
    for b, t in mask_BT.nonzero().tolist():
        rho, A = math.exp(log_probs_BT[b, t] - old_BT[b, t]), advantages_B[b].item()
        d = (ref_BT[b, t] - log_probs_BT[b, t]).item()
        total += -min(rho * A, min(max(rho, 0.8), 1.2) * A) + 0.04 * (math.exp(d) - d - 1)
    loss = with_kl(
        log_probs_BT, old_BT, ref_BT, advantages_B, mask_BT, Denominators.of(mask_BT), kl_coef=0.04
    )
    assert loss.item() == pytest.approx(total / int(mask_BT.sum()), rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_finite_differences(aggregation, kl_kind):
    log_probs_BT, old_BT, ref_BT, advantages_B, mask_BT = random_batch(B=3, T=5)

    def loss(x_BT):
        return with_kl(
            x_BT,
            old_BT,
            ref_BT,
            advantages_B,
            mask_BT,
            Denominators.of(mask_BT, MAX_LEN),
            aggregation,
            clip_ratio_c=1.3,
            kl_coef=0.3,
            kl_kind=kl_kind,
        )

    assert torch.autograd.gradcheck(loss, log_probs_BT.requires_grad_())


def test_first_update_is_reinforce():
    """At ratio 1 the gradient is -A / num_tokens at every action: no clip has a say."""
    log_probs_BT, _, _, advantages_B, mask_BT = random_batch()
    log_probs_BT.requires_grad_()
    result = policy_loss(
        log_probs_BT,
        log_probs_BT.detach().clone(),
        advantages_B,
        mask_BT,
        denominators=Denominators.of(mask_BT),
        clip_ratio_c=3.0,
    )
    result.loss.backward()
    expected_BT = torch.where(mask_BT, -advantages_B[:, None] / mask_BT.sum(), 0.0)
    torch.testing.assert_close(log_probs_BT.grad, expected_BT)
    assert result.clipfrac == 0 and result.approx_kl == 0


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_identities(kind):
    log_probs_BT, _, ref_BT, _, mask_BT = random_batch()
    assert torch.equal(kl_penalty(ref_BT, ref_BT, mask_BT, kind), torch.zeros_like(ref_BT))
    d_BT = (ref_BT - log_probs_BT)[mask_BT]
    expected = {"k1": -d_BT, "k2": d_BT**2 / 2, "k3": torch.expm1(d_BT) - d_BT}[kind]
    torch.testing.assert_close(kl_penalty(log_probs_BT, ref_BT, mask_BT, kind)[mask_BT], expected)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_is_unbiased(kind):
    """The mean of k1 and of k3 under the policy is KL(policy || reference), exactly.

    By summing over a small vocabulary.
    """
    policy_V = torch.log_softmax(
        torch.randn(1, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), -1
    )
    ref_V = torch.log_softmax(
        torch.randn(1, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), -1
    )
    estimate = (
        policy_V.exp() * kl_penalty(policy_V, ref_V, torch.ones_like(policy_V).bool(), kind)
    ).sum()
    torch.testing.assert_close(estimate, (policy_V.exp() * (policy_V - ref_V)).sum())


def test_equal_rewards_give_no_gradient():
    log_probs_BT, old_BT, _, _, mask_BT = random_batch(dtype=torch.float32)
    log_probs_BT.requires_grad_()
    advantages_B = group_advantages(torch.full((5,), 1.1), ["g"] * 5)
    loss = policy_loss(
        log_probs_BT, old_BT, advantages_B, mask_BT, denominators=Denominators.of(mask_BT)
    ).loss
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(log_probs_BT.grad, torch.zeros_like(log_probs_BT))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_kind", KL_KINDS)
@pytest.mark.parametrize("garbage", [float("nan"), -float("inf"), float("inf"), 1e30])
def test_masked_positions_have_neither_loss_nor_gradient(aggregation, kl_kind, garbage):
    log_probs_BT, old_BT, ref_BT, advantages_B, mask_BT = random_batch()

    def run(fill):
        x_BT, o_BT, r_BT = (
            torch.where(mask_BT, v, fill).requires_grad_() for v in (log_probs_BT, old_BT, ref_BT)
        )
        a_BT = torch.where(mask_BT, advantages_B[:, None], fill)
        loss = with_kl(
            x_BT,
            o_BT,
            r_BT,
            a_BT,
            mask_BT,
            Denominators.of(mask_BT, MAX_LEN),
            aggregation,
            clip_ratio_c=3.0,
            kl_coef=0.1,
            kl_kind=kl_kind,
        )
        loss.backward()
        assert o_BT.grad is None and r_BT.grad is None
        return loss, x_BT.grad

    (clean, clean_grad_BT), (dirty, dirty_grad_BT) = run(0.0), run(garbage)
    assert torch.equal(clean, dirty)
    assert torch.equal(clean_grad_BT, dirty_grad_BT)
    assert torch.equal(
        dirty_grad_BT[~mask_BT], torch.zeros(int((~mask_BT).sum()), dtype=torch.float64)
    )


def test_gradient_with_respect_to_logits_is_zero_at_masked_positions_for_any_placeholder_id():
    """The loss never sees ids: what stands at a latent position changes no gradient."""
    generator = torch.Generator().manual_seed(5)
    K = PositionKind
    kinds_BT = torch.tensor([[K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT, K.TEXT]] * 2)
    mask_BT = response_mask(kinds_BT)
    logits_BTV = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_BT = torch.randint(0, 7, (2, 6), generator=generator)
    seen = []
    for placeholder in range(7):  # start, end and EOS are among them
        ids = torch.where(kinds_BT == K.LATENT, placeholder, ids_BT)
        log_probs_BT = torch.log_softmax(logits_BTV, -1).gather(-1, ids[..., None])[..., 0]
        check_latents_do_not_act(mask_BT, kinds_BT == K.LATENT)
        result = policy_loss(
            log_probs_BT,
            log_probs_BT.detach() - 0.1,
            torch.tensor([1.0, -1.0], dtype=torch.float64),
            mask_BT,
            denominators=Denominators.of(mask_BT),
        )
        (grad_BTV,) = torch.autograd.grad(result.loss, logits_BTV)
        assert torch.count_nonzero(grad_BTV[~mask_BT]) == 0
        assert torch.count_nonzero(grad_BTV[mask_BT]) > 0
        seen.append((result.loss.detach(), grad_BTV))
    assert all(
        torch.equal(loss, seen[0][0]) and torch.equal(grad, seen[0][1]) for loss, grad in seen
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_sum_to_the_batch(aggregation):
    log_probs_BT, old_BT, ref_BT, advantages_B, mask_BT = random_batch(B=6)
    mask_BT[4] = False  # a trajectory without any action, alone in one of the micro-batches below
    denominators = Denominators.of(mask_BT, MAX_LEN)

    def run(rows, width):
        x_BT = log_probs_BT[rows, :width].clone().requires_grad_()
        loss = with_kl(
            x_BT,
            old_BT[rows, :width],
            ref_BT[rows, :width],
            advantages_B[rows],
            mask_BT[rows, :width],
            denominators,
            aggregation,
            kl_coef=0.1,
        )
        loss.backward()
        return loss.item(), torch.nn.functional.pad(x_BT.grad, (0, MAX_LEN - width))

    whole, whole_grad_BT = run([0, 1, 2, 3, 4, 5], MAX_LEN)
    for split in ([[0, 1, 2], [3, 4, 5]], [[5], [4], [3], [2], [1], [0]], [[0, 5], [1, 2, 3, 4]]):
        # each micro-batch is cut to its own longest trajectory, as verl's padding does
        widths = [
            max(int(mask_BT[rows].any(0).nonzero().max()) + 1, 1) if mask_BT[rows].any() else 1
            for rows in split
        ]
        parts = [run(rows, width) for rows, width in zip(split, widths, strict=True)]
        assert math.fsum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-12)
        gradient_BT = torch.zeros_like(whole_grad_BT)
        for rows, (_, grad_BT) in zip(split, parts, strict=True):
            gradient_BT[rows] = grad_BT
        torch.testing.assert_close(gradient_BT, whole_grad_BT, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_changes_nothing(aggregation):
    values_BT, _, _, _, mask_BT = random_batch()
    denominators = Denominators.of(mask_BT, MAX_LEN)
    expected = aggregate(values_BT, mask_BT, aggregation, denominators)
    for left, right, rows in ((3, 0, 0), (0, 4, 0), (2, 2, 2)):
        padded_BT = torch.nn.functional.pad(values_BT, (left, right, 0, rows), value=float("nan"))
        padded_mask_BT = torch.nn.functional.pad(mask_BT, (left, right, 0, rows))
        assert Denominators.of(padded_mask_BT, MAX_LEN) == denominators
        torch.testing.assert_close(
            aggregate(padded_BT, padded_mask_BT, aggregation, denominators), expected
        )


def test_aggregations_by_hand():
    values_BT = torch.tensor([[2.0, 4.0, 9.0], [9.0, 12.0, 9.0]])
    mask_BT = torch.tensor([[1, 1, 0], [0, 1, 0]])
    denominators = Denominators.of(mask_BT, max_len=10)
    assert denominators == Denominators(3, 2, 10)
    assert aggregate(values_BT, mask_BT, "token_mean", denominators).item() == pytest.approx(
        18 / 3
    )
    assert aggregate(values_BT, mask_BT, "grpo", denominators).item() == pytest.approx(
        (3 + 12) / 2
    )
    assert aggregate(values_BT, mask_BT, "dr_grpo", denominators).item() == pytest.approx(18 / 20)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_without_any_action_gives_zero(aggregation):
    x_BT = torch.full((2, 3), -float("inf"), requires_grad=True)
    mask_BT = torch.zeros(2, 3, dtype=torch.bool)
    loss = policy_loss(
        x_BT,
        x_BT,
        torch.ones(2),
        mask_BT,
        denominators=Denominators.of(mask_BT, MAX_LEN),
        aggregation=aggregation,
    ).loss
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(x_BT.grad, torch.zeros(2, 3))


def test_weights_multiply_each_token():
    log_probs_BT, old_BT, _, advantages_B, mask_BT = random_batch()
    kwargs = {"denominators": Denominators.of(mask_BT)}
    plain = policy_loss(log_probs_BT, old_BT, advantages_B, mask_BT, **kwargs).loss
    weights_BT = torch.where(mask_BT, 2.0, float("nan"))
    weighted = policy_loss(
        log_probs_BT, old_BT, advantages_B, mask_BT, weights_BT=weights_BT, **kwargs
    ).loss
    torch.testing.assert_close(weighted, 2 * plain)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"aggregation": "mean"}, ConfigError, "unknown loss aggregation"),
        ({"aggregation": "dr_grpo"}, ConfigError, "loss_scale_factor"),
        ({"clip_low": -0.1}, ConfigError, "clip bounds"),
        ({"clip_high": float("nan")}, ConfigError, "clip bounds"),
        ({"clip_ratio_c": 1.0}, ConfigError, "dual clip"),
        ({"response_mask_BT": torch.ones(5, 2)}, LatentMismatchError, "differ in shape"),
        ({"old_log_probs_BT": torch.zeros(5, 2)}, LatentMismatchError, "differ in shape"),
    ],
)
def test_malformed_arguments(change, error, message):
    log_probs_BT, old_BT, _, advantages_B, mask_BT = random_batch()
    arguments = {
        "log_probs_BT": log_probs_BT,
        "old_log_probs_BT": old_BT,
        "advantages": advantages_B,
        "response_mask_BT": mask_BT,
        "denominators": Denominators.of(mask_BT),
        **change,
    }
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


def test_other_malformed_arguments():
    log_probs_BT, _, ref_BT, _, mask_BT = random_batch()
    with pytest.raises(ConfigError, match="unknown KL estimate"):
        kl_penalty(log_probs_BT, ref_BT, mask_BT, "k4")
    with pytest.raises(LatentMismatchError, match="trajectory 0, position 0"):
        check_latents_do_not_act(mask_BT, torch.ones(5, MAX_LEN))
    with pytest.raises(LatentMismatchError, match="differ in shape"):
        check_latents_do_not_act(mask_BT, torch.ones(5, 2))


def test_a_loss_is_that_of_its_actions():
    """`policy_loss` is the mean of `clipped_losses`, whose shape is the caller's."""
    log_probs_BT, old_BT, _, advantages_B, mask_BT = random_batch(B=40)
    bounds = {"clip_low": 0.1, "clip_high": 0.3, "clip_ratio_c": 1.5}
    advantages_BT = advantages_B[:, None].expand_as(log_probs_BT)
    clipped = clipped_losses(
        log_probs_BT[mask_BT], old_BT[mask_BT], advantages_BT[mask_BT], **bounds
    )
    loss = policy_loss(
        log_probs_BT,
        old_BT,
        advantages_B,
        mask_BT,
        denominators=Denominators.of(mask_BT),
        **bounds,
    ).loss
    torch.testing.assert_close(clipped.losses.mean(), loss)
    assert clipped.losses.shape == (int(mask_BT.sum()),)
    assert 0 < clipped.was_clipped.float().mean() < 1
