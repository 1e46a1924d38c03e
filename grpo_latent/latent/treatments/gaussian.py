"""`gaussian`: a latent is an action, drawn around h (through the head).

    rollout   z = mu + sigma_rollout · eps,  eps ~ N(0, 1)
    density   log p(z) = -|z - mu|² / (2 sigma²)
              dropped: H · (log sigma + log(2 pi) / 2), the same for every policy

The sum over the H dimensions is the true density, and Monet's (2511.21395, "VLPO": sigma 10, no
noise). `per_dimension` divides it by H: the density of a Gaussian with sigma · sqrt(H), whose
ratios stay near 1 at any H. sigma -> inf gives masked GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.protocol import LatentSource, Treatment
from grpo_latent.latent.treatments.registry import register
from grpo_latent.latent.treatments.values import at_least_float, is_number


@register
@dataclass(frozen=True)
class Gaussian(Treatment):
    """Draws z around mu with a fixed width, and scores it by a Gaussian density.

    Attributes:
        sigma: of the density, in units of a latent's components; inf switches the latent term
            off.
        sigma_rollout: of the noise; None takes `sigma`. 0 feeds the mean: the first update after a
            rollout then has no latent gradient (z = mu), later ones pull mu back towards the z of
            rewarded trajectories. Another value than `sigma` makes the ratio that of the density,
            not of the sampler.
        per_dimension: divide the log-density by H.
    """

    name: ClassVar[str] = "gaussian"
    sigma: float = 1.0
    sigma_rollout: float | None = None
    per_dimension: bool = False
    is_action = True

    def __post_init__(self) -> None:
        where = "latent.treatment.gaussian"
        if not is_number(self.sigma) or not self.sigma > 0:
            raise ConfigError(
                "not a width", where=f"{where}.sigma", got=self.sigma, expected="> 0"
            )
        noise = self.sigma_rollout
        if noise is not None and not (is_number(noise) and 0 <= noise < math.inf):
            raise ConfigError(
                "not a width",
                where=f"{where}.sigma_rollout",
                got=noise,
                expected="finite, >= 0, or null",
            )
        if noise is None and self.sigma == math.inf:
            raise ConfigError(
                "noise without bound",
                where=f"{where}.sigma_rollout",
                got="null with sigma inf",
                expected="finite",
            )
        if not isinstance(self.per_dimension, bool):
            raise ConfigError(
                "not a switch",
                where=f"{where}.per_dimension",
                got=self.per_dimension,
                expected="true or false",
            )

    @property
    def noise(self) -> float:
        """Width of the rollout's noise."""
        return self.sigma if self.sigma_rollout is None else self.sigma_rollout

    def notes(self) -> list[str]:
        if self.noise > 0:
            return []
        return [
            "latent.treatment gaussian with sigma_rollout=0: z = mu, so the first update after "
            "each rollout has no latent gradient (as in Monet's VLPO); only further "
            "mini-batches or epochs have one"
        ]

    def num_uniforms(self, hidden_size: int) -> int:
        return hidden_size if self.noise > 0 else 0

    def draw(
        self, source: LatentSource, uniforms_MU: Tensor | None, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        if uniforms_MU is None or self.noise == 0:
            return source.mean_MH, None
        # by inversion, of the trajectory's own numbers: a generator's would depend on the batch
        noise_MH = self.noise * torch.special.ndtri(uniforms_MU).float()
        return (source.mean_MH.float() + noise_MH).to(source.mean_MH.dtype), None

    def log_density(
        self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None = None
    ) -> Tensor:
        """Log-density -|z - mu|² / (2 sigma²), over H if `per_dimension`; no constants."""
        squared_MH = (at_least_float(latents_MH) - at_least_float(source.mean_MH)).square()
        distance_M = squared_MH.mean(-1) if self.per_dimension else squared_MH.sum(-1)
        return -distance_M / (2 * self.sigma**2)
