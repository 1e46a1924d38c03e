"""The alarms of training: numbers of steps and validations in, lines for the user out.

    kind       watches                                   is bad where
    vanished   share of trajectories with latents        it is below a bound
    unused     verdict of the usage measurement          it is "not used"
    reward     mean reward of a step's trajectories      it is below its start by more than noise
    held_out   validation                                so is it
    silent     groups whose rewards differ               there is none, and the reward is not at
                                                         its top (else the run has solved its data)
    form       reward term of the form; own endings      a good part of the start is lost
    entropy    of the policy                             it jumps above its median
    length     of completions                            it jumps, up or down
    kl         to the reference, else to the old policy  it jumps up

Each kind is one class below. It judges a step (or a validation), and sounds once after `patience`
bad judgements in a row, until it gets better. What a class remembers is plain JSON, so that a
resumed run alarms as an uninterrupted one. Nothing here knows Ray or verl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, ClassVar

from grpo_latent.eval.statistics import NOT_USED
from grpo_latent.eval.usage import Usage
from grpo_latent.verl_plugin.trainer.alarm_settings import FAULTS, SOLVED, AlarmSettings

Metrics = Mapping[str, float]
SMALLER_STEP = (
    "a smaller actor.optim.lr, a KL to the reference (actor.use_kl_loss), latent.alarm.rollback"
)


@dataclass(frozen=True)
class Line:
    """What the user has to read: `kind` is one of `FAULTS`, or `solved`."""

    kind: str
    text: str

    @property
    def is_alarm(self) -> bool:
        return self.kind != SOLVED

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Alarm:
    """One kind.

    Attributes:
        memory: what it has seen, as JSON; saved in checkpoints.
        helps: what the user can do.
    """

    kind: ClassVar[str]
    helps: ClassVar[str] = SMALLER_STEP

    def __init__(self, settings: AlarmSettings):
        self.settings = settings
        self.memory: dict[str, Any] = self.fresh()

    def fresh(self) -> dict[str, Any]:
        """The memory of a run that begins."""
        return {}

    def judge(self, metrics: Metrics) -> str | None:
        """What is wrong, with its numbers; "" where all is well, None where nothing is known."""
        raise NotImplementedError

    @property
    def is_doubtful(self) -> bool:
        """Whether a checkpoint of now is none to go back to, although nothing is bad yet."""
        return False


class LatentsVanish(Alarm):
    kind = "vanished"
    helps = "a reward term for the span, " + SMALLER_STEP

    def judge(self, metrics: Metrics) -> str | None:
        share, bound = metrics["latent/frac_rollouts"], self.settings.min_frac_rollouts
        if share >= bound:
            return ""
        return f"{share:.1%} of the trajectories have latents (bound {bound:.1%})"


class BelowStart(Alarm):
    """A mean that falls below its start by more than both their standard errors explain."""

    def fresh(self) -> dict[str, Any]:
        return {"start": [], "is_doubtful": False}

    def judge_mean(self, mean: float, error: float, num_start: int, what: str) -> str | None:
        if not (math.isfinite(mean) and math.isfinite(error)):
            return None
        seen = self.memory["start"]
        if len(seen) < num_start:
            seen.append([mean, error])
            return ""
        start = fmean(value for value, _ in seen)
        start_error = math.sqrt(sum(e * e for _, e in seen)) / len(seen)
        noise = math.hypot(start_error, error)
        # no checkpoint to go back to: one standard error is no alarm, but it is no good sign
        self.memory["is_doubtful"] = mean < start - noise
        if mean >= start - self.settings.z * noise:
            return ""
        return (
            f"{what} {mean:.3f} is below its start, {start:.3f}, by more than noise "
            f"({self.settings.z:g} x {noise:.3f})"
        )

    @property
    def is_doubtful(self) -> bool:
        return self.memory["is_doubtful"]


class RewardBelowStart(BelowStart):
    """The start is the mean over the first steps, the noise is from the spread of groups' means.

    A step of one group shows no spread and is not judged.
    """

    kind = "reward"

    def judge(self, metrics: Metrics) -> str | None:
        mean, error = metrics.get("critic/score/mean"), metrics.get("rewards/standard_error")
        if mean is None or error is None:
            return None
        return self.judge_mean(mean, error, self.settings.start_steps, "sampled reward")


class HeldOutBelowStart(BelowStart):
    """The start is the first validation, the noise is from the spread over its rows."""

    kind = "held_out"

    def judge(self, metrics: Metrics) -> str | None:
        mean, error = metrics.get("held_out"), metrics.get("held_out_error")
        if mean is None or error is None:
            return None
        return self.judge_mean(mean, error, 1, "held-out score")


class SilentGroups(Alarm):
    """No group has two different rewards: every advantage is 0, and nothing is learned.

    A run that has solved its data looks alike. It is told apart by where the rewards are: nearly
    all at the largest one of the run, which has also seen smaller ones.

    Attributes:
        is_solved: whether the step just judged was silent at the top.
    """

    kind = "silent"
    helps = (
        "prompts that the policy solves sometimes, a finer reward, a higher rollout.temperature, "
        + SMALLER_STEP
    )

    def __init__(self, settings: AlarmSettings):
        super().__init__(settings)
        self.is_solved = False

    def fresh(self) -> dict[str, Any]:
        return {"steps": 0, "range": []}  # of rewards: smallest, largest

    def judge(self, metrics: Metrics) -> str | None:
        silent, low, high = (
            metrics.get(name)
            for name in ("frac_reward_zero_std", "critic/score/min", "critic/score/max")
        )
        self.is_solved = False
        if silent is None or low is None or high is None:
            return None
        seen = [*self.memory["range"], low, high]
        lowest, highest = self.memory["range"] = [min(seen), max(seen)]
        if silent < 1:
            return ""
        self.memory["steps"] += 1
        at_top = metrics["rewards/at_top_frac"]
        self.is_solved = high == highest > lowest and at_top >= self.settings.solved_share
        if self.is_solved:
            return ""
        return (
            f"every group has equal rewards: no gradient, {self.memory['steps']} such steps so far "
            f"(mean reward {metrics['critic/score/mean']:.3f}, largest of the run {highest:.3f})"
        )


class FormLost(Alarm):
    """Answers lose their form: a reward term says so, or they no longer end by themselves."""

    kind = "form"
    helps = "a reward term for the form, " + SMALLER_STEP

    def fresh(self) -> dict[str, Any]:
        return {"term": [], "ended": []}

    def judge(self, metrics: Metrics) -> str | None:
        term = f"rewards/{self.settings.form_term}/mean"
        watched = {"term": (f"reward term {self.settings.form_term}", metrics.get(term))}
        stopped = metrics.get("latent/stopped_at_length_frac")
        ended = None if stopped is None else 1 - stopped
        watched["ended"] = ("share of trajectories that end by themselves", ended)
        found = [
            self._judge(self.memory[name], what, value)
            for name, (what, value) in watched.items()
            if value is not None and math.isfinite(value)
        ]
        return "; ".join(text for text in found if text) if found else None

    def _judge(self, seen: list[float], what: str, value: float) -> str:
        if len(seen) < self.settings.start_steps:
            seen.append(value)
            return ""
        start = fmean(seen)
        if value >= self.settings.min_form * start:
            return ""
        return f"{what} {value:.3f}, of {start:.3f} at the start"


class Jump(Alarm):
    """A number that jumps away from its median over the last steps that were not bad.

    Slow changes are learning; bad steps stay out of the median, so that it does not get used to
    them.
    """

    names: ClassVar[tuple[str, ...]]  # of the metric: the first one that there is

    def fresh(self) -> dict[str, Any]:
        return {"recent": []}

    def jumps(self, value: float, middle: float) -> bool:
        raise NotImplementedError

    def judge(self, metrics: Metrics) -> str | None:
        value = next((metrics[name] for name in self.names if name in metrics), None)
        if value is None or not math.isfinite(value):
            return None
        recent = self.memory["recent"]
        if len(recent) >= self.settings.start_steps and self.jumps(value, median(recent)):
            return f"{value:.3f}, median of the last {len(recent)} good steps {median(recent):.3f}"
        recent.append(value)
        del recent[: -self.settings.window]
        return ""


class EntropyJumps(Jump):
    kind = "entropy"
    names = ("actor/entropy",)

    def jumps(self, value: float, middle: float) -> bool:
        settings = self.settings
        return value > settings.entropy_factor * middle and value - middle > settings.entropy_rise


class LengthJumps(Jump):
    kind = "length"
    names = ("response_length/mean",)

    def jumps(self, value: float, middle: float) -> bool:
        factor = self.settings.length_factor
        return value > factor * middle or value * factor < middle


class KlJumps(Jump):
    kind = "kl"
    names = ("actor/kl_loss", "actor/ppo_kl")

    def jumps(self, value: float, middle: float) -> bool:
        settings = self.settings
        return value > settings.kl_factor * middle and value - middle > settings.kl_rise


OF_STEPS: tuple[type[Alarm], ...] = (
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
        self.of_steps = [
            self.silent if kind is SilentGroups else kind(settings) for kind in OF_STEPS
        ]
        self.counts = dict.fromkeys((*FAULTS, SOLVED), 0)

    # ---- judging --------------------------------------------------------------------------------

    def after_step(self, metrics: dict[str, float]) -> list[Line]:
        """Lines of a training step; adds `latent/alarm_<kind>` and `actor/silent_steps`."""
        lines = [self._count(alarm.kind, alarm.judge(metrics), alarm) for alarm in self.of_steps]
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
        text = alarm.judge({"held_out": score, "held_out_error": error})
        line = self._count(alarm.kind, text, alarm)
        return [] if line is None else [line]

    def after_usage(self, usage: Usage) -> list[Line]:
        """Lines of a measurement of how latents are used."""
        text = f"latents are {usage.sentence}" if usage.verdict == NOT_USED else ""
        line = self._count("unused", text)
        return [] if line is None else [line]

    def _count(self, kind: str, text: str | None, alarm: Alarm | None = None) -> Line | None:
        if text is None or kind in self.settings.off:
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
    def is_good(self) -> bool:
        """Whether a checkpoint of now is one to go back to.

        Then nothing is bad, not even for the first time, and reward and validation are not below
        their start.
        """
        watched = [kind for kind in self.settings.rollback_on if kind not in self.settings.off]
        doubtful = {a.kind for a in (*self.of_steps, self.held_out) if a.is_doubtful}
        return not any(self.counts[kind] or kind in doubtful for kind in watched)

    # ---- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON."""
        memories = {alarm.kind: alarm.memory for alarm in (*self.of_steps, self.held_out)}
        return {"bad_in_a_row": dict(self.counts), "memory": memories}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave.

        Raises:
            ValueError, TypeError, KeyError: it is no such thing.
        """
        counts, memories = state["bad_in_a_row"], state["memory"]
        alarms = {alarm.kind: alarm for alarm in (*self.of_steps, self.held_out)}
        if set(counts) != set(self.counts) or not all(
            type(n) is int and n >= 0 for n in counts.values()
        ):
            raise ValueError(f"counters {counts}")
        for kind, alarm in alarms.items():
            if memories[kind].keys() != alarm.fresh().keys():
                raise ValueError(f"memory of {kind}: {memories[kind]}")
        self.counts = dict(counts)
        for kind, alarm in alarms.items():
            alarm.memory = dict(memories[kind])
