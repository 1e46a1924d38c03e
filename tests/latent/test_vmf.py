"""The von Mises-Fisher treatment against independent computations.

They are a series in decimals, closed forms on the sphere, quadrature, finite differences and
moments. (Rollout = replay and the loss through the engine: test_sources.py,
test_treated_engine.py.)
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.treatments import LatentSource, LatentTerms, parse_treatment
from grpo_latent.latent.treatments.loss_components import Acts, LatentView
from grpo_latent.latent.treatments.vmf import (
    VonMisesFisher,
    bessel_ratio,
    closed_kl,
    draw_angles,
    unit,
)


def series_ratio(d, kappa):
    """I_{d/2} / I_{d/2-1} by their power series, 60 digits; all terms are positive."""
    with localcontext() as context:
        context.prec = 60
        quarter, order = Decimal(kappa) ** 2 / 4, Decimal(d) / 2 - 1
        sums = []
        for shift in (1, 2):  # sum over k of (kappa²/4)^k / (k! (order + shift)_k)
            term = total = Decimal(1)
            k = 0
            while term > total * Decimal(10) ** -40 or k * k < quarter:
                term = term * quarter / ((k + 1) * (order + shift + k))
                total, k = total + term, k + 1
            sums.append(total)
        return float(Decimal(kappa) / 2 / (order + 1) * sums[1] / sums[0])


@pytest.mark.parametrize("d", [2, 3, 16, 511, 3584, 8192])
@pytest.mark.parametrize("kappa", [0.1, 1.0, 30.0, 1e3, 2e4])
def test_the_bessel_ratio(d, kappa):
    assert bessel_ratio(d, kappa) == pytest.approx(series_ratio(d, kappa), rel=1e-13)


@pytest.mark.parametrize("d", [2, 8192])
def test_the_bessel_ratio_at_the_largest_concentration(d):
    assert bessel_ratio(d, 1e5) == pytest.approx(series_ratio(d, 1e5), rel=1e-13)


@pytest.mark.parametrize("kappa", [0.1, 2.0, 700.0, 1e5])
def test_the_bessel_ratio_on_the_sphere(kappa):
    """coth kappa - 1 / kappa in three dimensions.

    The recurrence of Bessel functions leads from there to five.
    """
    third = 1 / math.tanh(kappa) - 1 / kappa
    assert bessel_ratio(3, kappa) == pytest.approx(third, rel=1e-10)
    assert 1 / bessel_ratio(3, kappa) - bessel_ratio(5, kappa) == pytest.approx(
        3 / kappa, rel=1e-6, abs=1e-12
    )


def source_of(mean_MH):
    return LatentSource(mean_MH, None)


def test_hand_numbers():
    """At right angles |u - mu|² = 2, opposite 4, in the direction of mu 0; lengths have no say."""
    latents_MH = torch.tensor([[0.0, 5.0], [-0.1, 0.0], [7.0, 0.0]])
    density_M = VonMisesFisher(kappa=3.0).log_density(
        source_of(torch.tensor([[2.0, 0.0]])), latents_MH
    )
    assert density_M.tolist() == [-3.0, -6.0, 0.0]


@pytest.mark.parametrize("kappa", [0.5, 4.0, 40.0])
def test_the_density_is_normalised_by_the_declared_constant(kappa):
    """exp(log_density) times the declared constant integrates to 1 over the sphere.

    The constant is C_3 e^kappa, C_3 = kappa / (4 pi sinh kappa); on a grid of angles.
    """
    theta = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
    points = torch.stack([theta.cos(), theta.sin(), torch.zeros_like(theta)], -1)
    mean = torch.tensor([[1.7, 0.0, 0.0]], dtype=torch.float64)
    log_density = VonMisesFisher(kappa).log_density(source_of(mean), points)
    dropped = math.log(kappa / (4 * math.pi * math.sinh(kappa))) + kappa
    integral = ((log_density + dropped).exp() * 2 * math.pi * theta.sin()).sum() * math.pi / 20_000
    assert float(integral) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kappa", [0.7, 50.0])
def test_gradients_equal_finite_differences(kappa):
    generator = torch.Generator().manual_seed(0)
    mean_MH, ref_MH, latents_MH = (
        torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    treatment = VonMisesFisher(kappa)
    density = lambda mean: treatment.log_density(source_of(mean), latents_MH)  # noqa: E731
    assert torch.autograd.gradcheck(density, mean_MH.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda mean: closed_kl(mean, ref_MH, kappa), mean_MH.clone().requires_grad_()
    )
    reference = ref_MH.clone().requires_grad_()
    closed_kl(mean_MH.requires_grad_(), reference, kappa).sum().backward()
    assert reference.grad is None and mean_MH.grad.abs().max() > 1e-2


def test_a_shifted_pairing_has_another_density():
    """Negative control: z of the next latent under mu of this one."""
    mean_MH = torch.eye(5, dtype=torch.float64)
    latents_MH = mean_MH + 0.01
    treatment = VonMisesFisher(20.0)
    paired_M = treatment.log_density(source_of(mean_MH), latents_MH)
    assert (
        paired_M.min() > -0.1
        and treatment.log_density(source_of(mean_MH), latents_MH.roll(1, 0)).max() < -10
    )


def uniforms(count, size, seed=0):
    return torch.rand(
        count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_angles_on_the_sphere_equal_the_closed_quantiles():
    """In three dimensions an angle's quantile has a closed form, and falls with cos a.

    cos a = 1 + log(q + (1 - q) e^(-2 kappa)) / kappa at the quantile q of cos a.
    """
    q = (torch.arange(999, dtype=torch.float64) + 1) / 1000
    for kappa in (0.1, 3.0, 200.0):
        expected = 1 + (q + (1 - q) * math.exp(-2 * kappa)).log() / kappa
        torch.testing.assert_close(draw_angles(3, kappa, 1 - q).cos(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("d", [2, 3, 24, 512])
@pytest.mark.parametrize("kappa", [0.1, 5.0, 300.0])
def test_draws_have_the_distributions_moments(d, kappa):
    """E[mu·u] = A, E[(mu·u)²] = 1 - (d-1) A / kappa.

    Across mu no direction is preferred; lengths stay those of h.
    """
    count, generator = 20_000, torch.Generator().manual_seed(1)
    mean_MH = 3.0 * torch.randn(1, d, generator=generator, dtype=torch.float64)
    treatment = VonMisesFisher(kappa)
    drawn_MH, aux = treatment.draw(
        source_of(mean_MH), uniforms(count, treatment.num_uniforms(d)), None
    )
    assert aux is None and drawn_MH.shape == (count, d)
    torch.testing.assert_close(drawn_MH.norm(dim=-1), mean_MH.norm(dim=-1).expand(count))
    along_M = (unit(drawn_MH) * unit(mean_MH)).sum(-1)
    first, second = bessel_ratio(d, kappa), 1 - (d - 1) * bessel_ratio(d, kappa) / kappa
    spread = math.sqrt(max(second - first**2, 0.0))
    assert float(along_M.mean()) == pytest.approx(first, abs=5 * spread / math.sqrt(count))
    assert float(along_M.square().mean()) == pytest.approx(
        second, abs=10 * spread / math.sqrt(count)
    )
    across_MH = unit(drawn_MH) - along_M[:, None] * unit(mean_MH)
    sizes = across_MH.norm(dim=-1).mean()
    assert across_MH.mean(0).abs().max() < 6 * sizes / math.sqrt(count)


def test_the_closed_kl_is_the_mean_of_the_log_ratio():
    d, kappa, count = 12, 8.0, 200_000
    generator = torch.Generator().manual_seed(2)
    mean_MH, ref_MH = (
        torch.randn(1, d, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    treatment = VonMisesFisher(kappa)
    drawn_MH, _ = treatment.draw(source_of(mean_MH), uniforms(count, d + 1), None)
    ratio_M = treatment.log_density(source_of(mean_MH), drawn_MH) - treatment.log_density(
        source_of(ref_MH), drawn_MH
    )
    expected = float(closed_kl(mean_MH, ref_MH, kappa))
    assert float(ratio_M.mean()) == pytest.approx(
        expected, abs=5 * float(ratio_M.std()) / math.sqrt(count)
    )
    assert expected > 1 and float(closed_kl(3 * ref_MH, ref_MH, kappa)) == pytest.approx(
        0.0, abs=1e-12
    )


def test_greedy_feeds_the_mean():
    mean_MH = torch.randn(3, 5)
    assert torch.equal(VonMisesFisher().draw(source_of(mean_MH), None, None)[0], mean_MH)


def view(reference=True):
    generator = torch.Generator().manual_seed(3)
    new_M, old_M, ref_M, advantages_M = (torch.randn(4, generator=generator) for _ in range(4))
    mean_MH, ref_MH = (torch.randn(4, 6, generator=generator) for _ in range(2))
    return LatentView(
        Acts(new_M, old_M, ref_M, advantages_M), mean_MH, ref_MH if reference else None
    )


def test_components():
    """The ratio is clipped by the latents' own bounds.

    The KL is the closed one and not that of the densities.
    """
    terms = LatentTerms(clip_low=0.05, clip_high=0.4, clip_ratio_c=None, kl_coef=0.3, weight=0.7)
    seen = view()
    found = {
        component.name: component for component in VonMisesFisher(9.0).components(seen, terms)
    }
    acts = seen.acts
    ratio_M = (acts.log_probs_A - acts.old_log_probs_A).exp()
    losses_M = -torch.minimum(
        ratio_M * acts.advantages_A, ratio_M.clamp(0.95, 1.4) * acts.advantages_A
    )
    torch.testing.assert_close(found["pg_loss"].values, losses_M)
    cosine_M = torch.nn.functional.cosine_similarity(seen.statistics_MS, seen.ref_statistics_MS)
    torch.testing.assert_close(
        found["kl"].values, 9.0 * bessel_ratio(6, 9.0) * (1 - cosine_M), rtol=1e-5, atol=1e-6
    )
    assert found["kl"].weight == 0.3 and found["pg_loss"].weight == 0.7
    assert VonMisesFisher().reads_statistics(terms) and not VonMisesFisher().reads_statistics(
        LatentTerms()
    )
    with pytest.raises(LatentMismatchError, match="no reference for the KL"):
        VonMisesFisher().components(view(reference=False), terms)


@pytest.mark.parametrize("kappa", [0, -1.0, math.inf, math.nan, 1e7])
def test_what_the_config_refuses(kappa):
    what = "a number" if math.isnan(kappa) else "a concentration"
    with pytest.raises(ConfigError, match=f"kappa: not {what}"):
        parse_treatment({"name": "vmf", "vmf": {"kappa": kappa}})
