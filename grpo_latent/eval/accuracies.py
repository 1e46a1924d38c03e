"""Accuracies of a decoding: by question, by seed, pass@k, and a benchmark's own measures.

Every accuracy is over questions, as its interval is: rows that share one are averaged first, and
it counts once.

Legend: P prompts (rows), Q questions, G trajectories of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from grpo_latent.eval.benchmarks import find_benchmark
from grpo_latent.eval.benchmarks.presets import PUBLISHED
from grpo_latent.eval.decode import Decoding
from grpo_latent.eval.graders import pair_accuracy
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import Outcome, accuracy
from grpo_latent.eval.statistics import bootstrap_interval, by_cluster, pass_at_k
from grpo_latent.eval.verdict import VerdictSettings


def decoding_report(
    prompts: Sequence[EvalPrompt],
    decoding: Decoding,
    groups: list[list[Outcome]],
    settings: VerdictSettings,
) -> dict:
    """Reports accuracy, its interval, pass@k, and accuracy by trajectory index, over questions.

    An index stands for a seed of its own. Trajectories of a row, then rows of a question are
    averaged first (`by_cluster`).
    """
    correct_PG = [[outcome.correct for outcome in group] for group in groups]
    means_P = [accuracy(values) for values in correct_PG]
    clusters = [prompt.cluster for prompt in prompts]
    means_Q = by_cluster(clusters, means_P)
    report: dict[str, object] = {
        "accuracy": accuracy(means_Q),
        "interval": interval_of(means_Q, settings),
        "n": decoding.num_sampled or 1,
    }
    report |= benchmark_measures(prompts, means_P, settings)
    report |= published_measures(prompts, groups)
    known = [
        (cluster, group)
        for cluster, group in zip(clusters, correct_PG, strict=True)
        if None not in group
    ]
    # pass@k counts right ones, which a reward between 0 and 1 does not tell
    if (
        decoding.num_sampled
        and known
        and all(value in (0.0, 1.0) for _, group in known for value in group)
    ):
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < decoding.num_sampled] + [
            decoding.num_sampled
        ]
        known_clusters, known_PG = zip(*known, strict=True)
        at_k = {
            k: [pass_at_k(len(values), int(sum(values)), k) for values in known_PG] for k in ks
        }
        at_k = {k: by_cluster(known_clusters, values) for k, values in at_k.items()}
        report["pass_at_k"] = {
            str(k): {"estimate": fmean(values_Q), "interval": interval_of(values_Q, settings)}
            for k, values_Q in at_k.items()
        }
    if decoding.num_sampled > 1:
        seeds = range(decoding.num_sampled)
        by_seed = [
            accuracy(by_cluster(clusters, [values[j] for values in correct_PG])) for j in seeds
        ]
        spread = [value for value in by_seed if value is not None]
        report |= {"accuracy_by_seed": by_seed, "seed_std": pstdev(spread) if spread else None}
    return report


def interval_of(values: Sequence[float], settings: VerdictSettings) -> list[float] | None:
    """Gives the low and high end of a mean's interval; None of nothing."""
    if not values:
        return None
    # a reward that is no accuracy has no known range to widen the interval to
    bounds = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else None
    interval = bootstrap_interval(
        values, level=settings.level, num_resamples=settings.num_resamples, bounds=bounds
    )
    return [interval.low, interval.high]


def benchmark_measures(
    prompts: Sequence[EvalPrompt], means_P: Sequence[float | None], settings: VerdictSettings
) -> dict:
    """Reports a benchmark's own measures; none where some prompt is of no benchmark.

    They are plain accuracy over rows where some share a question, pairs or groups that are right
    as a whole, and accuracy by category, over questions.
    """
    items = [prompt.item for prompt in prompts if prompt.item is not None]
    if len(items) < len(prompts):
        return {}
    report: dict[str, object] = {}
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, means_P, strict=True):
        # a row whose trajectories were all dropped is not right, nor is its group
        groups.setdefault(item.group_id, []).append(float(value or 0.0))
    whole = [float(min(values) == 1.0) for values in groups.values()]
    if len(groups) < len(items):
        report["row_accuracy"] = accuracy(means_P)
    if find_benchmark(items[0].benchmark).group_size == 2:
        report["pair_accuracy"] = pair_accuracy(
            [float(value or 0) for value in means_P], [i.group_id for i in items]
        )
        report["pair_interval"] = interval_of(whole, settings)
    elif len(groups) < len(items):
        report |= {"group_accuracy": fmean(whole), "group_interval": interval_of(whole, settings)}
    categories = sorted({item.category for item in items})
    if len(categories) > 1:
        by_category: dict[str, float | None] = {}
        for category in categories:
            rows = [
                (item.group_id, v)
                for item, v in zip(items, means_P, strict=True)
                if item.category == category
            ]
            by_category[category] = accuracy(by_cluster(*zip(*rows, strict=True)))
        report["by_category"] = by_category
    return report


def published_measures(prompts: Sequence[EvalPrompt], groups: Sequence[Sequence[Outcome]]) -> dict:
    """Reports what the authors of a preset print; nothing without a preset.

    It is over rows, as theirs is, and each answer counts as in their code.
    """
    items = [prompt.item for prompt in prompts]
    if any(item is None or item.published is None for item in items):
        return {}
    scores_P = [fmean(outcome.score for outcome in group) for group in groups]
    by_category: dict[str, list[float]] = {}
    for item, score in zip(items, scores_P, strict=True):
        assert item is not None
        by_category.setdefault(item.category, []).append(score)
    report: dict[str, object] = {PUBLISHED: fmean(scores_P)}
    if len(by_category) > 1:
        report["published_by_category"] = {
            name: fmean(values) for name, values in sorted(by_category.items())
        }
    return report
