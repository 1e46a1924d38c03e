"""A treatment out of the config group `latent.treatment`, and back for another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_latent.common.settings import build, check_keys
from grpo_latent.errors import ConfigError
from grpo_latent.latent.treatments.protocol import Treatment
from grpo_latent.latent.treatments.registry import TREATMENTS
from grpo_latent.latent.treatments.terms import LatentTerms

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
    own = TREATMENTS.find(name, "latent.treatment.name")
    return build(own, groups.get(OWN_OPTIONS, {}), "latent.treatment.options"), terms


def to_dict(treatment: Treatment) -> dict[str, Any]:
    """A treatment as the group `latent.treatment` names it, for another process.

    >>> parse_treatment(to_dict(TREATMENTS["gaussian"](sigma=10.0)))[0]
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
