"""The kinds of alarms: what each watches, and when that is bad.

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

What a class remembers is plain JSON, so that a resumed run alarms as an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any, ClassVar

from grpo_latent.verl_plugin.trainer.alarm_settings import AlarmSettings

Metrics = Mapping[str, Any]
HELD_OUT = "held_out"
HELD_OUT_ERROR = "held_out_error"
SMALLER_STEP = (
    "a smaller actor.optim.lr, a KL to the reference (actor.use_kl_loss) or a larger one "
    "(actor.kl_loss_coef), latent.alarm.rollback"
)


def number(metrics: Metrics, *names: str) -> float | None:
    """The first of these metrics that there is, None without one or where it is not finite."""
    value = next((float(metrics[name]) for name in names if name in metrics), math.nan)
    return value if math.isfinite(value) else None


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

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Takes a memory that was saved.

        Raises:
            ValueError: it is none of this kind.
        """
        fresh = self.fresh()
        if memory.keys() != fresh.keys() or not all(
            is_like(fresh[name], value) for name, value in memory.items()
        ):
            raise ValueError(f"memory of {self.kind}: {dict(memory)}")
        self.memory = copy.deepcopy(dict(memory))


def is_like(fresh: object, saved: object) -> bool:
    """Whether a saved value is of the fresh one's type; lists hold numbers or lists of them.

    >>> is_like(0, 3), is_like(0, -1), is_like([], [1.0, [2.0, 0.5]]), is_like([], ["1"])
    (True, False, True, False)
    """
    if isinstance(fresh, list) and isinstance(saved, list):
        return all(
            type(item) in (int, float) or (isinstance(item, list) and is_like([], item))
            for item in saved
        )
    is_count = type(saved) is not int or saved >= 0
    return type(fresh) is type(saved) and is_count


class LatentsVanish(Alarm):
    kind = "vanished"
    helps = "a reward term for the span, " + SMALLER_STEP

    def judge(self, metrics: Metrics) -> str | None:
        share, bound = number(metrics, "latent/frac_rollouts"), self.settings.min_frac_rollouts
        if share is None or share >= bound:
            return None if share is None else ""
        return f"{share:.1%} of the trajectories have latents (bound {bound:.1%})"


class BelowStart(Alarm):
    """A mean that falls below its start by more than both their standard errors explain.

    A step whose trajectories are all alike has an error of 0, which says nothing of the next
    step's: the error is never taken for smaller than the start's.
    """

    num_start: ClassVar[int]  # 0: `start_steps`
    names: ClassVar[tuple[str, str]]  # of the metrics: mean, its standard error
    what: ClassVar[str]

    def fresh(self) -> dict[str, Any]:
        return {"start": [], "is_doubtful": False}

    def judge(self, metrics: Metrics) -> str | None:
        mean, error = (number(metrics, name) for name in self.names)
        if mean is None or error is None:
            return None
        seen = self.memory["start"]
        if len(seen) < (self.num_start or self.settings.start_steps):
            seen.append([mean, error])
            return ""
        start = fmean(value for value, _ in seen)
        squares = sum(e * e for _, e in seen)
        noise = math.hypot(
            math.sqrt(squares) / len(seen), max(error, math.sqrt(squares / len(seen)))
        )
        # no checkpoint to go back to: one standard error is no alarm, but it is no good sign
        self.memory["is_doubtful"] = mean < self.good(start, mean) - noise
        if mean >= start - self.settings.z * noise:
            return ""
        return (
            f"{self.what} {mean:.3f} is below its start, {start:.3f}, by more than noise "
            f"({self.settings.z:g} x {noise:.3f})"
        )

    def good(self, start: float, mean: float) -> float:
        """What a good checkpoint is not below."""
        return start

    @property
    def is_doubtful(self) -> bool:
        return self.memory["is_doubtful"]


class RewardBelowStart(BelowStart):
    """The start is the mean over the first steps, the noise is from the spread of groups' means.

    A step of one group shows no spread and is not judged.
    """

    kind = "reward"
    num_start = 0
    names = ("critic/score/mean", "rewards/standard_error")
    what = "sampled reward"


class HeldOutBelowStart(BelowStart):
    """The start is the first validation, the noise is from the spread over its rows.

    A checkpoint is good where the score is not below the best so far either: on the way down from
    it a run passes its start once more, and would fall again from there.
    """

    kind = "held_out"
    num_start = 1
    names = (HELD_OUT, HELD_OUT_ERROR)
    what = "held-out score"

    def fresh(self) -> dict[str, Any]:
        return super().fresh() | {"best": []}

    def good(self, start: float, mean: float) -> float:
        best = max(start, mean, *self.memory["best"])
        self.memory["best"] = [best]
        return best


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
        silent, low, high, at_top = (
            number(metrics, name)
            for name in (
                "frac_reward_zero_std",
                "critic/score/min",
                "critic/score/max",
                "rewards/at_top_frac",
            )
        )
        self.is_solved = False
        if silent is None or low is None or high is None or at_top is None:
            return None
        seen = [*self.memory["range"], low, high]
        lowest, highest = self.memory["range"] = [min(seen), max(seen)]
        if silent < 1:
            return ""
        self.memory["steps"] += 1
        self.is_solved = high == highest > lowest and at_top >= self.settings.solved_share
        if self.is_solved:
            return ""
        return (
            "every group has equal rewards, which teach nothing: "
            f"{self.memory['steps']} such steps so far (rewards {low:.3f} to "
            f"{high:.3f}, largest of the run {highest:.3f})"
        )


class FormLost(Alarm):
    """Answers lose their form: a reward term says so, or they no longer end by themselves."""

    kind = "form"
    helps = "a reward term for the form, " + SMALLER_STEP

    def fresh(self) -> dict[str, Any]:
        return {"term": [], "ended": []}

    def judge(self, metrics: Metrics) -> str | None:
        found = []
        term = number(metrics, f"rewards/{self.settings.form_term}/mean")
        if term is not None:
            what = f"reward term {self.settings.form_term}"
            found.append(self._judge(self.memory["term"], what, term))
        stopped = number(metrics, "latent/stopped_at_length_frac")
        if stopped is not None:
            what = "share of trajectories that end by themselves"
            found.append(self._judge(self.memory["ended"], what, 1 - stopped))
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
    what: ClassVar[str]

    def fresh(self) -> dict[str, Any]:
        return {"recent": []}

    def jumps(self, value: float, middle: float) -> bool:
        raise NotImplementedError

    def judge(self, metrics: Metrics) -> str | None:
        value = number(metrics, *self.names)
        if value is None:
            return None
        recent = self.memory["recent"]
        if len(recent) >= self.settings.start_steps and self.jumps(value, median(recent)):
            middle = f"{median(recent):.3f} in the median of the last {len(recent)} good steps"
            return f"{self.what} {value:.3f}, after {middle}"
        recent.append(value)
        del recent[: -self.settings.window]
        return ""


class EntropyJumps(Jump):
    kind = "entropy"
    names = ("actor/entropy",)
    what = "entropy"

    def jumps(self, value: float, middle: float) -> bool:
        settings = self.settings
        return value > settings.entropy_factor * middle and value - middle > settings.entropy_rise


class LengthJumps(Jump):
    kind = "length"
    names = ("response_length/mean",)
    what = "mean length"

    def jumps(self, value: float, middle: float) -> bool:
        factor = self.settings.length_factor
        return value > factor * middle or value * factor < middle


class KlJumps(Jump):
    kind = "kl"
    names = ("actor/kl_loss", "actor/ppo_kl")
    what = "KL"

    def jumps(self, value: float, middle: float) -> bool:
        settings = self.settings
        return value > settings.kl_factor * middle and value - middle > settings.kl_rise
