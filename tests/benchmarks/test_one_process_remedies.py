"""Each remedy's maths beside a few lines of independent computation.

Does not cover the runs, nor the steps themselves, which are `OneProcess`'s.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import form_reward  # noqa: E402
import one_process  # noqa: E402
import one_process_remedies as remedies  # noqa: E402
import robustness  # noqa: E402

from grpo_latent.algo.losses import Denominators, policy_loss  # noqa: E402
from grpo_latent.errors import ConfigError  # noqa: E402


@pytest.fixture
def loop(monkeypatch):
    """Makes a loop of one weight, whose gradient and log a test gives."""

    def init(self, *_):
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.parameters = [self.weight]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.entropy_coeff = 0.0
        self.treatment = SimpleNamespace(name="mask", gradient=None)

    monkeypatch.setattr(one_process.OneProcess, "__init__", init)
    return lambda name: remedies.REMEDIES[name](None, None)


def test_robustness_names_them_all():
    assert tuple(remedies.REMEDIES) == robustness.REMEDY_NAMES


def test_groups_without_signal_are_replaced_until_the_draws_end(monkeypatch):
    """Rows give two rewards each; 4 groups are wanted, and three draws are made at most."""
    monkeypatch.setattr(one_process, "SamplingParams", lambda *_: None)
    monkeypatch.setattr(
        one_process,
        "score_groups",
        lambda prompts, *_: [SimpleNamespace(rewards_G=torch.tensor(row)) for row in prompts],
    )
    training = object.__new__(one_process.OneProcess)
    training.config = SimpleNamespace(
        data=SimpleNamespace(max_response_length=1, train_batch_size=4)
    )
    training.rollout = SimpleNamespace(temperature=1, top_k=1, top_p=1)
    training.engine = SimpleNamespace(generate=lambda *_: None)
    training._request = lambda *_: None
    training.keeps = remedies.has_signal

    def drawn(rows):
        return [group.rewards_G.tolist() for group in training._sample(1, rows, None).groups]

    mixed, lost, solved = [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]
    rows = iter([mixed, lost, solved, mixed, mixed, lost, mixed, mixed])
    assert drawn(rows) == [mixed] * 4
    assert list(rows) == [mixed], "full behind the third draw, with a row left"
    rows = iter([mixed, lost, lost, lost, lost, lost, lost, lost, solved, lost, mixed])
    assert drawn(rows) == [mixed, lost, solved, lost], "what the last draw gives is taken"


def test_dynamic_sampling_asks_for_signal(monkeypatch):
    made = {}
    monkeypatch.setattr(
        one_process.OneProcess, "__init__", lambda self, *_, **kwargs: made.update(kwargs)
    )
    remedies.REMEDIES["dynamic_sampling"](None, None)
    assert made == {"keeps": remedies.has_signal}
    remedies.REMEDIES["deviation_floor"](None, None)
    assert made["advantages"] is remedies.floored_advantages


def test_the_deviation_has_a_floor():
    groups = [[1.1] * 7 + [0.0], [1.1] * 4 + [0.0] * 4, [0.1] * 8]  # ddof 1: 0.389, 0.588, 0
    expected = []
    for group in groups:
        values = np.array(group)
        expected += ((values - values.mean()) / max(values.std(ddof=1), 0.5)).tolist()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    rewards = [reward for group in groups for reward in group]
    advantages_B = remedies.floored_advantages(
        torch.tensor([rewards[i] for i in order]), [f"row {i // 8}" for i in order]
    )
    assert advantages_B.tolist() == pytest.approx([expected[i] for i in order], abs=1e-6)


def test_the_entropy_coefficient_follows_the_first_step(loop, monkeypatch):
    entropies = iter((0.2, 0.1, 0.3))
    monkeypatch.setattr(
        one_process.OneProcess, "step", lambda *_: SimpleNamespace(entropy=next(entropies))
    )
    training = loop("entropy_target")
    coefficients = []
    for step in (1, 2, 3):
        training.step(step, None, None)
        coefficients.append(training.entropy_coeff)
    assert coefficients == pytest.approx([0.0, 0.05, 0.0])


NORMS = (1.0, 1.2, 0.8, 5.0, 1.9, 0.0, 3.0, 9.0)
SPIKES = (5.0, 3.0, 9.0)  # medians before them: 1.0, 1.2, 1.55


def updates(training):
    """How far the weight goes at gradients of NORMS."""
    distances = []
    for norm in NORMS:
        with torch.no_grad():
            training.weight.zero_()
        training.weight.grad = torch.tensor([0.6, 0.8]) * norm
        training.update(torch.tensor(norm))
        distances.append(float(training.weight.detach().norm()))
    return distances


def test_spikes_are_skipped(loop):
    expected = [0.0 if norm in SPIKES else norm for norm in NORMS]
    assert updates(loop("spikes_skipped")) == pytest.approx(expected)


def test_spikes_are_damped_to_the_median(loop):
    medians = dict(zip(SPIKES, (1.0, 1.2, 1.55), strict=True))
    expected = [medians.get(norm, norm) for norm in NORMS]
    assert updates(loop("spikes_damped")) == pytest.approx(expected, rel=1e-4)


def test_the_medians_window_forgets():
    norms = remedies.RunningMedian()
    for norm in [1.0] * 20 + [10.0] * 20:
        norms.excess(norm)
    assert norms.excess(19.0) is None and norms.excess(21.0) is not None


@pytest.mark.parametrize("name", ["spikes_skipped", "spikes_damped"])
def test_an_infinite_norm_is_no_update(loop, name):
    training = loop(name)
    training.weight.grad = torch.ones(2)
    training.update(torch.tensor(float("inf")))
    assert training.weight.tolist() == [0.0, 0.0]


def test_latents_keep_their_values_and_a_share_of_their_gradient():
    inner = torch.tensor([0.3, -0.7], requires_grad=True)
    outer = torch.tensor(2.0, requires_grad=True)
    latents = torch.tanh(inner)
    damped = remedies.with_share(latents, 0.25)
    assert torch.equal(damped, latents)
    (outer * damped.pow(2).sum()).backward()
    through = 2 * 2.0 * latents * (1 - latents**2)
    assert torch.allclose(inner.grad, 0.25 * through)
    assert float(outer.grad) == pytest.approx(latents.detach().pow(2).sum().item())


def test_latents_without_a_gradient_cannot_be_damped(loop):
    with pytest.raises(ConfigError, match="no gradient through latents"):
        loop("latents_damped")


def test_a_remedy_is_not_measured_with_the_way_back():
    config = SimpleNamespace(latent=SimpleNamespace(alarm=SimpleNamespace(rollback=True)))
    with pytest.raises(ConfigError, match="without the way back"):
        robustness.loop_of(config, None, "spikes_skipped")


def test_of_one_update_the_sequence_ratio_is_a_mean_over_sequences():
    """GSPO, eq. 5 and 7: the clipped ratio exp(mean over t of log p - log p_old), a mean over b."""
    generator = torch.Generator().manual_seed(0)
    log_probs_BT = -torch.rand(4, 6, generator=generator)
    advantages_B = torch.tensor([1.0, -2.0, 0.5, 0.5])
    mask_BT = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])

    def gradient(loss_of):
        values_BT = log_probs_BT.clone().requires_grad_()
        loss_of(values_BT).backward()
        return values_BT.grad

    def gspo(values_BT):
        mean_B = ((values_BT - log_probs_BT) * mask_BT).sum(1) / mask_BT.sum(1)
        ratio_B = mean_B.exp()
        clipped_B = ratio_B.clamp(1 - 3e-4, 1 + 4e-4)
        return -torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B).mean()

    def ours(values_BT):
        return policy_loss(
            values_BT,
            log_probs_BT,
            advantages_B,
            mask_BT,
            denominators=Denominators.of(mask_BT),
            aggregation=one_process.AGGREGATIONS["seq-mean-token-mean"],
        ).loss

    assert torch.allclose(gradient(gspo), gradient(ours), atol=1e-7)


FORM = "at red 7 at blue 3 <answer> 7 </answer>"


@pytest.mark.parametrize(
    ("solution", "offsets", "stop_reason", "truth", "score"),
    [
        (FORM, [6, 16], "eos", "7", 1.1),
        (FORM, [6, 16], "eos", "3", 0.1),
        (FORM, [6, 16], "length", "7", 0.1 * 5 / 6),
        (FORM, [6], "eos", "7", 0.1 * 5 / 6),
        ("at blue 3 at red 7 <answer> 7 </answer>", [7, 16], "eos", "7", 0.1 * 2 / 6),
        ("at red 7 <answer> 7 </answer>", [6], "eos", "7", 0.1 * 4 / 6),
        ("at red 7 at blue 3 <answer> </answer>", [6, 16], "eos", "7", 0.1 * 5 / 6),
        ("7 7 7", [], "length", "7", 0.0),
    ],
)
def test_parts_of_the_form_have_credit(solution, offsets, stop_reason, truth, score):
    latent = {"span_offsets": offsets, "stop_reason": stop_reason}
    info = {"latent": latent, "steps": ["red at r1 c2 is 7", "blue at r0 c0 is 3"]}
    scored = form_reward.compute_score("digits", solution, truth, info)
    assert scored["score"] == pytest.approx(score)
