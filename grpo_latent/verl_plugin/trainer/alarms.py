"""The alarms of training: numbers of steps and validations in, lines for the user out.

    step, validation, usage ──▶ each kind judges ──▶ bad so often in a row? ──▶ a line, once

A kind (`alarm_kinds.py`) sounds until it gets better. Nothing here knows Ray or verl.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_latent.eval.statistics import NOT_USED
from grpo_latent.eval.usage import Usage
from grpo_latent.verl_plugin.trainer.alarm_kinds import (
    HELD_OUT,
    HELD_OUT_ERROR,
    Alarm,
    EntropyJumps,
    FormLost,
    HeldOutBelowStart,
    KlJumps,
    LatentsVanish,
    LengthJumps,
    RewardBelowStart,
    SilentGroups,
    is_like,
)
from grpo_latent.verl_plugin.trainer.alarm_settings import FAULTS, SOLVED, AlarmSettings


@dataclass(frozen=True)
class Line:
    """What the user has to read: `kind` is one of `FAULTS`, else it is no alarm."""

    kind: str
    text: str

    @property
    def is_alarm(self) -> bool:
        return self.kind in FAULTS

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


UNUSED_HELPS = (
    "What helps: a task that needs them, or latent.visibility=latents_only from SFT on, under "
    "which text after a span does not see the image"
)
STEP_ALARMS: tuple[type[Alarm], ...] = (
    LatentsVanish,
    RewardBelowStart,
    SilentGroups,
    FormLost,
    EntropyJumps,
    LengthJumps,
    KlJumps,
)


class Alarms:
    """All of them, and for each kind how many bad judgements came in a row."""

    def __init__(self, settings: AlarmSettings):
        self.settings = settings
        self.held_out = HeldOutBelowStart(settings)
        self.silent = SilentGroups(settings)
        self.step_alarms = [
            self.silent if kind is SilentGroups else kind(settings) for kind in STEP_ALARMS
        ]
        self.counts = dict.fromkeys((*FAULTS, SOLVED), 0)

    # ---- judging --------------------------------------------------------------------------------

    def after_step(self, metrics: dict[str, Any]) -> list[Line]:
        """Lines of a training step; adds `latent/alarm_<kind>` and `actor/silent_steps`."""
        lines = [
            self._count(alarm.kind, alarm.judge(metrics), alarm) for alarm in self.step_alarms
        ]
        solved = (
            "every group has equal rewards, nearly all the largest of the run: nothing is left"
        )
        lines.append(self._count(SOLVED, solved if self.silent.is_solved else ""))
        metrics |= {f"latent/alarm_{kind}": float(self.sounds(kind)) for kind in FAULTS}
        metrics["latent/solved"] = float(self.sounds(SOLVED))
        metrics["actor/silent_steps"] = float(self.silent.memory["steps"])
        return [line for line in lines if line is not None]

    def after_validation(self, score: float | None, error: float) -> list[Line]:
        """Lines of a validation.

        Args:
            score: held-out, None without any.
            error: its standard error.
        """
        if score is None:
            return []
        alarm = self.held_out
        text = alarm.judge({HELD_OUT: score, HELD_OUT_ERROR: error})
        line = self._count(alarm.kind, text, alarm)
        return [] if line is None else [line]

    def after_usage(self, usage: Usage) -> list[Line]:
        """Lines of a measurement of how latents are used."""
        text = f"latents are {usage.sentence}. {UNUSED_HELPS}" if usage.verdict == NOT_USED else ""
        line = self._count("unused", text)
        return [] if line is None else [line]

    def _count(self, kind: str, text: str | None, alarm: Alarm | None = None) -> Line | None:
        if text is None or kind in self.settings.ignored:
            return None
        self.counts[kind] = self.counts[kind] + 1 if text else 0
        if self.counts[kind] != self.settings.needed(kind):
            return None
        return Line(kind, text if alarm is None else f"{text}. What helps: {alarm.helps}")

    # ---- what follows from it -------------------------------------------------------------------

    def sounds(self, kind: str) -> bool:
        return self.counts[kind] >= self.settings.needed(kind)

    def sounding(self, kinds: tuple[str, ...]) -> list[str]:
        """Those of `kinds` that sound."""
        return [kind for kind in kinds if self.sounds(kind)]

    @property
    def doubts(self) -> list[str]:
        """Kinds of `rollback_on` that speak against going back to a checkpoint of now.

        What is bad, be it for the first time; a reward below its start, a validation below the
        best.
        """
        doubtful = {a.kind for a in (*self.step_alarms, self.held_out) if a.is_doubtful}
        return [
            kind
            for kind in self.settings.rollback_on
            if kind not in self.settings.ignored and (self.counts[kind] or kind in doubtful)
        ]

    # ---- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON."""
        memories = {alarm.kind: alarm.memory for alarm in (*self.step_alarms, self.held_out)}
        return copy.deepcopy({"bad_in_a_row": self.counts, "memory": memories})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is no such thing.
        """
        counts, memories = state["bad_in_a_row"], state["memory"]
        if set(counts) != set(self.counts) or not all(is_like(0, n) for n in counts.values()):
            raise ValueError(f"counters {counts}")
        for alarm in (*self.step_alarms, self.held_out):
            alarm.restore(memories[alarm.kind])
        self.counts = dict(counts)
