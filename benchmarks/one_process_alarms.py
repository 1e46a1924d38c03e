"""The one-process loop with the alarms of training: when would they have sounded?

Stopping and going back are the trainer's (`verl_plugin/trainer/guards.py`), not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from one_process import OneProcess, StepLog
from one_process_inputs import Batch

from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.verl_plugin.trainer.alarms import Alarms, Line
from grpo_latent.verl_plugin.trainer.spread import reward_spread


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
