"""`check_mechanism` says whether a mechanism keeps what rollout, replay and training rely on.

class, settings ──build_case──▶ a tiny model with it ──CHECKS──▶ outcomes, or `ConformanceError`

`python -m grpo_latent.check_mechanism` goes on where one fails, and prints a line a check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
    """What a check came to on a backbone.

    Attributes:
        skipped: why there was nothing to check; None where it ran.
        failure: the promise that is broken; None where all hold.
    """

    check: str
    backbone: str
    skipped: str | None = None
    failure: ConformanceError | None = None


class Outcomes(list[Outcome]):
    """Outcomes that print as a line a check, with details of what fails."""

    def __repr__(self) -> str:
        names = list(dict.fromkeys(outcome.check for outcome in self))
        width = max(map(len, names), default=0)
        lines = [f"{name:{width}}  {self._line(name)}" for name in names]
        lines += [str(outcome.failure) for outcome in self if outcome.failure]
        num_failed = len({outcome.check for outcome in self if outcome.failure})
        end = f"{num_failed} failed" if num_failed else "none failed"
        return "\n".join([*lines, f"{len(names)} checks, {end}"])

    def _line(self, name: str) -> str:
        """What one check came to on all backbones: `ok on qwen3; skipped on …: no parameters`."""
        backbones: dict[str, list[str]] = {}
        for outcome in self:
            if outcome.check == name:
                said = "FAILED" if outcome.failure else "skipped" if outcome.skipped else "ok"
                why = f": {outcome.skipped}" if outcome.skipped else ""
                backbones.setdefault(f"{said} on {{}}{why}", []).append(outcome.backbone)
        return "; ".join(said.format(", ".join(names)) for said, names in backbones.items())


def check_mechanism(
    cls: type[Mechanism] | str,
    *,
    checks: Iterable[str] = tuple(CHECKS),
    backbones: Iterable[str] = tuple(BACKBONES),
    **settings,
) -> Outcomes:
    """Runs the checks on tiny models that are built here, to the first that fails; some seconds.

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
    outcomes = Outcomes()
    for outcome in run_checks(cls, checks, backbones, settings):
        if outcome.failure is not None:
            raise outcome.failure
        outcomes.append(outcome)
    return outcomes


def run_checks(
    cls: type[Mechanism] | str,
    checks: Iterable[str],
    backbones: Iterable[str],
    settings: dict[str, Any],
) -> Iterator[Outcome]:
    """Runs the checks in order; those behind one that fails run when they are asked for.

    Raises:
        ConfigError: as `check_mechanism`.
    """
    cls = MECHANISMS.find(cls, "latent.mechanism") if isinstance(cls, str) else cls
    checks = list(checks)
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise ConfigError(
            "unknown checks", where="checks", got=unknown, expected=f"some of {tuple(CHECKS)}"
        )
    for backbone in backbones:
        case = build_case(cls, backbone, dict(settings))
        has_nothing_to_insert = case.mechanism.top_k_image and not case.adapter.has_vision
        for name in checks:
            if has_nothing_to_insert:
                yield Outcome(name, backbone, "no image embeddings to insert")
            else:
                yield _run(name, case)


def _run(name: str, case: Case) -> Outcome:
    where = f"check {name!r} of {case.mechanism.key()} on {case.backbone}"
    try:
        return Outcome(name, case.backbone, CHECKS[name](case))
    except ConformanceError as error:
        failure = ConformanceError(
            error.what, where=where, got=error.got, expected=error.expected, fix=error.fix
        )
        failure.__cause__ = error
    except Exception as error:
        failure = ConformanceError(
            "the check could not run to its end",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="no error",
        )
        failure.__cause__ = error
    return Outcome(name, case.backbone, failure=failure)
