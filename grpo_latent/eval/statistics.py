"""Statistics of an evaluation: intervals, pass@k, paired tests, the verdict on an ablation.

The prompt is the unit throughout: trajectories of one prompt are averaged before anything is
resampled, because they share its difficulty. P prompts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from grpo_latent.errors import ConfigError, DataError

USED, NOT_USED, UNDECIDED = "used", "not used", "undecided at this n"
DEFAULT_MARGIN = 0.05
_CHUNK_ELEMENTS = 4_000_000  # numbers that are drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided confidence interval of coverage `level`."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class McNemar:
    """Counts discordant pairs and gives the two-sided exact p-value.

    `only_own` are prompts that only the first of the pair answers.
    """

    only_own: int
    only_other: int
    p_value: float


@dataclass(frozen=True)
class UsageVerdict:
    """What an ablation says about the latents.

    Attributes:
        verdict: `USED`, `NOT_USED` or `UNDECIDED`.
        sentence: the same with its numbers.
        gap: own minus ablated accuracy.
        mcnemar: exact test, None where outcomes are not 0/1.
        num_prompts: paired prompts.
    """

    verdict: str
    sentence: str
    gap: Interval
    mcnemar: McNemar | None
    num_prompts: int

    @property
    def p_value(self) -> float | None:
        return None if self.mcnemar is None else self.mcnemar.p_value


def by_cluster(clusters: Sequence[str], values: Sequence[float | None]) -> list[float]:
    """Averages over the rows that share a question (`EvalPrompt.cluster`).

    Rows without a value are left out.

    These are what may be resampled. A question counts once, however many rows of it are left.

    >>> by_cluster(["a", "a", "b", "c"], [1.0, 0.0, 1.0, None])
    [0.5, 1.0]
    """
    groups: dict[str, list[float]] = {}
    for cluster, value in zip(clusters, values, strict=True):
        if value is not None:
            groups.setdefault(cluster, []).append(value)
    return [fmean(values) for values in groups.values()]


def bootstrap_interval(
    values_P: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Interval:
    """Bootstraps an interval of the mean over questions, by percentiles.

    A resample shows only values that were seen. Where the largest or smallest possible one was
    not, the interval reaches as far as the exact binomial bound on its rate, 1 - (alpha/2)^(1/P),
    allows: 3 right answers of 3 are not certainty.

    Args:
        values_P: one number per question (mean over its trajectories).
        bounds: range of the values, for the widening; None leaves it out.

    Raises:
        DataError: no values, or one that is not finite.
    """
    values_P = _values(values_P, "values")
    if not 0 < level < 1 or num_resamples < 1:
        raise ConfigError(
            "not usable",
            where="level, num_resamples",
            got=(level, num_resamples),
            expected="(0, 1), >= 1",
        )
    rng = np.random.default_rng(seed)
    num_prompts = values_P.shape[0]
    # how often each value is drawn is multinomial: for outcomes of few values that is the same,
    # without drawing prompts
    values_U, counts_U = np.unique(values_P, return_counts=True)
    means_R = np.empty(num_resamples)
    chunk = max(1, _CHUNK_ELEMENTS // len(values_U))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        draws_RU = rng.multinomial(num_prompts, counts_U / num_prompts, size)
        means_R[start : start + size] = draws_RU @ values_U / num_prompts
    alpha = 1 - level
    low, high = np.quantile(means_R, [alpha / 2, 1 - alpha / 2])
    estimate = float(values_P.mean())
    if bounds is not None:
        unseen = 1 - (alpha / 2) ** (1 / num_prompts)
        if values_P.min() > bounds[0]:
            low = min(low, estimate - unseen * (estimate - bounds[0]))
        if values_P.max() < bounds[1]:
            high = max(high, estimate + unseen * (bounds[1] - estimate))
    return Interval(estimate, float(low), float(high), level)


def bootstrap_difference(
    own_P: Sequence[float] | np.ndarray, other_P: Sequence[float] | np.ndarray, **options
) -> Interval:
    """Bootstraps mean(own - other) over *paired* prompts; options as `bootstrap_interval`."""
    own_P, other_P = _pair(own_P, other_P)
    return bootstrap_interval(own_P - other_P, **{"bounds": (-1.0, 1.0), **options})


def pass_at_k(num_trajectories: int, num_correct: int, k: int) -> float:
    """Estimates the probability that k trajectories, drawn without replacement, hold a right one.

    It is 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374 (section 2.1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4)
    (0.25, 1.0)
    """
    if not 0 <= num_correct <= num_trajectories or not 1 <= k <= num_trajectories:
        raise ConfigError(
            "not usable",
            where="pass_at_k",
            got=f"n={num_trajectories}, correct={num_correct}, k={k}",
            expected="0 <= correct <= n and 1 <= k <= n",
        )
    return 1.0 - math.comb(num_trajectories - num_correct, k) / math.comb(num_trajectories, k)


def mcnemar_exact(
    own_P: Sequence[bool] | np.ndarray, other_P: Sequence[bool] | np.ndarray
) -> McNemar:
    """Tests whether prompts on which the two differ favour either (McNemar, exact, two-sided).

    Raises:
        DataError: lengths differ, or an outcome is not 0/1.
    """
    own_P, other_P = _pair(own_P, other_P)
    if not _is_binary(own_P, other_P):
        raise DataError(
            "McNemar's test needs right or wrong",
            where="outcomes",
            got="fractions",
            expected="0 or 1 a prompt",
            fix="Use bootstrap_difference for means over several trajectories.",
        )
    only_own = int((own_P > other_P).sum())
    only_other = int((own_P < other_P).sum())
    discordant = only_own + only_other
    smaller = min(only_own, only_other)
    # integers, because 2.0**-discordant underflows beyond 1074 pairs
    tail = 2 * sum(math.comb(discordant, i) for i in range(smaller + 1))
    return McNemar(only_own, only_other, min(1.0, tail / 2**discordant))


def usage_verdict(
    own_P: Sequence[float] | np.ndarray,
    ablated_P: Sequence[float] | np.ndarray,
    *,
    ablation: str = "ablation",
    chance: float = 0.0,
    margin: float = DEFAULT_MARGIN,
    level: float = 0.95,
    num_tests: int = 1,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> UsageVerdict:
    """Says whether answers depend on the latents that an ablation replaced.

    With gap = own - ablated accuracy over paired prompts:

        used       the interval lies above 0, McNemar's p < 1 - level (where outcomes are 0/1),
                   and the gap >= margin
        not used   the interval lies below margin: whatever dependence there is, it is smaller
                   than what matters
        undecided  neither; or own accuracy is within margin of chance, so that there is nothing
                   to lose

    "Not used" is an equivalence test: a p-value above 0.05 alone says only that n was small.

    Args:
        chance: accuracy of guessing.
        margin: smallest gap that counts as use: with many prompts a gap that matters to no one is
            still significant.
        num_tests: ablations tested together; interval and test are those of level 1 - (1 - level)
            / num_tests (Bonferroni).
    """
    own_P, ablated_P = _pair(own_P, ablated_P)
    level = 1 - (1 - level) / num_tests
    options = dict(level=level, num_resamples=num_resamples, seed=seed)
    gap = bootstrap_difference(own_P, ablated_P, **options)
    own_mean, ablated_mean = own_P.mean(), ablated_P.mean()
    num_prompts = own_P.shape[0]
    mcnemar = mcnemar_exact(own_P, ablated_P) if _is_binary(own_P, ablated_P) else None
    p_value = None if mcnemar is None else mcnemar.p_value
    numbers = (
        f"accuracy {own_mean:.3f} own, {ablated_mean:.3f} with {ablation}; "
        f"gap {gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], n = {num_prompts}"
    )
    if p_value is not None:
        numbers += f", McNemar p = {p_value:.2g}"
    is_significant = gap.low > 0 and (p_value is None or p_value < 1 - level)
    # asked first: a model that guesses loses nothing without its latents, used or not
    if own_mean - chance < margin:
        verdict, reason = UNDECIDED, f"own accuracy is within {margin:g} of chance ({chance:g})"
    elif is_significant and gap.estimate >= margin:
        verdict, reason = USED, f"the gap is above 0 and at least {margin:g}"
    elif gap.high < margin:
        verdict, reason = NOT_USED, f"the gap is below {margin:g}"
    else:
        verdict, reason = (
            UNDECIDED,
            f"the interval holds both 'no gap' and gaps of {margin:g} or more",
        )
        if is_significant:
            reason = f"the gap is above 0, but may be smaller than {margin:g}"
    return UsageVerdict(verdict, f"{verdict}: {reason} ({numbers})", gap, mcnemar, num_prompts)


def _values(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or values_P.shape[0] == 0 or not np.isfinite(values_P).all():
        raise DataError(
            "not one finite number per prompt",
            where=name,
            got=f"shape {values_P.shape}, {int((~np.isfinite(values_P)).sum())} not finite",
            expected="[P] with P >= 1",
        )
    return values_P


def _pair(
    own: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    own_P, other_P = _values(own, "own"), _values(other, "other")
    if own_P.shape != other_P.shape:
        raise DataError(
            "outcomes are not paired",
            where="own and other",
            got=f"{own_P.shape[0]} and {other_P.shape[0]} prompts",
            expected="the same prompts in the same order",
        )
    return own_P, other_P


def _is_binary(*arrays: np.ndarray) -> bool:
    return all(bool(np.isin(values, (0.0, 1.0)).all()) for values in arrays)
