"""`gaussian_head`: a latent is an action, drawn around h with a width that the policy learns.

    log sigma = log(sigma) + r tanh(w · norm(h) + b),       r = log(sigma_range)
                norm: to mean 0 and variance 1 over H
    rollout   z = mu + sigma(h) · eps,  eps ~ N(0, 1)       mu = h (through the head)
    density   log p(z) = -|z - mu|² / (2 sigma²) - H log sigma
              dropped: H log(2 pi) / 2, the same for every policy

w and b are parameters of the model: optimised by the latent loss, saved with the checkpoint, sent
to rollouts. So the policy may explore where it pays, and be exact elsewhere; `gaussian` has one
sigma, and H log sigma is a constant of it. The tanh keeps sigma within a factor `sigma_range` of
the start: a width that runs to 0 makes any later ratio explode.

Legend: M latents, H hidden, U uniforms a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.protocol import PARAMETERS_ATTRIBUTE, LatentSource, Treatment
from grpo_latent.latent.treatments.registry import register
from grpo_latent.latent.treatments.values import at_least_float, is_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LogWidth(nn.Module):
    """Maps h to w · norm(h) + b, one number a latent, near 0 at the start."""

    def __init__(self, text_config: PretrainedConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(text_config.hidden_size, 1)
        nn.init.normal_(self.linear.weight, std=text_config.initializer_range)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_MH: Tensor) -> Tensor:
        normed_MH = nn.functional.layer_norm(hidden_MH, hidden_MH.shape[-1:])
        return self.linear(normed_MH)


@register
@dataclass(frozen=True)
class GaussianHead(Treatment):
    """Draws z around mu with a width that h decides, and scores it by that density.

    Attributes:
        sigma: of the start, in units of a latent's components.
        sigma_range: factor > 1 by which the learned width may leave it, up or down.
        per_dimension: divide the log-density by H, so that ratios stay near 1 at any H.
    """

    name: ClassVar[str] = "gaussian_head"
    sigma: float = 1.0
    sigma_range: float = 10.0
    per_dimension: bool = False
    is_action = True

    def __post_init__(self) -> None:
        where = "latent.treatment.gaussian_head"
        for name, least in (("sigma", 0), ("sigma_range", 1)):
            value = getattr(self, name)
            if not is_number(value) or not least < value < math.inf:
                raise ConfigError(
                    "not a width",
                    where=f"{where}.{name}",
                    got=value,
                    expected=f"finite, > {least}",
                )

    def build(self, text_config: PretrainedConfig) -> nn.Module:
        return LogWidth(text_config)

    def features(self, model: nn.Module, hidden_MH: Tensor) -> Tensor:
        return getattr(model, PARAMETERS_ATTRIBUTE)(hidden_MH)

    def log_sigma(self, source: LatentSource) -> Tensor:
        """log sigma of each latent, float [M, 1], with gradient to the head's parameters."""
        assert source.features_MF is not None, "a treatment with parameters gets their features"
        bounded_M1 = at_least_float(source.features_MF).tanh()
        return math.log(self.sigma) + math.log(self.sigma_range) * bounded_M1

    def num_uniforms(self, hidden_size: int) -> int:
        return hidden_size

    def draw(
        self, source: LatentSource, uniforms_MU: Tensor | None, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        if uniforms_MU is None:
            return source.mean_MH, None
        noise_MH = self.log_sigma(source).exp() * torch.special.ndtri(uniforms_MU)
        return (at_least_float(source.mean_MH) + noise_MH).to(source.mean_MH.dtype), None

    def log_density(
        self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None = None
    ) -> Tensor:
        """Log-density of z under sigma(h), over H if `per_dimension`; without H log(2 pi) / 2."""
        log_sigma_M1 = self.log_sigma(source)
        scaled_MH = (at_least_float(latents_MH) - at_least_float(source.mean_MH)) * (
            -log_sigma_M1
        ).exp()
        terms_MH = -0.5 * scaled_MH.square() - log_sigma_M1
        return terms_MH.mean(-1) if self.per_dimension else terms_MH.sum(-1)
