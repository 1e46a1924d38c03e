"""Settings of the alarms: `latent.alarm` of the training config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import ConfigError

# in the order in which their lines come
FAULTS = (
    "vanished",
    "unused",
    "reward",
    "held_out",
    "silent",
    "form",
    "entropy",
    "length",
    "kl",
)
SOLVED = "solved"  # silent groups that are no fault


@dataclass(frozen=True)
class AlarmSettings:
    """When training says that something is wrong, and what it does then.

    Attributes:
        patience: training steps in a row that have to be bad, for `unused` measurements in a row;
            `held_out` takes one validation, whose rows are fixed.
        ignored: kinds that are not watched.
        min_frac_rollouts: `vanished` below this share of trajectories with latents.
        start_steps: a run's start is the mean over so many first steps.
        z: `reward` and `held_out` below their start by more than so many standard errors.
        solved_share: groups without signal are `solved` where at least this share of the
            trajectories has the largest reward that the run has seen, else `silent`.
        form_term: reward term that says whether an answer has its form; read where a reward
            function gives it.
        min_form: `form` below this share of the start, in that term or in how many trajectories
            end by themselves.
        window: steps whose median `entropy`, `length` and `kl` are held against.
        entropy_factor, entropy_rise: above so many times the median, and by at least so many nats.
        length_factor: above so many times the median, or below its inverse.
        kl_factor, kl_rise: as entropy's.
        stop: end training at an alarm of `stop_on`, with a checkpoint.
        stop_on: kinds; `solved` may be one.
        rollback: go back to the last good checkpoint at an alarm of `rollback_on`, with a learning
            rate that is multiplied by `rollback_lr_factor`; after `max_rollbacks`, stop.
    """

    patience: int = 2
    ignored: tuple[str, ...] = ()
    min_frac_rollouts: float = 0.05
    start_steps: int = 3
    z: float = 3.0
    solved_share: float = 0.9
    form_term: str = "format"
    min_form: float = 0.75
    window: int = 20
    entropy_factor: float = 3.0
    entropy_rise: float = 0.2
    length_factor: float = 2.0
    kl_factor: float = 5.0
    kl_rise: float = 0.5
    stop: bool = False
    stop_on: tuple[str, ...] = ("vanished", "unused", "reward", "held_out", "silent", "form")
    rollback: bool = False
    rollback_on: tuple[str, ...] = ("vanished", "reward", "held_out", "silent", "form")
    rollback_lr_factor: float = 0.5
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in ("min_frac_rollouts", "solved_share", "min_form"):
            value = getattr(self, name)
            _require(0 <= value <= 1, "not a share", name, value, "in [0, 1]")
        for name in ("patience", "start_steps", "window", "max_rollbacks"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and value >= 1
            _require(is_count, "not a count", name, value, "int >= 1")
        for name in ("z", "entropy_rise", "kl_rise"):
            value = getattr(self, name)
            _require(0 < value < math.inf, "not a bound", name, value, "> 0")
        for name in ("entropy_factor", "length_factor", "kl_factor"):
            value = getattr(self, name)
            _require(1 < value < math.inf, "not a factor of a jump", name, value, "> 1")
        value = self.rollback_lr_factor
        _require(0 < value < 1, "not a smaller step", "rollback_lr_factor", value, "in (0, 1)")
        for name, known in (
            ("ignored", FAULTS),
            ("stop_on", (*FAULTS, SOLVED)),
            ("rollback_on", FAULTS),
        ):
            for kind in getattr(self, name):
                check_choice(kind, known, f"latent.alarm.{name}")

    def needed(self, kind: str) -> int:
        """Bad judgements in a row at which a kind sounds."""
        return 1 if kind == "held_out" else self.patience


def _require(is_right: bool, what: str, name: str, got: object, expected: str) -> None:
    if not is_right:
        raise ConfigError(what, where=f"latent.alarm.{name}", got=got, expected=expected)
