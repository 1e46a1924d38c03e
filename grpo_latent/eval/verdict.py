"""When an ablation says that latents are used: margin, level, and which ablation decides."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import BLIND, SHUFFLE, check_decides
from grpo_latent.eval.statistics import DEFAULT_MARGIN

# what a verdict is about, where it is not about the latents themselves
LATENTS = "the latents"
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
