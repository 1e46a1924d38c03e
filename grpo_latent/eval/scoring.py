"""Grades trajectories: by a run's reward functions, or by a benchmark's strict grader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from grpo_latent.errors import RewardError
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.loading import LatentModel
from grpo_latent.rewards.runner import RewardItem, RewardResult, RewardRunner
from grpo_latent.rewards.view import RewardView, reward_view
from grpo_latent.trajectory import Trajectory


@dataclass(frozen=True)
class Outcome:
    """What a trajectory is worth: `correct` from 0 to 1, the `score`, the `answer` as graded.

    `correct` is None where the reward dropped the trajectory; `score` is the reward.
    """

    correct: float | None
    score: float
    answer: str | None = None


class Scorer(Protocol):
    """Gives one outcome a trajectory, of the prompt at the same place."""

    def __call__(
        self, prompts: Sequence[EvalPrompt], trajectories: Sequence[Trajectory]
    ) -> list[Outcome]: ...


class _Views:
    def __init__(self, loaded: LatentModel):
        self.eos_ids = frozenset(loaded.eos_ids)
        self.tokenizer = loaded.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        # `decode` gives a list for a batch of rows only
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def __call__(self, trajectory: Trajectory) -> RewardView:
        return reward_view(trajectory, self.decode, self.eos_ids)


class RewardScorer:
    """Scores as training does.

    What a reward reports as `acc` or `accuracy` counts as correct, else its score; 0 if it
    failed.
    """

    def __init__(self, runner: RewardRunner, loaded: LatentModel):
        self.runner = runner
        self.view = _Views(loaded)

    def __call__(
        self, prompts: Sequence[EvalPrompt], trajectories: Sequence[Trajectory]
    ) -> list[Outcome]:
        items = []
        for prompt, trajectory in zip(prompts, trajectories, strict=True):
            view = self.view(trajectory)
            extra_info = {**prompt.extra_info, "latent": view.latent}
            items.append(
                RewardItem(
                    prompt.data_source,
                    view.solution_str,
                    prompt.ground_truth,
                    extra_info,
                    prompt.where,
                )
            )
        results = self.runner.score_many(items)
        return [
            as_outcome(result, item.where) for result, item in zip(results, items, strict=True)
        ]


def as_outcome(result: RewardResult, where: str | None = None) -> Outcome:
    """Says what a trajectory counts for.

    Raises:
        RewardError: what the reward reports as its accuracy is a text.
    """
    if result.dropped:
        return Outcome(None, result.score)
    info = result.info()
    # a failure's score is error_score, which says nothing about accuracy
    acc = info.get("acc", 0.0 if result.error_kind else info["score"])
    if isinstance(acc, str):
        raise RewardError(
            "the reward reports an accuracy that is no number",
            kind="type",
            where=where,
            got=acc,
            expected="a finite float as 'acc' or 'accuracy'",
            fix="Return the text under another name.",
        )
    return Outcome(0.0 if acc is None else float(acc), result.score)


class GradeScorer:
    """Scores by the strict grader of each prompt's benchmark item.

    Under a preset `Outcome.score` is what the paper's authors count, else what the grader does.
    """

    def __init__(self, loaded: LatentModel):
        self.view = _Views(loaded)

    def __call__(
        self, prompts: Sequence[EvalPrompt], trajectories: Sequence[Trajectory]
    ) -> list[Outcome]:
        outcomes = []
        for prompt, trajectory in zip(prompts, trajectories, strict=True):
            assert prompt.item is not None, "benchmark_prompts gives each prompt its item"
            text = self.view(trajectory).solution_str
            grade = prompt.item.grade(text)
            score, published = grade.correct, prompt.item.published
            if published is not None:
                if published.sees_special_tokens:
                    text = self.view.decode(trajectory.token_ids.tolist())
                score = published.grade(text, prompt.item)
            outcomes.append(Outcome(float(grade.correct), float(score), grade.answer))
        return outcomes


def accuracy(outcomes: Sequence[float | None]) -> float | None:
    """Averages those that were not dropped; None where nothing is left."""
    known = [value for value in outcomes if value is not None]
    return fmean(known) if known else None
