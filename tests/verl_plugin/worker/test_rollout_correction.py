"""verl's rollout correction weighs text actions of trajectories with latents, only those.

TIS, MIS and rejection.

A latent that acts keeps its own ratio, uncorrected: its density is recorded by engine hf, whose
gap to the replay is rounding; engine vllm, whose gap is not, records none and refuses such
treatments.
"""

import math

import numpy as np
import pytest
import torch
from test_algo_against_verl import LOCAL, actor_config
from test_latent_loss import COMPLETIONS, TERMS, make_case, nested
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.worker import algo  # noqa: F401, registers
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

OFF = {"rollout_is": None, "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": False}
OFF |= {"rollout_rs": None, "rollout_rs_threshold": None}
# two trajectories: text, latent, latent, text; the second one's log-probs at latents are wild
MASK = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 1]])
OLD = torch.tensor([[-1.0, -40.0, -40.0, -2.0], [-1.0, -9.0, 30.0, -0.5]])
ROLLOUT = torch.tensor([[-1.2, 0.0, 0.0, -3.5], [-1.0, 0.0, 0.0, -0.6]])


def corrected(**options):
    batch = DataProto.from_dict(
        {"old_log_probs": OLD, "rollout_log_probs": ROLLOUT, "response_mask": MASK}
    )
    batch, metrics = compute_rollout_correction_and_add_to_batch(batch, OFF | options)
    return batch.batch, metrics


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rollout_is": "token"}, [[math.exp(0.2), 2.0], [1.0, math.exp(0.1)]]),  # truncated at 2
        (
            {"rollout_is": "token", "rollout_is_threshold": "0.5_2"},
            [[math.exp(0.2), 0.0], [1.0, math.exp(0.1)]],
        ),  # masked
        (
            {"rollout_is": "sequence", "rollout_is_threshold": 9.0},
            [[math.exp(1.7)] * 2, [math.exp(0.1)] * 2],
        ),
    ],
    ids=["TIS", "MIS", "TIS of sequences"],
)
def test_weights_are_those_of_the_text_alone(options, expected):
    batch, metrics = corrected(**options)
    weights = batch["rollout_is_weights"]
    np.testing.assert_allclose(weights[:, [0, 3]], expected, rtol=1e-6)
    assert not weights[:, 1:3].any() and torch.equal(batch["response_mask"], MASK)
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(np.mean(expected), rel=1e-6)

    log_prob = OLD.clone().requires_grad_()  # the first update: every ratio is 1
    advantages = torch.tensor([[2.0], [-1.0]]).expand(2, 4)
    loss, _ = get_policy_loss_fn("grpo_latent")(
        OLD, log_prob, advantages, MASK.bool(), "token-mean", actor_config(LOCAL), weights
    )
    loss.backward()
    by_hand = torch.zeros(2, 4)
    by_hand[:, [0, 3]] = -torch.tensor(expected) * torch.tensor([[2.0], [-1.0]]) / 4
    torch.testing.assert_close(log_prob.grad, by_hand)


def test_a_rejected_trajectory_does_not_act_at_its_latents_either():
    batch, _ = corrected(rollout_rs="seq_max_k2", rollout_rs_threshold=0.5)
    assert batch["response_mask"].tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 1],
    ]  # 1.5 ** 2 / 2 in the first one's last token
    data = {"response_mask": nested(list(batch["response_mask"].float()))}
    assert MicroBatch(data).is_live_B.tolist() == [False, True]


def test_latents_that_act_keep_their_ratio():
    values = []
    for weighs in (False, True):
        data, output, _ = make_case()
        if weighs:
            data["rollout_is_weights"] = nested(
                [torch.full((len(kinds),), 0.3) for kinds in COMPLETIONS]
            )
        loss = LatentLoss(
            lambda **_: (torch.tensor(0.0), {}), TERMS, frozenset({int(K.LATENT)}), "token-mean"
        )
        values.append(float(loss(output, data)[0].detach()))
    assert values[0] == values[1] != 0


NUM_TOKENS = 3
TRAJECTORIES = [(i, j) for i in range(NUM_TOKENS) for j in range(NUM_TOKENS)]  # text, latent, text
REWARDS = torch.tensor([1.0, -0.5, 0.2, 0.0, 2.0, -1.0, 0.7, 0.1, -2.0], dtype=torch.float64)


def log_probs(logits_VW):
    """Of the first token, drawn by row 0, and of the second, drawn by the row after the first's."""
    rows = logits_VW.log_softmax(-1)
    return torch.stack([torch.stack([rows[0, i], rows[1 + i, j]]) for i, j in TRAJECTORIES])


def expected_gradient(current, behaviour, **options):
    """Of the policy loss over all trajectories of the behaviour policy, each as often as it is drawn."""
    current = current.clone().requires_grad_()
    new, rollout = log_probs(current), log_probs(behaviour)
    at_text = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    new_BT, rollout_BT = new @ at_text, rollout @ at_text
    mask_BT = at_text.sum(0).expand_as(new_BT).clone()
    batch = DataProto.from_dict(
        {
            "old_log_probs": new_BT.detach(),
            "rollout_log_probs": rollout_BT,
            "response_mask": mask_BT.long(),
        }
    )
    batch, _ = compute_rollout_correction_and_add_to_batch(batch, OFF | options)
    weighted = (REWARDS * rollout.sum(-1).exp())[:, None].expand_as(new_BT)
    loss, _ = get_policy_loss_fn("grpo_latent")(
        new_BT.detach(),
        new_BT,
        weighted,
        mask_BT.bool(),
        "token-mean",
        actor_config(LOCAL),
        batch.batch.get("rollout_is_weights"),
    )
    (loss * mask_BT.sum()).backward()
    return current.grad


def test_the_correction_of_a_stale_policy_is_exact_where_all_trajectories_are_known():
    """Whole trajectories' weights give the gradient of E[reward] itself; a bound gives its own sum."""
    generator = torch.Generator().manual_seed(0)
    current, behaviour = torch.randn(2, 4, NUM_TOKENS, generator=generator, dtype=torch.float64)

    def gradient_of(value_of):
        logits = current.clone().requires_grad_()
        value_of(log_probs(logits).sum(-1)).backward()
        return logits.grad

    exact = gradient_of(lambda log_p: -(log_p.exp() * REWARDS).sum())
    whole = {"rollout_is": "sequence", "rollout_is_threshold": 1e6}
    torch.testing.assert_close(expected_gradient(current, behaviour, **whole), exact)
    stale = expected_gradient(current, behaviour)
    assert (stale - exact).norm() > 0.3 * exact.norm(), "without the correction"

    log_q = log_probs(behaviour).sum(-1)
    share = (log_probs(current).sum(-1).exp() / log_q.exp()).clamp(max=1.2) * log_q.exp()
    truncated = gradient_of(lambda log_p: -(share * REWARDS * log_p).sum())
    whole["rollout_is_threshold"] = 1.2
    torch.testing.assert_close(expected_gradient(current, behaviour, **whole), truncated)
