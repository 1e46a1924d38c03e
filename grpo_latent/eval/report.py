"""From outcomes to the report: intervals, pass@k, paired tests, and the verdict on the latents.

Every accuracy is over questions, as its interval is: rows that share one are averaged first, and
it counts once.

Legend: P prompts (rows), Q questions, G trajectories of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import BLIND, ORACLE, SHUFFLE, check_decides, parse_name
from grpo_latent.eval.benchmarks import find_benchmark
from grpo_latent.eval.decode import GREEDY, Decoding
from grpo_latent.eval.geometry import geometry
from grpo_latent.eval.graders import pair_accuracy
from grpo_latent.eval.journal import PhaseBatch
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import Outcome, accuracy
from grpo_latent.eval.statistics import (
    DEFAULT_MARGIN,
    NOT_USED,
    UNDECIDED,
    Interval,
    UsageVerdict,
    bootstrap_interval,
    by_cluster,
    pass_at_k,
    usage_verdict,
)
from grpo_latent.trajectory import Trajectory

OWN, LATENTS = "own", "the latents"
SUBJECTS = {BLIND: "the image after the span", "no_span": "opening a span"}


@dataclass(frozen=True)
class VerdictSettings:
    """When an ablation says that latents are used (`statistics.usage_verdict`).

    Attributes:
        margin: smallest loss of accuracy that counts as use.
        level: of all intervals and tests of a report together (Bonferroni over its ablations).
        chance: accuracy of guessing; a benchmark with options brings its own.
        primary: the ablation whose verdict is the report's; one that `ablations.check_decides`
            lets decide.
    """

    margin: float = DEFAULT_MARGIN
    level: float = 0.95
    chance: float = 0.0
    primary: str = SHUFFLE
    num_resamples: int = 10_000

    def __post_init__(self):
        for name, holds in (
            ("margin", 0 < self.margin < 1),
            ("level", 0 < self.level < 1),
            ("chance", 0 <= self.chance < 1),
        ):
            if not holds:
                raise ConfigError(
                    "not usable",
                    where=f"verdict.{name}",
                    got=getattr(self, name),
                    expected="in (0, 1)",
                )
        if type(self.num_resamples) is not int or self.num_resamples < 1:
            got = self.num_resamples
            raise ConfigError(
                "not a count", where="verdict.num_resamples", got=got, expected="int >= 1"
            )
        check_decides(self.primary, "verdict.primary")


@dataclass
class Findings:
    """What the phases of an evaluation leave for its report."""

    prompts: Sequence[EvalPrompt]
    verdict: VerdictSettings
    own: list[Trajectory] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    leak: float | None = None
    decodings: dict[str, dict] = field(default_factory=dict)
    outcomes: dict[str, list[float | None]] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    changed: dict[str, list[bool]] = field(default_factory=dict)
    follow: list[float] = field(default_factory=list)

    def accuracy(self, name: str) -> float | None:
        """Averages greedy accuracy under an ablation, or `OWN`, over questions."""
        return accuracy(
            by_cluster([prompt.cluster for prompt in self.prompts], self.outcomes[name])
        )

    def add_own(self, own: list[Trajectory], batches: Sequence[PhaseBatch]) -> None:
        self.own = own
        outcomes = [group[0] for batch in batches for group in batch.outcomes]
        self.outcomes[OWN] = [outcome.correct for outcome in outcomes]
        self.scores = [outcome.score for outcome in outcomes]
        self.add_decoding(GREEDY, batches)

    def add_decoding(self, decoding: Decoding, batches: Sequence[PhaseBatch]) -> None:
        groups = [group for batch in batches for group in batch.outcomes]
        num_trajectories = max(1, sum(len(group) for group in groups))
        self.decodings[decoding.name] = decoding_report(
            self.prompts, decoding, groups, self.verdict
        ) | {
            "tokens_per_question": sum(batch.num_tokens for batch in batches) / num_trajectories,
            "seconds_per_question": sum(batch.seconds for batch in batches) / num_trajectories,
        }

    def add_ablation(self, name: str, batches: Sequence[PhaseBatch], changed: list[bool]) -> None:
        """Takes an ablation's outcomes; a prompt that it leaves as it is keeps its own."""
        groups = [group for batch in batches for group in batch.outcomes]
        pairs = zip(groups, self.outcomes[OWN], strict=True)
        self.outcomes[name] = [group[0].correct if group else own for group, own in pairs]
        self.changed[name] = changed
        self.follow += [
            value for batch in batches for value in batch.extra or [] if value is not None
        ]


def build_report(findings: Findings) -> dict:
    """Builds the report but for run time, checkpoint and data; see `grpo_latent.evaluate`."""
    tried = {name: sum(changed) for name, changed in findings.changed.items()}
    greedy = findings.decodings[GREEDY.name]
    sampled = findings.decodings.get("sampled")
    further = {
        name: report
        for name, report in findings.decodings.items()
        if name not in (GREEDY.name, "sampled")
    }
    usage = usage_report(findings)
    return {
        "num_prompts": len(findings.prompts),
        "greedy": greedy | {"score": fmean(findings.scores)},
        "sampled": sampled,
        "decodings": further,
        "latents": latent_statistics(findings.own),
        "chance": chance(findings),
        "ablations": {OWN: findings.accuracy(OWN)}
        | {name: findings.accuracy(name) if count else None for name, count in tried.items()},
        "num_changed": tried,
        "usage": usage,
        "verdict": overall_verdict(findings, usage),
        "follow": fmean(findings.follow) if findings.follow else None,
        "hit": fmean(findings.hits) if findings.hits else None,
        "leak": findings.leak,
        "prompts": [
            {
                "row_id": prompt.row_id,
                "question": prompt.cluster,
                "where": prompt.where,
                "truth": str(prompt.ground_truth),
            }
            for prompt in findings.prompts
        ],
        "outcomes": {
            name: values for name, values in findings.outcomes.items() if tried.get(name, 1)
        },
    }


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
        "interval": _interval(means_Q, settings),
        "n": decoding.num_sampled or 1,
    }
    report |= _by_item(prompts, means_P, settings)
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
            str(k): {"estimate": fmean(values_Q), "interval": _interval(values_Q, settings)}
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


def _interval(values: Sequence[float], settings: VerdictSettings) -> list[float] | None:
    if not values:
        return None
    # a reward that is no accuracy has no known range to widen the interval to
    bounds = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else None
    return _bounds(
        bootstrap_interval(
            values, level=settings.level, num_resamples=settings.num_resamples, bounds=bounds
        )
    )


def _by_item(
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
        report["pair_interval"] = _interval(whole, settings)
    elif len(groups) < len(items):
        report |= {"group_accuracy": fmean(whole), "group_interval": _interval(whole, settings)}
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


def chance(findings: Findings) -> float:
    """Says how often guessing is right: as configured, or of the benchmark."""
    chances = [prompt.item.chance for prompt in findings.prompts if prompt.item is not None]
    return fmean(chances) if any(chances) else findings.verdict.chance


def usage_report(findings: Findings) -> dict[str, dict]:
    """Reports accuracies, gap, McNemar's test and verdict of each ablation on what it changed.

    All over questions (`by_cluster`); McNemar's test is left out where their means are fractions.
    `num_changed` counts rows, `num_questions` what they are averaged to.

    The oracle feeds better vectors, and no loss under it says nothing about use: it gets no
    verdict. `SUBJECTS` are the ablations whose verdict is not about the latents.
    """
    settings = findings.verdict
    own_P = findings.outcomes[OWN]
    clusters = [prompt.cluster for prompt in findings.prompts]
    # counted before any is tested: each one's level depends on how many there are
    tested = [
        name
        for name, changed in findings.changed.items()
        if any(changed) and parse_name(name)[0] != ORACLE
    ]
    report: dict[str, dict] = {}
    for name, changed in findings.changed.items():
        rows = zip(clusters, own_P, findings.outcomes[name], changed, strict=True)
        pairs = [
            (cluster, a, b)
            for cluster, a, b, is_changed in rows
            if is_changed and None not in (a, b)
        ]
        if not pairs:
            report[name] = {
                "num_changed": sum(changed),
                "own": None,
                "ablated": None,
                "verdict": None,
            }
            continue
        changed_clusters, own_rows, ablated_rows = zip(*pairs, strict=True)
        own = by_cluster(changed_clusters, own_rows)
        ablated = by_cluster(changed_clusters, ablated_rows)
        entry: dict[str, object] = {
            "num_changed": len(pairs),
            "num_questions": len(own),
            "own": fmean(own),
            "ablated": fmean(ablated),
            "verdict": None,
        }
        if name in tested:
            verdict = usage_verdict(
                own,
                ablated,
                ablation=name,
                chance=chance(findings),
                margin=settings.margin,
                level=settings.level,
                num_tests=len(tested),
                num_resamples=settings.num_resamples,
            )
            entry |= {"about": SUBJECTS.get(name, LATENTS)} | _verdict_dict(verdict)
        report[name] = entry
    return report


def _verdict_dict(verdict: UsageVerdict) -> dict:
    return {
        "verdict": verdict.verdict,
        "sentence": verdict.sentence,
        "gap": verdict.gap.estimate,
        "gap_interval": _bounds(verdict.gap),
        "p_value": verdict.p_value,
        "mcnemar": None if verdict.mcnemar is None else asdict(verdict.mcnemar),
    }


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def overall_verdict(findings: Findings, usage: dict[str, dict]) -> dict:
    """Gives the primary ablation's verdict, or says why there is none."""
    primary = findings.verdict.primary
    if not any(len(trajectory.latents) for trajectory in findings.own):
        return {
            "verdict": NOT_USED,
            "ablation": None,
            "sentence": f"{NOT_USED}: no trajectory has latents",
        }
    entry = usage.get(primary)
    if entry is None or entry["verdict"] is None:
        why = (
            "was not run"
            if entry is None
            else "gives no verdict"
            if entry["own"] is not None
            else "changed no prompt"
        )
        return {
            "verdict": UNDECIDED,
            "ablation": primary,
            "sentence": f"{UNDECIDED}: {primary} {why}",
        }
    return {"verdict": entry["verdict"], "ablation": primary, "sentence": entry["sentence"]}


def latent_statistics(trajectories: Sequence[Trajectory]) -> dict:
    """Describes the latents of trajectories by number and shape; None for what none shows.

    Norms are per latent step; cosines and effective rank as in `eval.geometry`, a prompt being a
    group.
    """
    steps = [len(t.latents) for t in trajectories]
    shape = geometry([[trajectory.latents] for trajectory in trajectories])
    names = (
        "norm_mean",
        "norm_std",
        "cosine_step_to_step",
        "cosine_across_groups",
        "effective_rank",
    )
    return {
        "frac_rollouts": fmean(count > 0 for count in steps),
        "spans_mean": fmean(len(t.spans) for t in trajectories),
        "steps_mean": fmean(steps),
        "steps_max": max(steps),
        **{name: shape.get(name) for name in names},
        "length_mean": fmean(len(t.token_ids) for t in trajectories),
        "frac_stopped_by_length": fmean(t.stop_reason == "length" for t in trajectories),
    }
