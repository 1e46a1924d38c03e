"""The densities against hand numbers, torch's own distributions and finite differences.

And what the config refuses.
"""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Gumbel, Normal

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments import (
    LatentSource,
    LatentTerms,
    Mask,
    Treatment,
    parse_treatment,
)
from grpo_latent.latent.treatments.gaussian import Gaussian
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft

M, H, V, K = 4, 6, 11, 3


@dataclasses.dataclass(frozen=True)
class Own(Treatment):
    size: int = 1


def source(seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    mean_MH = torch.randn(M, H, generator=generator, dtype=torch.float64).requires_grad_(
        requires_grad
    )
    logits_MV = torch.randn(M, V, generator=generator, dtype=torch.float64).requires_grad_(
        requires_grad
    )
    return LatentSource(mean_MH, lambda: logits_MV), mean_MH, logits_MV


def uniforms(count, seed=1):
    return torch.rand(M, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def embed(ids):
    table_VH = torch.arange(V * H, dtype=torch.float64).view(V, H)
    return table_VH[ids]


def test_gaussian_hand_numbers():
    """z - mu = (1, 2), sigma 0.5: -(1 + 4) / (2 · 0.25) = -10; over H = 2: -5."""
    where = LatentSource(torch.tensor([[1.0, -1.0]]), None)
    assert Gaussian(sigma=0.5).log_density(where, torch.tensor([[2.0, 1.0]])).tolist() == [-10.0]
    assert Gaussian(sigma=0.5, per_dimension=True).log_density(
        where, torch.tensor([[2.0, 1.0]])
    ).tolist() == [-5.0]
    assert Gaussian(sigma=math.inf, sigma_rollout=1).log_density(
        where, torch.tensor([[2.0, 1.0]])
    ).tolist() == [0.0]


def test_gaussian_is_a_normal_density_up_to_the_declared_constant():
    treatment, (where, mean_MH, _) = Gaussian(sigma=0.7), source()
    latents_MH = mean_MH + 0.3
    exact_M = Normal(mean_MH, 0.7).log_prob(latents_MH).sum(-1)
    dropped = -H * (math.log(0.7) + math.log(2 * math.pi) / 2)
    torch.testing.assert_close(treatment.log_density(where, latents_MH) + dropped, exact_M)


def test_gumbel_soft_hand_numbers():
    """One of two equally likely tokens, g at its mode (x = 0): -0 - e^0 = -1.

    Beyond the clamp, x = 3.
    """
    treatment = GumbelSoft(top_k=2)
    half = math.log(0.5)
    where = LatentSource(torch.zeros(2, 1), lambda: torch.zeros(2, 5))
    aux = torch.tensor([[4, 1, half, half], [0, 1, half, half + 7]])
    expected = [-1.0, (-1.0 - 3.0 - math.exp(-3.0)) / 2]
    assert treatment.log_density(where, None, aux).tolist() == pytest.approx(expected)


def test_gumbel_soft_jointly_is_the_gumbel_density():
    treatment, (where, _, logits_MV) = GumbelSoft(top_k=K, clamp=None, joint=True), source()
    fed_MH, aux = treatment.draw(where, uniforms(K), embed)
    ids_MK, g_MK = aux[:, :K].long(), aux[:, K:]
    p_MK = logits_MV.softmax(-1).gather(1, ids_MK)
    location_MK = (p_MK / p_MK.sum(-1, keepdim=True)).log()
    expected_M = Gumbel(location_MK, torch.ones_like(location_MK)).log_prob(g_MK.double()).sum(-1)
    torch.testing.assert_close(
        treatment.log_density(where, fed_MH, aux), expected_M, rtol=1e-6, atol=1e-6
    )
    weights_MK = (g_MK.double() / treatment.tau).softmax(-1)
    expected_MH = sum(weights_MK[:, k, None] * embed(ids_MK[:, k]) for k in range(K))
    torch.testing.assert_close(fed_MH, expected_MH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "treatment",
    [
        Gaussian(sigma=0.6),
        Gaussian(sigma=0.6, per_dimension=True),
        GumbelSoft(top_k=K),
        GumbelSoft(K, joint=True),
    ],
    ids=["gaussian", "gaussian per dimension", "gumbel_soft", "gumbel_soft joint"],
)
def test_gradients_equal_finite_differences(treatment):
    where, mean_MH, logits_MV = source(requires_grad=True)
    with torch.no_grad():
        latents_MH, aux = treatment.draw(where, uniforms(max(treatment.num_uniforms(H), 1)), embed)
    aux = None if aux is None else aux.double()

    def moved(mean, logits):
        return treatment.log_density(LatentSource(mean, lambda: logits), latents_MH, aux)

    moved(mean_MH, logits_MV).sum().backward()
    weights = [value for value in (mean_MH, logits_MV) if value.grad is not None]
    assert len(weights) == 1 and weights[0].grad.abs().max() > 1e-2
    step, numeric = 1e-6, torch.zeros_like(weights[0])
    with torch.no_grad():
        for index in range(weights[0].numel()):
            flat, values = weights[0].view(-1), []
            for sign in (1, -2):
                flat[index] += sign * step
                values.append(moved(mean_MH, logits_MV).sum())
            flat[index] += step
            numeric.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(weights[0].grad, numeric, rtol=1e-5, atol=1e-7)


def test_draws_follow_their_distribution():
    many = torch.rand(40_000, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn_MH, _ = Gaussian(sigma=2.0, sigma_rollout=0.5).draw(
        LatentSource(torch.ones(1, H), None), many, None
    )
    assert drawn_MH.mean().item() == pytest.approx(1.0, abs=0.01)
    assert drawn_MH.std().item() == pytest.approx(0.5, abs=0.01)
    _, aux = GumbelSoft(top_k=1).draw(
        LatentSource(None, lambda: torch.zeros(len(many), V)), many[:, :1], embed
    )
    assert aux[:, 1].mean().item() == pytest.approx(
        0.5772, abs=0.02
    )  # log p of one token is 0; a Gumbel's mean
    assert aux[:, 1].var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_greedy_draws_the_mode():
    where, mean_MH, logits_MV = source()
    assert torch.equal(Gaussian(sigma=3.0).draw(where, None, embed)[0], mean_MH)
    fed_MH, aux = GumbelSoft(top_k=1).draw(where, None, embed)
    assert torch.equal(fed_MH, embed(logits_MV.argmax(-1))) and torch.equal(
        aux[:, 1], torch.zeros(M)
    )


def test_without_noise_the_user_is_told_and_the_gradient_is_zero():
    treatment, (where, mean_MH, _) = (
        Gaussian(sigma=10.0, sigma_rollout=0),
        source(requires_grad=True),
    )
    latents_MH, _ = treatment.draw(where, uniforms(H), embed)
    treatment.log_density(where, latents_MH.detach()).sum().backward()
    assert torch.equal(mean_MH.grad, torch.zeros_like(mean_MH))
    assert "no latent gradient" in treatment.notes()[0] and Gaussian(sigma=10.0).notes() == []


def test_the_config_group():
    assert parse_treatment(None) == (Mask(), LatentTerms())
    treatment, terms = parse_treatment(
        {"name": "gaussian", "gaussian": {"sigma": 2.0}, "clip_high": 0.3}
    )
    assert treatment == Gaussian(sigma=2.0) and terms.clip_high == 0.3
    own, _ = parse_treatment({"name": f"{__name__}:Own", "options": {"size": 3}})
    assert isinstance(own, Treatment) and own.size == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (5, "latent.treatment: not a group"),
        (["mask"], "latent.treatment: not a group"),
        ({"gaussian": 3}, "latent.treatment.gaussian: not a group"),
        ({"name": "gausian"}, "unknown treatment.*gausian"),
        ({"name": "math:pi"}, "not a treatment"),
        ({"sigma": 1.0}, "unknown key.*sigma"),
        ({"gaussian": {"sigm": 1.0}}, "treatment.gaussian: unknown key"),
        ({"gaussian": {"sigma": 0}}, "sigma: not a width"),
        ({"gaussian": {"sigma": -1.0}}, "sigma: not a width"),
        ({"gaussian": {"sigma_rollout": -1.0}}, "sigma_rollout: not a width"),
        ({"gaussian": {"sigma": math.inf}}, "noise without bound"),
        ({"recompute": {"gradient": "all"}}, "gradient: unknown value"),
        ({"gumbel_soft": {"top_k": 0}}, "top_k: not a count"),
        ({"gumbel_soft": {"tau": 0.0}}, "tau: not a temperature"),
        ({"gumbel_soft": {"clamp": [1.0, 0.0]}}, "clamp: not bounds"),
        ({"clip_low": -0.1}, "clip_low: not usable"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c: not usable"),
        ({"weight": "much"}, "latent.treatment.weight: not usable"),
        ({"kl_kind": "k4"}, "kl_kind: not usable"),
        ({"density_gap_bound": 0}, "density_gap_bound: not usable"),
        ({"options": {"a": 1}}, "options of no treatment"),
    ],
)
def test_what_the_config_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_treatment(values)
