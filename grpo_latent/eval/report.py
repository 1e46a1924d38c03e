"""From outcomes to the report: accuracies, paired tests, and the verdict on the latents.

Every accuracy is over questions, as its interval is: rows that share one are averaged first, and
it counts once (`eval.accuracies`).

Legend: P prompts (rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from grpo_latent.eval.ablations import ORACLE, parse_name
from grpo_latent.eval.accuracies import decoding_report
from grpo_latent.eval.decode import GREEDY, Decoding
from grpo_latent.eval.geometry import geometry
from grpo_latent.eval.journal import PhaseBatch
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import accuracy
from grpo_latent.eval.statistics import (
    NOT_USED,
    UNDECIDED,
    UsageVerdict,
    by_cluster,
    usage_verdict,
)
from grpo_latent.eval.verdict import LATENTS, SUBJECTS, VerdictSettings
from grpo_latent.trajectory import Trajectory

OWN = "own"


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
        "gap_interval": [verdict.gap.low, verdict.gap.high],
        "p_value": verdict.p_value,
        "mcnemar": None if verdict.mcnemar is None else asdict(verdict.mcnemar),
    }


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
