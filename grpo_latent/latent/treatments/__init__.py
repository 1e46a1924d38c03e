"""The treatment axis: what RL makes of latent positions. One file a treatment, one protocol.

    name           the rollout feeds       training feeds          the loss has at latents
    mask           h                       what was recorded       nothing
    recompute      h                       the current policy's h  nothing; gradient through text
    gaussian       h + noise               what was recorded       a clipped ratio and a KL
    gaussian_head  h + noise of a width that is learned by the same loss; else as gaussian
    gumbel_soft    top-k token mixture     what was recorded       a clipped ratio and a KL
    vmf            h, turned at random     what was recorded       a clipped ratio and a closed KL

Sources: mask 2509.24251; recompute 2509.24251 and 2511.21395; gaussian 2511.21395 (VLPO);
gumbel_soft 2511.06411; vmf, the von Mises-Fisher distribution.

Any of them takes the latent anchor, a pull of the prediction at each latent position towards the
reference's.

A treatment of your own is a subclass of `Treatment` in any module that the workers can import:
`latent.treatment.name=package.module:Class`, its options as
`+latent.treatment.options.<name>=<value>`.

HRPO's hybrid gate (2505.18454) is no treatment but a mechanism: the input of each sampled token is
composed of its embedding and a recorded vector (MIXED). There the token is the action, so only
`mask` and `recompute` go with such a mechanism: see `Treatment.check`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from grpo_latent.common.settings import build, check_keys
from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.gaussian import Gaussian
from grpo_latent.latent.treatments.gaussian_head import GaussianHead
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.latent.treatments.mask import Mask
from grpo_latent.latent.treatments.protocol import GRADIENTS, LatentSource, Treatment
from grpo_latent.latent.treatments.recompute import Recompute
from grpo_latent.latent.treatments.terms import LatentTerms
from grpo_latent.latent.treatments.vmf import VonMisesFisher

__all__ = [
    "GRADIENTS",
    "TREATMENTS",
    "LatentSource",
    "LatentTerms",
    "Mask",
    "Treatment",
    "parse_treatment",
    "to_dict",
]

TREATMENTS: dict[str, type[Treatment]] = {
    "mask": Mask,
    "recompute": Recompute,
    "gaussian": Gaussian,
    "gaussian_head": GaussianHead,
    "gumbel_soft": GumbelSoft,
    "vmf": VonMisesFisher,
}
OWN_OPTIONS = "options"


def parse_treatment(values: Mapping[str, Any] | None) -> tuple[Treatment, LatentTerms]:
    """Builds the treatment and the loss settings that the group `latent.treatment` names.

    The group has `name`, the options of each treatment under its name, and the fields of
    `LatentTerms`.

    >>> group = {"name": "gaussian", "gaussian": {"sigma": 10.0, "sigma_rollout": 0}}
    >>> parse_treatment(group)[0]
    Gaussian(sigma=10.0, sigma_rollout=0, per_dimension=False)

    Raises:
        ConfigError: an unknown treatment, key or value; options of the treatments that are not
            chosen count, too.
    """
    values = _mapping(values, "latent.treatment")
    name = values.pop("name", "mask")
    groups = {
        key: _mapping(values.pop(key), f"latent.treatment.{key}")
        for key in (*TREATMENTS, OWN_OPTIONS)
        if key in values
    }
    known = [field.name for field in dataclasses.fields(LatentTerms)]
    check_keys(values, ["name", *TREATMENTS, OWN_OPTIONS, *known], "latent.treatment")
    terms = build(LatentTerms, values, "latent.treatment")
    # the options of those that are not chosen are built, too: a typo there would else wait for the
    # day on which another name is set
    built = {
        key: build(TREATMENTS[key], groups.get(key, {}), f"latent.treatment.{key}")
        for key in TREATMENTS
    }
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


def to_dict(treatment: Treatment) -> dict[str, Any]:
    """A treatment as the group `latent.treatment` names it, for another process.

    >>> parse_treatment(to_dict(Gaussian(sigma=10.0)))[0]
    Gaussian(sigma=10.0, sigma_rollout=None, per_dimension=False)
    """
    kind = type(treatment)
    options = dataclasses.asdict(treatment)
    for name, known in TREATMENTS.items():
        if kind is known:
            return {"name": name, name: options}
    return {"name": f"{kind.__module__}:{kind.__qualname__}", OWN_OPTIONS: options}


def _mapping(values: Any, where: str) -> dict:
    if not isinstance(values or {}, Mapping):
        raise ConfigError(
            "not a group of settings", where=where, got=values, expected="keys and values"
        )
    return dict(values or {})


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
        raise ConfigError(
            "not a treatment",
            where="latent.treatment.name",
            got=name,
            expected="a Treatment subclass",
        )
    return found
