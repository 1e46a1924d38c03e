"""HRPO's gate and its rows, by hand.

(Rollout, replay, gradients: tests/testing; verl's engine:
tests/verl_plugin/worker/test_hybrid_gate_engine.py.)
"""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import UNBOUNDED, HiddenSource, HybridGate
from grpo_latent.latent.mechanisms.hybrid_gate import Gate
from grpo_latent.testing.cases import build_case
from grpo_latent.testing.compare import replayed
from grpo_latent.trajectory import PositionKind as K

MECHANISM = HybridGate(answer_token="####", answer_id=5, mixture_temperature=0.5)


def test_r_is_the_normalised_mean_embedding():
    """Two tokens with p = 3/4 and 1/4 at temperature 1/2: logits log(3)/2 apart."""
    table_VH = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    logits_MV = torch.tensor([[math.log(3.0) / 2, 0.0]])
    source = HiddenSource(torch.zeros(1, 2), lambda: logits_MV, lambda ids: table_VH[ids])
    size = math.sqrt(0.75**2 + 0.25**2)
    expected = torch.tensor([[0.75 / size, 0.5 / size]])
    torch.testing.assert_close(MECHANISM.make(None, source), expected)


def test_the_gate_is_the_papers():
    torch.manual_seed(0)
    gate = Gate(3, (0.2, 0.9), std=0.5)
    e, r = torch.randn(4, 3), torch.randn(4, 3)
    keep = torch.sigmoid(e @ gate.keep.weight.T + gate.keep.bias)
    let_in = torch.sigmoid(e @ gate.let_in.weight.T + gate.let_in.bias)
    a = torch.exp(-8 * torch.log1p(gate.decay.exp()) * keep)
    expected = a * e + (1 - a**2).sqrt() * let_in * r
    torch.testing.assert_close(gate(e, r), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_near_tokens_alone_with_gradients_that_are_numbers(dtype):
    torch.manual_seed(0)
    gate = Gate(64, (0.99, 0.999), std=0.02)
    kept = torch.exp(-8 * torch.nn.functional.softplus(gate.decay))
    assert 0.99 <= float(kept.min()) < float(kept.max()) <= 0.999
    gate = gate.to(dtype)
    e, r = torch.randn(50, 64, dtype=dtype), torch.randn(50, 64, dtype=dtype)
    fed = gate(e, r)
    assert fed.dtype == dtype and float((fed - e).norm() / e.norm()) < 0.1
    assert float((fed - e).float().abs().max()) > 1e-3, "but not tokens alone"
    fed.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.abs().sum() > 0 for p in gate.parameters())


def test_rows_mix_until_the_delimiter():
    rows = MECHANISM.begin(None, torch.zeros(3, dtype=torch.long), torch.tensor([UNBOUNDED, 7, 0]))
    said = []
    for ids in ([1, 5, 5], [1, 2, 2], [5, 2, 2], [2, 2, 2]):
        planned = rows.plan(None)
        said.append(rows.advance(planned, torch.tensor(ids), None).tolist())
    assert said == [
        [K.MIXED, K.MIXED, K.TEXT],  # the delimiter itself is mixed; the last row never thinks
        [K.MIXED, K.TEXT, K.TEXT],
        [K.MIXED, K.TEXT, K.TEXT],
        [K.TEXT, K.TEXT, K.TEXT],
    ]


def test_the_delimiter_may_be_sampled_and_a_model_needs_the_gate():
    assert MECHANISM.banned_ids == frozenset() and MECHANISM.token_ids == {"####": 5}
    with pytest.raises(CheckpointError, match="without a gate"):
        MECHANISM.check_model(SimpleNamespace())


@pytest.mark.parametrize(
    "changes",
    [
        dict(mixture_temperature=0),
        dict(mixture_temperature="warm"),
        dict(initial_max=1.0),
        dict(initial_min=0.9995),
        dict(initial_min=0),
    ],
)
def test_settings_that_cannot_run(changes):
    with pytest.raises(ConfigError, match="latent.(mixture_temperature|initial_min)"):
        MECHANISM.replace(**changes)


def worst_gap(case, sequences):
    """Between the log-probs of a rollout and of its replay, in nats, over all actions."""
    trajectories = case.recorded.trajectories
    return max(
        float(((replayed_T - t.rollout_log_probs).abs() * t.response_mask()).max())
        for t, replayed_T in zip(
            trajectories, replayed(case, trajectories, sequences), strict=True
        )
    )


@pytest.mark.parametrize("backbone", ["qwen3", "qwen2_5_vl"])
def test_a_bf16_rollout_is_replayed(backbone):
    """The rollout decodes over a cache, the replay reads whole rows: two orders of rounding.

    The bound is a fifth of `device=cuda`'s `replay_logp_gap_bound`, and eight times what was seen.
    The gate lets in much, so that r shows: without it the run would stop.
    """
    settings = dict(answer_token="<answer>", initial_min=0.2, initial_max=0.6)
    case = build_case(HybridGate, backbone, settings)
    case.model.to(torch.bfloat16)
    sequences = case.collate()
    assert bool((sequences.kinds_BT == K.MIXED).any())
    assert 0 < worst_gap(case, sequences) < 0.1
    assert worst_gap(case, sequences.with_latents(sequences.latents_NH * 0)) > 0.5
