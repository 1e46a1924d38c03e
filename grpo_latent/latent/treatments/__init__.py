"""The treatment axis: what RL makes of latent positions. One file a treatment, one protocol (`protocol.Treatment`).

    name          fed in the rollout     training forward feeds    at latents the loss has             source
    mask          h                      what was recorded         nothing                             2509.24251
    recompute     h                      the current policy's h    nothing; gradient through the text  2509.24251, 2511.21395
    gaussian      h + noise              what was recorded         a clipped ratio and a KL            2511.21395 (VLPO)
    gumbel_soft   top-k token mixture    what was recorded         a clipped ratio and a KL            2511.06411

Any of them takes the latent anchor, a pull of the prediction at each latent position towards the reference's.

A treatment of your own is a subclass of `Treatment` in any module that the workers can import:
`latent.treatment.name=package.module:Class`, its options as `+latent.treatment.options.<name>=<value>`.

HRPO's hybrid gate (2505.18454) is not on this axis. It has no latent positions: the input of every token is a gated mixture
of its own embedding and the last soft mixture, with a trained gate, so a token is an ordinary action *and* its input vector
is recorded. That changes what a TEXT position feeds, in rollout and in replay: a mechanism (trigger "always"), to which
masking, gradients and this axis would then apply as they are.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_latent.common.settings import build, check_keys
from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.gaussian import Gaussian, is_number
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.latent.treatments.mask import Mask
from grpo_latent.latent.treatments.protocol import GRADIENTS, LatentSource, Treatment
from grpo_latent.latent.treatments.recompute import Recompute

__all__ = ["GRADIENTS", "TREATMENTS", "LatentSource", "LatentTerms", "Mask", "Treatment", "parse_treatment"]

TREATMENTS: dict[str, type[Treatment]] = {
    "mask": Mask,
    "recompute": Recompute,
    "gaussian": Gaussian,
    "gumbel_soft": GumbelSoft,
}
OWN_OPTIONS = "options"


@dataclass(frozen=True)
class LatentTerms:
    """The loss terms at latent positions, each a mean over latents reduced as the text's, beside the text's own loss.

        weight · clipped ratio of the log-densities + kl_coef · KL to the reference + anchor_weight · anchor

    Attributes:
        weight: of the policy term, for treatments that act.
        clip_low, clip_high: of the latent ratio (Monet: 0.2 and 0.3).
        clip_ratio_c: dual clip of the latent ratio where the advantage is negative, as the text's; None for none.
        log_ratio_bound: the log-ratio is clamped to ± this before exp (Monet: 10).
        kl_coef, kl_kind: KL of the log-densities to the reference's; k1, k2 or k3.
        anchor_weight: of mean_H (mu - mu_ref)² / var_H(mu_ref), mu the current model's prediction at a latent position; by
            the variance of the reference's own vector, so that it does not depend on the batch.
        density_gap_bound: as latent.replay_logp_gap_bound, of log-densities; None takes that one.
    """

    weight: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_ratio_c: float | None = 3.0
    log_ratio_bound: float = 10.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    anchor_weight: float = 0.0
    density_gap_bound: float | None = None

    def __post_init__(self):
        for name in ("weight", "clip_low", "clip_high", "kl_coef", "anchor_weight"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "finite, >= 0")
        self._check(
            "clip_ratio_c", self.clip_ratio_c is None or 1 < self.clip_ratio_c < math.inf, "finite, > 1, or null"
        )
        self._check("log_ratio_bound", 0 < self.log_ratio_bound < math.inf, "finite, > 0")
        self._check("kl_kind", self.kl_kind in ("k1", "k2", "k3"), "k1, k2 or k3")
        self._check("density_gap_bound", self.density_gap_bound is None or self.density_gap_bound > 0, "> 0 or null")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        value = getattr(self, name)
        is_typed = isinstance(value, str) if name == "kl_kind" else value is None or is_number(value)
        if not (is_typed and holds):
            raise ConfigError("not usable", where=f"latent.treatment.{name}", got=value, expected=expected)


def parse_treatment(values: Mapping[str, Any] | None) -> tuple[Treatment, LatentTerms]:
    """The group `latent.treatment`: `name`, the options of each treatment under its name, and the fields of `LatentTerms`.

    >>> parse_treatment({"name": "gaussian", "gaussian": {"sigma": 10.0, "sigma_rollout": 0}, "clip_high": 0.3})[0]
    Gaussian(sigma=10.0, sigma_rollout=0, per_dimension=False)

    Raises:
        ConfigError: an unknown treatment, key or value; options of the treatments that are not chosen count, too.
    """
    values = dict(values or {})
    name = values.pop("name", "mask")
    groups = {key: dict(values.pop(key) or {}) for key in (*TREATMENTS, OWN_OPTIONS) if key in values}
    known = [field.name for field in dataclasses.fields(LatentTerms)]
    check_keys(values, ["name", *TREATMENTS, OWN_OPTIONS, *known], "latent.treatment")
    terms = build(LatentTerms, values, "latent.treatment")
    built = {key: build(TREATMENTS[key], groups.get(key, {}), f"latent.treatment.{key}") for key in TREATMENTS}
    if name in built:
        if groups.get(OWN_OPTIONS):
            raise ConfigError(
                "options of no treatment",
                where="latent.treatment.options",
                got=groups[OWN_OPTIONS],
                expected=f"latent.treatment.{name}, or a treatment of your own",
            )
        return built[name], terms
    return build(_import(name), groups.get(OWN_OPTIONS, {}), "latent.treatment.options"), terms


def _import(name: Any) -> type[Treatment]:
    module_name, _, class_name = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "unknown treatment",
            where="latent.treatment.name",
            got=f"{name} ({error})",
            expected=f"one of {tuple(TREATMENTS)}, or package.module:Class",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Treatment)):
        raise ConfigError("not a treatment", where="latent.treatment.name", got=name, expected="a Treatment subclass")
    return found
