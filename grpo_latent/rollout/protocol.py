"""What a rollout engine takes and gives, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.models.adapter import ImageInputs
from grpo_latent.trajectory import Trajectory


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` <= 0 and `top_p` 1 switch truncation off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self):
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ConfigError("not usable", where=f"sampling.{name}", got=getattr(self, name), expected=expected)


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt and the G trajectories wanted of it.

    Attributes:
        prompt_ids: int64 [P], image placeholders expanded.
        seeds: one per trajectory (`rollout.sampling.trajectory_seed`); their number is the group size.
        images: pixels of the prompt's images, or None.
        group_id: copied into the trajectories.
        steps: latent steps a span for this prompt, None for the checkpoint's.
        latent_override: float [K, H]: vectors fed at the trajectory's first K latent steps instead of the model's own
            (causal ablations). A trajectory that takes more than K latent steps raises `RolloutError`.
    """

    prompt_ids: Tensor
    seeds: list[int]
    images: ImageInputs | None = None
    group_id: str = ""
    steps: int | None = None
    latent_override: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.prompt_ids.ndim != 1 or self.prompt_ids.shape[0] == 0:
            raise RolloutError(
                "not a prompt",
                where=f"request of group {self.group_id!r}",
                got=f"prompt_ids of shape {tuple(self.prompt_ids.shape)}",
                expected="[P] with P >= 1",
            )
        if not self.seeds:
            raise RolloutError("no trajectories wanted", where=f"request of group {self.group_id!r}", expected="seeds")


class RolloutEngine(Protocol):
    """Turns requests into trajectories; the result depends on weights, requests and sampling only."""

    def generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces all weights; names as in the model's `state_dict`."""
        ...
