"""The learned width: its density, its draws, its start and its bounds.

The density is compared with torch's Normal and finite differences. (Parameters in the engine, in
checkpoints and in rollouts: test_treated_parameters.py of verl_plugin/worker.)
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments import LatentSource, parse_treatment
from grpo_latent.latent.treatments.gaussian_head import GaussianHead

M, H = 4, 6
CONFIG = SimpleNamespace(hidden_size=H, initializer_range=0.02)


def made(treatment, seed=0, dtype=torch.float64):
    """A model with the head, hidden states, and the source of their latents."""
    generator = torch.Generator().manual_seed(seed)
    model = SimpleNamespace(latent_treatment=treatment.build(CONFIG).to(dtype))
    with torch.no_grad():
        model.latent_treatment.linear.weight.copy_(torch.randn(1, H, generator=generator))
        model.latent_treatment.linear.bias.fill_(0.1)
    hidden_MH = torch.randn(M, H, generator=generator, dtype=torch.float64).to(dtype)
    return model, hidden_MH, LatentSource(hidden_MH, None, treatment.features(model, hidden_MH))


def test_the_density_is_a_normals_up_to_the_declared_constant():
    treatment = GaussianHead(sigma=0.7, sigma_range=3.0)
    _, hidden_MH, source = made(treatment)
    latents_MH = hidden_MH + 0.3
    sigma_M1 = treatment.log_sigma(source).exp()
    assert sigma_M1.min() < 0.6 and sigma_M1.max() > 0.9, "the width depends on h"
    exact_M = Normal(hidden_MH, sigma_M1.expand(M, H)).log_prob(latents_MH).sum(-1)
    dropped = -H * math.log(2 * math.pi) / 2
    torch.testing.assert_close(treatment.log_density(source, latents_MH) + dropped, exact_M)
    by_dimension = GaussianHead(sigma=0.7, sigma_range=3.0, per_dimension=True)
    torch.testing.assert_close(H * by_dimension.log_density(source, latents_MH) + dropped, exact_M)


def test_gradients_to_the_heads_parameters_equal_finite_differences():
    treatment = GaussianHead(sigma=0.7, sigma_range=3.0)
    model, hidden_MH, _ = made(treatment)
    latents_MH = hidden_MH + 0.3

    def density(weight, bias, hidden):
        parameters = {"linear.weight": weight, "linear.bias": bias}
        features_MF = torch.func.functional_call(model.latent_treatment, parameters, (hidden,))
        return treatment.log_density(LatentSource(hidden, None, features_MF), latents_MH)

    linear = model.latent_treatment.linear
    leaves = [
        value.detach().clone().requires_grad_()
        for value in (linear.weight, linear.bias, hidden_MH)
    ]
    assert torch.autograd.gradcheck(density, leaves)
    density(*leaves).sum().backward()
    assert leaves[0].grad.abs().max() > 1e-2 and leaves[1].grad.abs() > 1e-2


def test_draws_have_the_learned_width():
    treatment = GaussianHead(sigma=2.0, sigma_range=4.0)
    _, hidden_MH, source = made(treatment)
    uniforms = torch.rand(
        20_000, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for m in range(M):
        one = LatentSource(hidden_MH[m : m + 1], None, source.features_MF[m : m + 1])
        drawn_MH, aux = treatment.draw(one, uniforms, None)
        sigma = float(treatment.log_sigma(one).exp())
        assert aux is None and float((drawn_MH - hidden_MH[m]).std()) == pytest.approx(
            sigma, rel=0.02
        )
    assert torch.equal(treatment.draw(source, None, None)[0], hidden_MH), "greedy feeds the mean"


def test_the_start_and_the_bounds():
    """Fresh, the width is the option's; whatever the head says, it stays within the range."""
    treatment = GaussianHead(sigma=0.5, sigma_range=4.0)
    torch.manual_seed(0)
    module = treatment.build(CONFIG)
    hidden_MH = 100 * torch.randn(50, H)
    sigma_M1 = treatment.log_sigma(LatentSource(hidden_MH, None, module(hidden_MH))).exp()
    assert (sigma_M1 / 0.5).log().abs().max() < 0.3
    far = treatment.log_sigma(LatentSource(None, None, torch.tensor([[-1e4], [1e4]]))).exp()
    torch.testing.assert_close(far, torch.tensor([[0.125], [2.0]]))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sigma": 0}, "not a width"),
        ({"sigma": math.inf}, "not a width"),
        ({"sigma_range": 1.0}, "not a width"),
        ({"sigma_range": math.nan}, "sigma_range: not a number"),
    ],
)
def test_what_the_config_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_treatment({"name": "gaussian_head", "gaussian_head": values})
