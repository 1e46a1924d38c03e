"""From outcomes to the numbers of a report, by hand."""

import pytest
import torch
from latent_cases import build_case

from grpo_latent.errors import RewardError
from grpo_latent.eval.accuracies import decoding_report
from grpo_latent.eval.benchmarks import BenchmarkItem
from grpo_latent.eval.decode import GREEDY, Decoding
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.report import Findings, chance, latent_statistics, usage_report
from grpo_latent.eval.scoring import Outcome, accuracy, as_outcome
from grpo_latent.eval.statistics import bootstrap_difference, bootstrap_interval
from grpo_latent.eval.verdict import VerdictSettings
from grpo_latent.rewards.runner import RewardResult
from grpo_latent.rollout.protocol import SamplingParams


def test_accuracy_prefers_acc_and_leaves_dropped_out():
    results = [
        RewardResult(0.3, {"digits": 0.3}, {"accuracy": 1.0}),
        RewardResult(0.0, {"digits": 0.0}, {"accuracy": 0.0}),
        RewardResult(9.0, {"digits": None}, {"accuracy": 1.0}, dropped=True, error_kind="nan"),
    ]
    correct = [as_outcome(result).correct for result in results]
    assert (
        correct == [1.0, 0.0, None] and accuracy(correct) == 0.5 and accuracy(correct[2:]) is None
    )
    assert as_outcome(RewardResult(0.25, {"mine": 0.25}, {})).correct == 0.25, "else the score"


def test_an_accuracy_that_is_a_text_is_named_with_its_row():
    """Not parsed, as scores are not."""
    with pytest.raises(
        RewardError, match="row 7: the reward reports an accuracy that is no number; got yes"
    ):
        as_outcome(RewardResult(1.0, {"mine": 1.0}, {"acc": "yes"}), "row 7")


@pytest.mark.parametrize(
    "terms, extras, correct",
    [
        ({"accuracy": None}, {}, 0.0),
        ({"digits": None}, {}, 0.0),
        ({"format": None, "accuracy": 1.0}, {}, 1.0),
    ],
)
def test_a_failure_that_is_scored_is_not_correct(terms, extras, correct):
    """`on_error=score` with error_score -2; what another function says about accuracy stays."""
    outcome = as_outcome(RewardResult(-2.0, terms, extras, error_kind="timeout"))
    assert (outcome.correct, outcome.score) == (correct, -2.0)


def test_latent_statistics_by_hand():
    c = build_case("qwen2")
    group = c.engine(c.mechanism(steps=2)).generate(
        [c.request(seeds=range(6))], SamplingParams(9)
    )[0]
    statistics = latent_statistics(group)
    assert statistics["frac_rollouts"] == sum(4 in t.kinds for t in group) / 6
    assert statistics["steps_mean"] == sum(t.kinds.tolist().count(4) for t in group) / 6
    assert statistics["steps_max"] == max(t.kinds.tolist().count(4) for t in group)
    norms = [float(row.square().sum()) ** 0.5 for t in group for row in t.latents]
    assert statistics["norm_mean"] == pytest.approx(sum(norms) / len(norms))
    assert (
        statistics["frac_stopped_by_length"] == sum(t.token_ids[-1] != c.eos_id for t in group) / 6
    )


def test_pairs_categories_and_chance_of_a_benchmark():
    """MMVP's pair accuracy and a benchmark's categories, by hand: pairs (1, 1), (1, 0)."""
    items = [
        BenchmarkItem("mmvp", str(i), f"pair {i // 2}", "ab"[i % 2], (), (), ("yes", "no"), "A")
        for i in range(4)
    ]
    prompts = [
        EvalPrompt(torch.ones(1), None, "mmvp", "A", "", str(i), item=item)
        for i, item in enumerate(items)
    ]
    groups = [[Outcome(value, value)] for value in (1.0, 1.0, 1.0, 0.0)]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings())
    assert report["accuracy"] == 0.75 and report["pair_accuracy"] == 0.5
    assert report["by_category"] == {"a": 1.0, "b": 0.5}
    assert chance(Findings(prompts, VerdictSettings())) == 0.5


def rotations(sizes):
    """Prompts of a benchmark whose question q has `sizes[q]` rows."""
    names = [f"question {q}" for q, size in enumerate(sizes) for _ in range(size)]
    items = [
        BenchmarkItem("hrbench", str(i), name, "", (), (), ("7", "8", "9", "10"), "A")
        for i, name in enumerate(names)
    ]
    return [
        EvalPrompt(torch.ones(1), None, "hrbench", "A", "", item.item_id, item=item)
        for item in items
    ]


def test_verdicts_count_a_question_once():
    """Four questions of two rows.

    Under zero two questions are lost: gap 2/4, McNemar 2 * 1/2^2 = 0.5 over questions (over
    rows it would be 2 * 1/2^4). Under noise one row of each of two is lost: means 1/2, 1/2, 1,
    1, so no McNemar. Under shuffle three rows of two questions changed: means (1 + 0) / 2 and
    0 against 1 and 1.
    """
    findings = Findings(rotations([2] * 4), VerdictSettings(level=0.95))
    findings.outcomes = {
        "own": [1.0] * 8,
        "zero": [0.0] * 4 + [1.0] * 4,
        "noise": [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        "shuffle": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    findings.changed = {
        "zero": [True] * 8,
        "noise": [True] * 8,
        "shuffle": [True, True, True] + [False] * 5,
    }
    usage = usage_report(findings)
    zero, noise, shuffle = (usage[name] for name in ("zero", "noise", "shuffle"))
    assert (zero["num_changed"], zero["num_questions"], zero["ablated"], zero["gap"]) == (
        8,
        4,
        0.5,
        0.5,
    )
    assert (
        zero["mcnemar"] == {"only_own": 2, "only_other": 0, "p_value": 0.5}
        and "n = 4" in zero["sentence"]
    )
    assert noise["gap"] == 0.25 and noise["mcnemar"] is None and noise["num_questions"] == 4
    assert (shuffle["num_changed"], shuffle["num_questions"], shuffle["gap"]) == (3, 2, 0.75)
    level = 1 - 0.05 / 3
    expected = bootstrap_difference([1, 1, 1, 1], [0.5, 0.5, 1, 1], level=level)
    assert noise["gap_interval"] == [expected.low, expected.high]
    over_rows = bootstrap_difference(
        findings.outcomes["own"], findings.outcomes["zero"], level=level
    )
    assert zero["gap_interval"][1] - zero["gap_interval"][0] > over_rows.high - over_rows.low


def test_accuracies_and_their_intervals_count_a_question_once():
    """Rows (1, 1, 0) and (0): question means 2/3 and 0, so 1/3, and 2/4 over rows.

    A row without a score is left out.
    """
    prompts, settings = rotations([3, 1]), VerdictSettings()
    expected = bootstrap_interval([2 / 3, 0.0])
    groups = [[Outcome(value, value)] for value in (1.0, 1.0, 0.0, 0.0)]
    report = decoding_report(prompts, GREEDY, groups, settings)
    assert report["interval"] == [expected.low, expected.high]
    assert report["accuracy"] == pytest.approx(expected.estimate) == pytest.approx(1 / 3)
    assert report["row_accuracy"] == 0.5 and report["group_accuracy"] == 0.0
    findings = Findings(
        prompts, settings, outcomes={"own": [1.0, 1.0, 0.0, 0.0], "zero": [1.0, None, 0.0, 1.0]}
    )
    assert (findings.accuracy("own"), findings.accuracy("zero")) == (pytest.approx(1 / 3), 0.75)
    groups[2] = [Outcome(None, 0.0)]
    report, expected = (
        decoding_report(prompts, GREEDY, groups, settings),
        bootstrap_interval([1.0, 0.0]),
    )
    assert report["interval"] == [expected.low, expected.high]
    assert (report["accuracy"], report["row_accuracy"]) == (0.5, pytest.approx(2 / 3))


def test_sampled_accuracies_count_a_question_once():
    """Rows of two trajectories (1, 0), (1, 1), (0, 0) and, another question, (0, 0).

    Means of the first question: accuracy (1/2 + 1 + 0) / 3, pass@2 (1 + 1 + 0) / 3, by seed (1
    + 1 + 0) / 3 and (0 + 1 + 0) / 3; of the second 0.
    """
    sampled, settings = Decoding("sampled", 2), VerdictSettings()
    groups = [
        [Outcome(float(value), 0.0) for value in pair] for pair in ((1, 0), (1, 1), (0, 0), (0, 0))
    ]
    report = decoding_report(rotations([3, 1]), sampled, groups, settings)
    expected = bootstrap_interval([2 / 3, 0.0])
    assert (
        report["accuracy"] == report["pass_at_k"]["1"]["estimate"] == 0.25
        and report["row_accuracy"] == 3 / 8
    )
    assert report["pass_at_k"]["2"]["estimate"] == pytest.approx(1 / 3)
    assert report["pass_at_k"]["2"]["interval"] == [expected.low, expected.high]
    assert report["accuracy_by_seed"] == [pytest.approx(1 / 3), pytest.approx(1 / 6)]
