"""What one call of a reward function came to: a finite score, or a typed failure.

Never a 0 that stands for a failure.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_latent.errors import RewardError

OK = "ok"
RESERVED_KEYS = ("dropped", "reward_error")


@dataclass(frozen=True)
class Outcome:
    """What one call came to.

    Attributes:
        kind: `ok`, or one of `RewardError.KINDS` (exception, nan, inf, type, timeout).
        score: the finite score, None unless `ok`.
        extras: what a dict result carried beside `score`: floats, texts, None.
        detail: for failures, what happened: the offending value, or the exception in one line.
        seconds: how long the call took.
        mutated: the call changed its `extra_info`; looked at only when the checker asks.
    """

    kind: str
    score: float | None = None
    extras: dict[str, float | str | None] = field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0
    mutated: bool = False

    @property
    def is_ok(self) -> bool:
        return self.kind == OK


def normalise(result: object, seconds: float = 0.0) -> Outcome:
    """Types what a reward function returned.

    A score is a real number, a bool (True is 1.0), or a numpy or torch scalar; or a dict with such
    a `score`, whose other values are numbers, texts or None. Everything else is of the wrong type:
    a text is not parsed, None is not 0.

    >>> known = normalise({"score": True, "pred": "4"})
    >>> known.score, normalise(None).kind, normalise(float("nan")).kind
    (1.0, 'type', 'nan')
    """
    if not isinstance(result, Mapping):
        kind, value = _scalar(result)
        return Outcome(kind, value, detail=_detail(kind, "it", result), seconds=seconds)
    if "score" not in result:
        return Outcome(
            "type", detail=f"a dict without 'score': {_short(dict(result))}", seconds=seconds
        )
    kind, score = _scalar(result["score"])
    if kind != OK:
        return Outcome(kind, detail=_detail(kind, "'score'", result["score"]), seconds=seconds)
    extras: dict[str, float | str | None] = {}
    for key, value in result.items():
        if key == "score":
            continue
        if not isinstance(key, str) or key in RESERVED_KEYS:
            detail = f"the key {key!r}; keys are texts other than {RESERVED_KEYS}"
            return Outcome("type", detail=detail, seconds=seconds)
        if value is None or isinstance(value, str):
            extras[key] = value
            continue
        kind, extras[key] = _scalar(value)
        if kind != OK:
            return Outcome(kind, detail=_detail(kind, repr(key), value), seconds=seconds)
    return Outcome(OK, score, extras, seconds=seconds)


def to_error(outcome: Outcome, term: str, where: str | None, timeout_s: float) -> RewardError:
    """Makes the error of a failure: it names function, trajectory and remedy."""
    what = {
        "exception": f"reward {term!r} raised an exception",
        "nan": f"reward {term!r} returned nan",
        "inf": f"reward {term!r} returned an infinity",
        "type": f"reward {term!r} returned the wrong type",
        "timeout": f"reward {term!r} did not return within {timeout_s:g} s and was killed",
    }[outcome.kind]
    return RewardError(
        what,
        kind=outcome.kind,
        where=where,
        got=outcome.detail or None,
        expected="a finite float, or a dict with one as 'score'",
        fix="Try the function with `python -m grpo_latent.check_reward <file>`; "
        "latent.reward.on_error=drop leaves such "
        "trajectories out, on_error=score gives them latent.reward.error_score.",
    )


def _scalar(value: object) -> tuple[str, float | None]:
    # numpy and torch, without importing either
    numel, item = getattr(value, "numel", None), getattr(value, "item", None)
    is_one_element = getattr(value, "size", None) == 1 or (callable(numel) and numel() == 1)
    if is_one_element and callable(item):
        value = item()
    if not isinstance(value, numbers.Real):
        return "type", None
    try:
        number = float(value)
    except OverflowError:
        return "inf", None
    if math.isnan(number):
        return "nan", None
    return (OK, number) if math.isfinite(number) else ("inf", None)


def _detail(kind: str, name: str, value: object) -> str:
    return "" if kind == OK else f"{name} is {_short(value)} ({type(value).__name__})"


def _short(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
