"""Several reward functions, one reward: the weighted sum, with every term under its own name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import Outcome


@dataclass(frozen=True)
class Combined:
    """The reward of one completion, and what it is made of.

    Attributes:
        score: Σ weight · score; None if a function failed.
        terms: unweighted score by term, None for a function that failed.
        extras: what dict results carried beside their score: `<key>` from a single function,
            `<term>/<key>` from several.
        failures: (term, outcome) of each function that failed.
    """

    score: float | None
    terms: dict[str, float | None]
    extras: dict[str, float | str | None]
    failures: list[tuple[str, Outcome]]


def combine(specs: Sequence[FunctionSpec], outcomes: Sequence[Outcome]) -> Combined:
    """Combines the outcomes of one completion, one a spec, in the same order.

    >>> specs = [FunctionSpec("a.py", weight=2.0), FunctionSpec("b.py", weight=0.5)]
    >>> combine(specs, [Outcome("ok", 1.0), Outcome("ok", 3.0, {"n": 7.0})])
    Combined(score=3.5, terms={'a': 1.0, 'b': 3.0}, extras={'b/n': 7.0}, failures=[])
    """
    failures = [
        (spec.term, outcome)
        for spec, outcome in zip(specs, outcomes, strict=True)
        if not outcome.is_ok
    ]
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    terms = {spec.term: outcome.score for spec, outcome in zip(specs, outcomes, strict=True)}
    extras = {
        key if len(specs) == 1 else f"{spec.term}/{key}": value
        for spec, outcome in zip(specs, outcomes, strict=True)
        for key, value in outcome.extras.items()
    }
    if failures:
        return Combined(None, terms, extras, failures)
    score = math.fsum(spec.weight * score for spec, score in zip(specs, scores, strict=True))
    # finite scores may still overflow as a sum
    if not math.isfinite(score):
        failures = [("+".join(terms), Outcome("inf", detail=f"the weighted sum of {terms}"))]
        return Combined(None, terms, extras, failures)
    return Combined(score, terms, extras, [])
