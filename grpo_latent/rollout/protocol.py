"""What a rollout engine takes and gives, whatever runs underneath."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
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
            ("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "an int >= 1"),
            ("temperature", 0 <= self.temperature < math.inf, "finite, >= 0"),
            ("top_k", isinstance(self.top_k, int), "an int"),
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
        ids, where = self.prompt_ids, f"request of group {self.group_id!r}"
        if ids.ndim != 1 or ids.shape[0] == 0 or ids.dtype != torch.int64:
            got = f"prompt_ids {ids.dtype} of shape {tuple(ids.shape)}"
            raise RolloutError("not a prompt", where=where, got=got, expected="int64 [P] with P >= 1")
        if not self.seeds:
            raise RolloutError("no trajectories wanted", where=where, got=self.seeds, expected="a seed for each")
        if not all(isinstance(seed, int) and 0 <= seed < 2**64 for seed in self.seeds):
            raise RolloutError("not seeds", where=where, got=self.seeds, expected="ints in [0, 2**64)")
        if self.steps is not None and not (isinstance(self.steps, int) and self.steps >= 1):
            raise RolloutError("not a number of latent steps", where=where, got=self.steps, expected="int >= 1 or None")


class RolloutEngine(Protocol):
    """Turns requests into trajectories; the result depends on weights, requests and sampling only."""

    def generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces all weights; names as in the model's `state_dict`."""
        ...
