"""The statistics of `benchmarks/repair.py`, and that its treatments compose.

Does not cover: the runs, a minute each; the wrong boxes are tests/data/embedded's.
"""

import sys
from pathlib import Path

import pytest

from grpo_latent.errors import DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import one_process  # noqa: E402
import repair  # noqa: E402


def run(treatment, seed, wrong, right):
    return {
        "treatment": treatment,
        "seed": seed,
        "wrong": {"accuracy": wrong, "hit": wrong / 2},
        "right": {"accuracy": right, "hit": 1.0},
        "cpu_s": 10.0 * (1 + seed),
    }


def test_an_interval_of_three_seeds_by_hand():
    """Student's 97.5 % quantile with two degrees of freedom is 4.302653 (tables)."""
    found = repair.interval([0.1, 0.2, 0.3])
    reach = 4.302653 * 0.1 / 3**0.5
    assert found.estimate == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=1e-6)
    with pytest.raises(DataError, match="at least two"):
        repair.interval([0.1])


def test_differences_are_paired_by_seed():
    """Seeds differ by 0.4, and each gains 0.1: the pairs' interval has no width."""
    runs = [run("start", 0, 0.1, 0.7), run("start", 1, 0.5, 0.8)]
    runs += [run("mask", 1, 0.5, 0.9), run("mask", 0, 0.1, 0.8)]
    runs += [run("bptt", 0, 0.2, 0.7), run("bptt", 1, 0.6, 1.0)]
    summary = repair.summarize(runs)
    wrong, right = summary["bptt"]["wrong"], summary["bptt"]["right"]
    for other in ("to_start", "to_mask"):
        assert [wrong[other][key] for key in ("estimate", "low", "high")] == pytest.approx(
            [0.1] * 3
        )
    # differences -0.1 and 0.1: mean 0, error 0.1, 12.706 of it with one degree of freedom
    assert right["to_mask"]["high"] == pytest.approx(1.2706, abs=1e-4)
    assert wrong["accuracy"] == pytest.approx(0.4) and wrong["hit"] == pytest.approx(0.2)
    assert wrong["each"]["accuracy"] == [0.2, 0.6] and summary["bptt"]["cpu_s"] == 15
    assert (
        "to_start" not in summary["start"]["wrong"] and "to_mask" not in summary["mask"]["wrong"]
    )
    assert "| `bptt` | 0.400 | 0.20 | +10.0 [10.0, 10.0] |" in repair.markdown(summary)


def test_a_missing_seed_is_refused():
    runs = [run("start", seed, 0.1, 0.7) for seed in (0, 1)] + [run("mask", 0, 0.1, 0.7)]
    with pytest.raises(DataError, match="mask: differences are not paired"):
        repair.summarize(runs)


@pytest.mark.parametrize("name", repair.TREATMENTS)
def test_treatments_compose_and_are_what_the_loop_can_run(name):
    config = one_process.compose_config(
        BENCHMARKS.parent / repair.CONFIGS,
        "digits_grpo",
        [*repair.SETTINGS, *repair.TREATMENTS[name]],
    )
    one_process.check_config(config)
    assert config.actor_rollout_ref.actor.kl_loss_coef > 0
