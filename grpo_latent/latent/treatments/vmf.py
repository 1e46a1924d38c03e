"""`vmf`: a latent is an action, its direction drawn from a von Mises-Fisher around that of h.

    mu, u     = m / |m|, z / |z|                   m = h (through the head); on the unit sphere
    fed       z = |m| u,  u ~ vMF(mu, kappa)       as long as h is
    density   log p(u) = kappa (mu · u - 1) = -kappa |u - mu|² / 2
              dropped: log C_H(kappa) + kappa, the same for every policy,
              C_d = kappa^(d/2-1) / ((2 pi)^(d/2) I_{d/2-1}(kappa))
    KL        KL(p || p_ref) = kappa A_H(kappa) (1 - mu · mu_ref)
              A_d = I_{d/2} / I_{d/2-1} = E[u · mu]

The KL is closed, so `kl_coef` weighs the distributions' own distance and no estimate of it;
`kl_kind` is not used. The clip of the latent ratio is latents' own (`latent.treatment.clip_low`,
`clip_high`), whatever the text's is. z at position p pairs with mu of the hidden state at p - 1
(`models.shift`).

Source: Mardia and Jupp, Directional Statistics (2000), section 9.3. kappa = H makes draws of a
middling angle: A = 0.62.

Legend: M latents, H hidden, U uniforms a latent, d dimensions of the sphere's space (H).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.loss_components import (
    Component,
    LatentView,
    anchor,
    clipped_ratio,
)
from grpo_latent.latent.treatments.protocol import LatentSource, Treatment
from grpo_latent.latent.treatments.registry import register
from grpo_latent.latent.treatments.terms import LatentTerms
from grpo_latent.latent.treatments.values import at_least_float, is_number

_LARGEST_KAPPA = 1e6  # beyond, float32 unit vectors are coarser than the distribution
_NODES = 2**16
_HALF_WIDTHS = 30


@register
@dataclass(frozen=True)
class VonMisesFisher(Treatment):
    """Turns h at random, keeping its length, and scores the direction by a vMF density.

    Attributes:
        kappa: concentration; 0 < kappa <= 1e6.
    """

    name: ClassVar[str] = "vmf"
    kappa: float = 1000.0
    is_action = True

    def __post_init__(self) -> None:
        if not is_number(self.kappa) or not 0 < self.kappa <= _LARGEST_KAPPA:
            expected = f"in (0, {_LARGEST_KAPPA:g}]"
            raise ConfigError(
                "not a concentration",
                where="latent.treatment.vmf.kappa",
                got=self.kappa,
                expected=expected,
            )

    def num_uniforms(self, hidden_size: int) -> int:
        return hidden_size + 1

    def draw(
        self, source: LatentSource, uniforms_MU: Tensor | None, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        """Draws z, exact up to a quadrature in float64; the mean itself when greedy.

        One uniform makes mu · u by inversion, H the direction across mu; a rejection scheme (Wood
        1994) would take a number of them that is not known beforehand.
        """
        if uniforms_MU is None:
            return source.mean_MH, None
        mean_MH = source.mean_MH.double()
        length_M1 = mean_MH.norm(dim=-1, keepdim=True)
        mu_MH = unit(mean_MH)
        angle_M1 = draw_angles(mu_MH.shape[-1], self.kappa, uniforms_MU[:, :1])
        normal_MH = torch.special.ndtri(uniforms_MU[:, 1:])
        across_MH = unit(normal_MH - (normal_MH * mu_MH).sum(-1, keepdim=True) * mu_MH)
        drawn_MH = length_M1 * (angle_M1.cos() * mu_MH + angle_M1.sin() * across_MH)
        return drawn_MH.to(source.mean_MH.dtype), None

    def log_density(
        self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None = None
    ) -> Tensor:
        """Log-density -kappa |u - mu|² / 2, of the direction; without log C_H(kappa) + kappa."""
        # the difference of unit vectors keeps the digits that 1 - mu · u would lose
        difference_MH = unit(at_least_float(latents_MH)) - unit(at_least_float(source.mean_MH))
        return -0.5 * self.kappa * difference_MH.square().sum(-1)

    def reads_statistics(self, terms: LatentTerms) -> bool:
        return terms.kl_coef > 0 or super().reads_statistics(terms)

    def components(self, view: LatentView, terms: LatentTerms) -> list[Component]:
        assert view.acts is not None, "latents act, so a micro-batch has acts, be they none"
        found = clipped_ratio(view.acts, terms) + anchor(view, terms)
        if terms.kl_coef:
            mean_MH, ref_MH = view.with_reference("the KL of vMF densities")
            found.append(Component("kl", terms.kl_coef, closed_kl(mean_MH, ref_MH, self.kappa)))
        return found


def unit(vectors: Tensor) -> Tensor:
    """The vectors of the last dimension, scaled to length 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def closed_kl(mean_MH: Tensor, ref_MH: Tensor, kappa: float) -> Tensor:
    """KL [M], nats, between vMF densities of one kappa around two means; gradient to the first."""
    difference_MH = unit(at_least_float(mean_MH)) - unit(at_least_float(ref_MH.detach()))
    return 0.5 * kappa * bessel_ratio(mean_MH.shape[-1], kappa) * difference_MH.square().sum(-1)


@lru_cache(maxsize=64)
def bessel_ratio(d: int, kappa: float) -> float:
    """A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa), the mean of mu · u; d >= 2, kappa > 0.

    By r_v = 1 / (2 (v + 1) / kappa + r_{v+1}) of r_v = I_{v+1} / I_v, from a v so far up that
    Amos' bound (1974), which the recursion starts with, has lost its error: each step scales that
    by r² < 1, n of them by exp(-n² / kappa) or less. All terms are positive, so nothing cancels.

    >>> round(bessel_ratio(3, 2.0), 12) == round(1 / math.tanh(2.0) - 1 / 2.0, 12)
    True
    """
    order = d / 2 - 1
    num_steps = 50 + math.ceil(math.sqrt(40 * kappa))
    top = order + num_steps
    # the start's error shrinks by exp(-40) or more, to below float64's precision
    ratio = kappa / (top + 0.5 + math.hypot(top + 1.5, kappa))
    for step in range(num_steps - 1, -1, -1):
        ratio = 1 / (2 * (order + step + 1) / kappa + ratio)
    return ratio


def draw_angles(d: int, kappa: float, uniforms: Tensor) -> Tensor:
    """Angles between mu and a draw, in [0, pi], float64, one for each of `uniforms`.

    They come from the quantile function of their density.

    Linear within a cell, which is 1e-3 of the density's width: quantiles are off by 1e-6 of that
    width at most.
    """
    angles, cdf = _angle_table_on(uniforms.device, d, kappa)
    uniforms = uniforms.double()
    cell = (
        torch.searchsorted(cdf, uniforms.contiguous(), right=True).clamp(1, cdf.shape[0] - 1) - 1
    )
    # in the far tails the sum no longer grows from cell to cell: 0 / tiny, not 0 / 0
    within = (uniforms - cdf[cell]) / (cdf[cell + 1] - cdf[cell]).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    return angles[cell] + within.clamp(0, 1) * (angles[cell + 1] - angles[cell])


@lru_cache(maxsize=8)
def _angle_table_on(device: torch.device, d: int, kappa: float) -> tuple[Tensor, Tensor]:
    """`_angle_table` on a device, sent there once: a rollout draws at every step."""
    angles, cdf = _angle_table(d, kappa)
    return angles.to(device), cdf.to(device)


@lru_cache(maxsize=8)
def _angle_table(d: int, kappa: float) -> tuple[Tensor, Tensor]:
    """Angles and their cumulative probabilities, float64 on the CPU.

    The angle's density is proportional to exp(kappa cos a) sin(a)^(d-2): smooth even where that of
    cos a is not (d = 2).
    """
    # at the mode kappa sin² a = (d - 2) cos a; 2 kappa / (…) is the root's form that does not
    # cancel for small kappa
    cosine = 2 * kappa / (d - 2 + math.hypot(d - 2, 2 * kappa))
    mode = math.acos(cosine)
    curvature = kappa * cosine + (d - 2) / max(math.sin(mode) ** 2, 1 / kappa)
    width = _HALF_WIDTHS / math.sqrt(curvature)
    low, high = max(0.0, mode - width), min(math.pi, mode + width)
    angles = torch.linspace(low, high, _NODES + 1, dtype=torch.float64)
    log_density = kappa * (angles.cos() - cosine)
    if d > 2:
        # the sine is 0 at the ends, where the density is
        log_density = (
            log_density + (d - 2) * (angles.sin().clamp(min=1e-300) / math.sin(mode)).log()
        )
    density = log_density.exp()
    cdf = torch.nn.functional.pad((density[1:] + density[:-1]).cumsum(0), (1, 0))
    return angles, cdf / cdf[-1]
