"""Against hand numbers, scipy where it is installed, and by simulation.

Not covered: coverage at very small n.
"""

import numpy as np
import pytest

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.statistics import (
    NOT_USED,
    UNDECIDED,
    USED,
    bootstrap_difference,
    bootstrap_interval,
    mcnemar_exact,
    pass_at_k,
    usage_verdict,
)


def outcomes(
    both: int, only_own: int, only_other: int, neither: int
) -> tuple[np.ndarray, np.ndarray]:
    own = np.repeat([1, 1, 0, 0], [both, only_own, only_other, neither])
    other = np.repeat([1, 0, 1, 0], [both, only_own, only_other, neither])
    return own, other


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (4, 2, 2, 1 - 1 / 6),
        (5, 0, 3, 0.0),
        (5, 5, 1, 1.0),
        (10, 3, 5, 1 - 21 / 252),
        (3, 1, 3, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """The mean over draws of n of the estimator is 1 - (1 - p)^k."""
    rng = np.random.default_rng(0)
    estimates = [pass_at_k(8, int(c), 3) for c in rng.binomial(8, 0.3, 20000)]
    assert np.mean(estimates) == pytest.approx(1 - 0.7**3, abs=0.01)


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses(n, correct, k):
    with pytest.raises(ConfigError):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("only_own", "only_other", "expected"),
    # by hand: 2 * (1) / 2^5; 2 * (1 + 6) / 2^6; 1 where they tie; 1 where they never differ
    [(5, 0, 0.0625), (5, 1, 14 / 64), (3, 3, 1.0), (0, 0, 1.0), (1, 5, 14 / 64)],
)
def test_mcnemar_by_hand(only_own, only_other, expected):
    result = mcnemar_exact(*outcomes(7, only_own, only_other, 2))
    assert (result.only_own, result.only_other) == (only_own, only_other)
    assert result.p_value == pytest.approx(expected, abs=1e-12)


def test_mcnemar_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for only_own, only_other in [(12, 4), (400, 380), (900, 700)]:
        ours = mcnemar_exact(*outcomes(3, only_own, only_other, 5)).p_value
        theirs = stats.binomtest(only_own, only_own + only_other, 0.5).pvalue
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_bootstrap_against_the_normal_interval():
    values = np.repeat([0.0, 1.0], [400, 600])
    interval = bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.24 / 1000)
    assert interval.estimate == pytest.approx(0.6)
    assert interval.low == pytest.approx(0.6 - half, abs=0.003)
    assert interval.high == pytest.approx(0.6 + half, abs=0.003)
    assert interval == bootstrap_interval(values)  # a function of its seed
    assert bootstrap_interval(values, level=0.5).high < interval.high


def test_bootstrap_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        interval = bootstrap_interval(rng.binomial(4, 0.7, 80) / 4, num_resamples=400)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.90 <= hits / 300 <= 0.99


def test_equal_values_are_not_certainty():
    """3 right of 3: the exact 95 % bound is 0.025^(1/3) = 0.292."""
    interval = bootstrap_interval([1.0, 1.0, 1.0])
    assert (interval.low, interval.high) == (pytest.approx(0.2924, abs=1e-4), 1.0)
    assert bootstrap_interval([1.0] * 3, bounds=None).low == 1.0


def test_a_value_not_seen_may_still_come():
    """Of 6 differences one is -1 and none +1, which may still have a rate of 0.459.

    By the exact bound, 1 - 0.025^(1/6).
    """
    interval = bootstrap_interval([-1.0, 0, 0, 0, 0, 0], bounds=(-1.0, 1.0))
    assert (
        interval.high == pytest.approx(-1 / 6 + 0.4593 * 7 / 6, abs=1e-3) and interval.low < -0.3
    )


def test_several_tests_at_once_are_stricter():
    """The interval of ten ablations is that of one at 99.5 % (Bonferroni).

    And p = 0.02 is no longer significant.
    """
    pairs = outcomes(60, 14, 4, 2)
    one, ten = usage_verdict(*pairs), usage_verdict(*pairs, num_tests=10)
    assert one.p_value == ten.p_value == pytest.approx(0.031, abs=1e-3)
    assert (one.verdict, ten.verdict) == (USED, UNDECIDED)
    assert ten.gap == bootstrap_difference(*pairs, level=0.995) and ten.gap.low < one.gap.low


def test_difference_is_paired():
    """A gap of exactly 0.1 on prompts of very different difficulty has no width, paired."""
    own = np.linspace(0.2, 1.0, 50)
    interval = bootstrap_difference(own, own - 0.1, bounds=None)
    assert interval.low == pytest.approx(0.1) and interval.high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("pairs", "options", "expected"),
    [
        (outcomes(50, 430, 2, 30), {}, USED),
        (outcomes(485, 6, 6, 15), {}, NOT_USED),
        (outcomes(12, 3, 1, 4), {}, UNDECIDED),  # n = 20: both 'none' and a large gap fit
        (outcomes(3, 0, 0, 0), {}, UNDECIDED),  # n = 3 without any difference is no evidence
        (outcomes(3, 0, 1, 2), {}, UNDECIDED),  # nor is n = 6 with one that favours the ablation
        (outcomes(400, 30, 5, 77), {}, UNDECIDED),  # real (p < 1e-4), yet its size may not matter
        (
            outcomes(20, 30, 30, 432),
            {"chance": 0.1},
            UNDECIDED,
        ),  # at chance there is nothing to lose
        (outcomes(485, 0, 12, 15), {}, NOT_USED),  # the ablation does better
    ],
)
def test_verdict(pairs, options, expected):
    verdict = usage_verdict(*pairs, ablation="shuffle", **options)
    assert verdict.verdict == expected
    assert verdict.sentence.startswith(expected) and f"n = {len(pairs[0])}" in verdict.sentence


def test_verdict_of_fractions_has_no_mcnemar():
    rng = np.random.default_rng(0)
    own, ablated = rng.binomial(8, 0.9, 200) / 8, rng.binomial(8, 0.1, 200) / 8
    verdict = usage_verdict(own, ablated)
    assert verdict.verdict == USED and verdict.p_value is None


@pytest.mark.parametrize("bad", [[], [0.0, float("nan")], [[0.0, 1.0]]])
def test_bad_values_are_named(bad):
    with pytest.raises(DataError, match="one finite number per prompt"):
        bootstrap_interval(bad)


def test_unpaired_is_refused():
    with pytest.raises(DataError, match="3 and 2 prompts"):
        bootstrap_difference([1, 0, 1], [1, 0])
    with pytest.raises(DataError, match="fractions"):
        mcnemar_exact([0.5, 1], [1, 1])
