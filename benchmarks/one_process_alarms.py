"""The one-process loop with the alarms of training, and with the way back that they lead to.

    AlarmedProcess    when would they have sounded?
    GuardedProcess    `latent.alarm.rollback`: back to the last good state, with a smaller step

The trainer's way back goes through checkpoints (`verl_plugin/trainer/guards.py`), this one through
copies in memory; what is good, bad and restored is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from one_process import OneProcess, StepLog
from one_process_inputs import Batch

from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.verl_plugin.trainer.alarms import Alarms, Line
from grpo_latent.verl_plugin.trainer.spread import reward_spread
from grpo_latent.verl_plugin.worker.learning_rate import scale_learning_rate


class AlarmedProcess(OneProcess):
    """Asks the alarms after each step and each validation of `run`.

    Attributes:
        lines: what they have said, each with its step; 0 before training.
    """

    def __init__(self, alarms: Alarms, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.alarms = alarms
        self.lines: list[tuple[int, Line]] = []
        self._step = 0
        self._batch: Batch | None = None

    def step(self, step: int, rows: Iterator[EvalPrompt], scorer: RewardScorer) -> StepLog:
        log = super().step(step, rows, scorer)
        assert self._batch is not None, "a step samples"
        self._step = step
        self._hear(self.alarms.after_step(alarm_metrics(log, self._batch)))
        return log

    def validate(self, prompts: Sequence[EvalPrompt], scorer: RewardScorer) -> float:
        score = super().validate(prompts, scorer)
        self._hear(self.alarms.after_validation(score, error_of_share(score, len(prompts))))
        return score

    def _sample(self, step: int, rows: Iterator[EvalPrompt], scorer: RewardScorer) -> Batch:
        self._batch = super()._sample(step, rows, scorer)
        return self._batch

    def _hear(self, lines: list[Line]) -> None:
        self.lines += [(self._step, line) for line in lines]


@dataclass(frozen=True)
class Good:
    """What a run goes back to: all that a checkpoint of this step would hold."""

    step: int
    weights: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    alarms: dict[str, Any]
    lr_factor: float


class GuardedProcess(AlarmedProcess):
    """Goes back as the trainer does; `trainer.save_freq` says after which steps there is a state.

    Attributes:
        rollbacks: (at the end of this step, to the state of that one).
        first_bad_step: after which sampled or held-out reward was below its start, None for none.
    """

    def __init__(self, alarms: Alarms, *args: Any, **kwargs: Any):
        super().__init__(alarms, *args, **kwargs)
        self.rollbacks: list[tuple[int, int]] = []
        self.first_bad_step: int | None = None
        self.lr_factor = 1.0
        self._good: Good | None = None

    def end_step(self, step: int, is_last: bool) -> bool:
        """What `Guards` and the trainer do at the end of a step."""
        alarms = self.alarms
        is_bad = any(alarms.counts[kind] for kind in ("reward", "held_out"))
        if is_bad and self.first_bad_step is None:
            self.first_bad_step = step
        if alarms.sounding(alarms.settings.rollback_on) or (is_last and alarms.doubts):
            self._go_back(step)
            self._keep(step)
        elif step == 0 or (step % self.config.trainer.save_freq == 0 and not alarms.doubts):
            self._keep(step)
        return len(self.rollbacks) > alarms.settings.max_rollbacks

    def _keep(self, step: int) -> None:
        self._good = Good(
            step,
            copy.deepcopy(self.loaded.model.state_dict()),
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.schedule.state_dict()),
            self.alarms.state(),
            self.lr_factor,
        )

    def _go_back(self, step: int) -> None:
        good, num_silent = self._good, self.alarms.silent.memory["steps"]
        assert good is not None, "the start is one"
        self.loaded.model.load_state_dict(good.weights)
        self.optimizer.load_state_dict(copy.deepcopy(good.optimizer))
        self.schedule.load_state_dict(copy.deepcopy(good.schedule))
        self.alarms.restore(good.alarms)
        self.alarms.silent.memory["steps"] = num_silent
        self.lr_factor *= self.alarms.settings.rollback_lr_factor
        scale_learning_rate(self.optimizer, self.schedule, self.lr_factor / good.lr_factor)
        self.rollbacks.append((step, good.step))


def error_of_share(share: float, num: int) -> float:
    """Standard error of a mean of zeros and ones, as the recipes' accuracy is; ddof 1.

    >>> error_of_share(0.5, 2)
    0.5
    """
    return math.sqrt(share * (1 - share) / (num - 1))


def alarm_metrics(log: StepLog, batch: Batch) -> dict[str, float]:
    """A step under the names that training logs and the alarms read."""
    rewards = batch.rewards_B.tolist()
    return reward_spread(rewards, batch.group_ids) | {
        "critic/score/mean": log.reward,
        "critic/score/min": min(rewards),
        "critic/score/max": max(rewards),
        "actor/entropy": log.entropy,
        "actor/kl_loss": log.kl,
        "response_length/mean": log.length,
        "latent/frac_rollouts": fmean(len(t.latents) > 0 for t in batch.trajectories),
        "latent/stopped_at_length_frac": fmean(
            t.stop_reason == "length" for t in batch.trajectories
        ),
    }
