"""Settings of the loss at latents that every treatment has: fields of `latent.treatment`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.values import is_number

BY_COUNT = "by_count"


@dataclass(frozen=True)
class LatentTerms:
    """Weighs the loss terms at latents, which are reduced as the text's and added to its loss.

        weight · clipped ratio of the log-densities
            + kl_coef · KL to the reference + anchor_weight · anchor

    Attributes:
        weight: of the policy term, for treatments that act. `by_count`: text and latents share
            one mean, over all positions that act (Monet's VLPO; loss_agg_mode token-mean). Each
            then weighs by its number, the KL with it.
        clip_low, clip_high: of the latent ratio (Monet: 0.2 and 0.3).
        clip_ratio_c: dual clip of the latent ratio where the advantage is negative, as the text's;
            None for none.
        log_ratio_bound: the log-ratio is clamped to ± this before exp (Monet: 10).
        kl_coef, kl_kind: KL of the log-densities to the reference's; k1, k2 or k3.
        anchor_weight: of mean_H (mu - mu_ref)² / var_H(mu_ref), mu the current model's prediction
            at a latent position; by the variance of the reference's own vector, so that it does
            not depend on the batch.
        density_gap_bound: as latent.replay_logp_gap_bound, of log-densities; None takes that one.
    """

    weight: float | str = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_ratio_c: float | None = 3.0
    log_ratio_bound: float = 10.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    anchor_weight: float = 0.0
    density_gap_bound: float | None = None

    def __post_init__(self) -> None:
        self._check(
            "weight",
            self.is_by_count or is_number(self.weight) and 0 <= self.policy_weight < math.inf,
            f"finite, >= 0, or {BY_COUNT}",
        )
        for name in ("clip_low", "clip_high", "kl_coef", "anchor_weight"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "finite, >= 0")
        self._check(
            "clip_ratio_c",
            self.clip_ratio_c is None or 1 < self.clip_ratio_c < math.inf,
            "finite, > 1, or null",
        )
        self._check("log_ratio_bound", 0 < self.log_ratio_bound < math.inf, "finite, > 0")
        self._check("kl_kind", self.kl_kind in ("k1", "k2", "k3"), "k1, k2 or k3")
        self._check(
            "density_gap_bound",
            self.density_gap_bound is None or self.density_gap_bound > 0,
            "> 0 or null",
        )

    @property
    def is_by_count(self) -> bool:
        """Whether text and latents share one mean."""
        return self.weight == BY_COUNT

    @property
    def policy_weight(self) -> float:
        """Of the policy term, before it is weighed by count."""
        return 1.0 if isinstance(self.weight, str) else self.weight

    def _check(self, name: str, holds: bool, expected: str) -> None:
        value = getattr(self, name)
        is_typed = value is None or is_number(value) or name in ("kl_kind", "weight")
        if not (is_typed and holds):
            raise ConfigError(
                "not usable", where=f"latent.treatment.{name}", got=value, expected=expected
            )
