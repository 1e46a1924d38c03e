"""`check_mechanism` says whether a mechanism keeps what rollout, replay and training rely on.

class, settings ──build_case──▶ a tiny model with it ──CHECKS──▶ outcomes, or `ConformanceError`
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grpo_latent.errors import ConfigError, ConformanceError
from grpo_latent.latent.mechanisms import MECHANISMS, Mechanism
from grpo_latent.testing import decoding, learning
from grpo_latent.testing.cases import BACKBONES, Case, build_case

CHECKS = {
    "declares": decoding.check_declares,
    "rollout_is_replay": decoding.check_rollout_is_replay,
    "recorded_is_made": decoding.check_recorded_is_made,
    "recompute": decoding.check_recompute,
    "ragged": decoding.check_ragged,
    "placeholders": decoding.check_placeholders,
    "batch": decoding.check_batch,
    "longer_run": decoding.check_longer_run,
    "resume": decoding.check_resume,
    "saves": learning.check_saves,
    "gradients": learning.check_gradients,
    "ablations": learning.check_ablations,
    "refusals": learning.check_refusals,
}


@dataclass(frozen=True)
class Outcome:
    """A check that passed on a backbone; `skipped` says why there was nothing to check."""

    check: str
    backbone: str
    skipped: str | None = None


def check_mechanism(
    cls: type[Mechanism] | str,
    *,
    checks: Iterable[str] = tuple(CHECKS),
    backbones: Iterable[str] = tuple(BACKBONES),
    **settings,
) -> list[Outcome]:
    """Runs the checks on tiny models that are built here; about ten seconds.

    Args:
        cls: the class, its name in the registry, or package.module:Class.
        checks: names of `CHECKS`.
        backbones: names of tiny models. A mechanism that inserts image embeddings is not run on
            one without images.
        settings: of the mechanism, as `Mechanism.from_tokens` takes them.

    Raises:
        ConformanceError: a promise is broken; `where` is check, backbone and mechanism.
        ConfigError: an unknown check, backbone or setting.
    """
    cls = MECHANISMS.find(cls, "latent.mechanism") if isinstance(cls, str) else cls
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise ConfigError(
            "unknown checks", where="checks", got=unknown, expected=f"some of {tuple(CHECKS)}"
        )
    outcomes = []
    for backbone in backbones:
        case = build_case(cls, backbone, dict(settings))
        if case.mechanism.top_k_image and not case.adapter.has_vision:
            outcomes += [
                Outcome(name, backbone, "no image embeddings to insert") for name in checks
            ]
            continue
        outcomes += [Outcome(name, backbone, _run(name, case)) for name in checks]
    return outcomes


def _run(name: str, case: Case) -> str | None:
    where = f"check {name!r} of {case.mechanism.key()} on {case.backbone}"
    try:
        return CHECKS[name](case)
    except ConformanceError as error:
        raise ConformanceError(
            error.what, where=where, got=error.got, expected=error.expected, fix=error.fix
        ) from error
    except Exception as error:
        raise ConformanceError(
            "the check could not run to its end",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="no error",
        ) from error
