"""`RewardRunner` scores completions with a run's functions, in processes that can be killed.

items -> calls (item x function) -> RewardProcess -> Outcomes -> combine -> policy on errors ->
RewardResults
"""

from __future__ import annotations

import math
import queue
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from grpo_latent.errors import ConfigError, RewardError
from grpo_latent.rewards.combine import Combined, combine
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.outcome import to_error
from grpo_latent.rewards.process import Call, RewardProcess

ON_ERROR = ("raise", "drop", "score")
DEFAULT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RewardItem:
    """What verl hands to a reward function, and `where` it comes from for errors.

    Such as "group 17, trajectory 3".
    """

    data_source: str
    solution_str: str
    ground_truth: object
    extra_info: dict = field(default_factory=dict)
    where: str | None = None


@dataclass(frozen=True)
class RewardResult:
    """What a trajectory gets.

    Attributes:
        score: the reward; a stand-in of 0 if `dropped`.
        terms: unweighted score by term; None for a function that failed.
        extras: what the functions reported beside their scores.
        dropped: the trajectory must be left out of training.
        error_kind: one of `RewardError.KINDS` if a function failed, else "".
    """

    score: float
    terms: dict[str, float | None]
    extras: dict[str, float | str | None]
    dropped: bool = False
    error_kind: str = ""

    def info(self) -> dict[str, float | str | None]:
        """Flattens the result for verl's `reward_extra_info`.

        `acc` is the name that verl's validation looks for.
        """
        named = {**self.extras, **self.terms}
        acc = {"acc": named["accuracy"]} if "accuracy" in named and "acc" not in named else {}
        return {
            "score": self.score,
            **named,
            **acc,
            "dropped": float(self.dropped),
            "reward_error": self.error_kind,
        }


class RewardRunner:
    """Runs reward functions under a time-out, and applies one policy to whatever fails.

    Args:
        functions: see `specs_from_config`.
        timeout_s: for each call of each function.
        on_error: `raise` stops the run; `drop` leaves the trajectory out of training; `score`
            gives it `error_score`. All three count the failure in `errors`.
        error_score: the whole reward of a trajectory on which a function failed (`score` only).
        num_processes: functions run in that many processes; more than one helps functions that
            wait, such as a judge behind a network.

    Raises:
        ConfigError: a setting is not usable, or a function cannot be loaded.
    """

    def __init__(
        self,
        functions: Sequence[FunctionSpec],
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_error: str = "raise",
        error_score: float = 0.0,
        num_processes: int = 1,
    ):
        _check_settings(timeout_s, on_error, error_score, num_processes)
        self.functions = list(functions)
        self.timeout_s = float(timeout_s)
        self.on_error = on_error
        self.error_score = float(error_score)
        self.errors: Counter[str] = Counter({kind: 0 for kind in RewardError.KINDS})
        self.num_dropped = 0
        self._processes = [
            RewardProcess(self.functions, self.timeout_s) for _ in range(num_processes)
        ]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def score(self, item: RewardItem) -> RewardResult:
        """Scores one item; several threads may call, and then wait for an idle process."""
        return self.score_many([item])[0]

    def score_many(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Scores items; one result an item, in order.

        Raises:
            RewardError: a function failed and `on_error` is `raise`; names function, trajectory
                and remedy.
        """
        size = -(-len(items) // len(self._processes)) if items else 1
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        if len(chunks) <= 1:
            combined = [c for chunk in chunks for c in self._run_chunk(chunk)]
        else:
            with ThreadPoolExecutor(len(chunks)) as pool:
                combined = [c for chunk in pool.map(self._run_chunk, chunks) for c in chunk]
        return [self._settle(item, c) for item, c in zip(items, combined, strict=True)]

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run_chunk(self, items: Sequence[RewardItem]) -> list[Combined]:
        calls = [Call(f, _arguments(item)) for item in items for f in range(len(self.functions))]
        process = self._idle.get()
        try:
            outcomes = process.run(calls)
        finally:
            self._idle.put(process)
        width = len(self.functions)
        return [
            combine(self.functions, outcomes[i * width : (i + 1) * width])
            for i in range(len(items))
        ]

    def _settle(self, item: RewardItem, combined: Combined) -> RewardResult:
        if combined.score is not None:
            return RewardResult(combined.score, combined.terms, combined.extras)
        term, outcome = combined.failures[0]
        self.errors[outcome.kind] += 1
        if self.on_error == "raise":
            raise to_error(outcome, term, item.where, self.timeout_s)
        dropped = self.on_error == "drop"
        self.num_dropped += dropped
        score = 0.0 if dropped else self.error_score
        return RewardResult(score, combined.terms, combined.extras, dropped, outcome.kind)


def _arguments(item: RewardItem) -> dict:
    return {
        "data_source": item.data_source,
        "solution_str": item.solution_str,
        "ground_truth": item.ground_truth,
        "extra_info": item.extra_info,
    }


def _check_settings(timeout_s, on_error, error_score, num_processes) -> None:
    def number(value) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    for name, value, usable, expected in (
        ("timeout_s", timeout_s, number(timeout_s) and timeout_s > 0, "seconds > 0"),
        ("on_error", on_error, on_error in ON_ERROR, f"one of {ON_ERROR}"),
        ("error_score", error_score, number(error_score), "a finite float"),
        (
            "num_processes",
            num_processes,
            type(num_processes) is int and num_processes > 0,
            "an int > 0",
        ),
    ):
        if not usable:
            raise ConfigError(
                "a setting of the reward is not usable",
                where=f"latent.reward.{name}",
                got=repr(value),
                expected=expected,
            )
