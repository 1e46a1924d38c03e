"""What a rollout engine takes and gives, whatever runs underneath."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.trajectory import PositionKind, Trajectory

# parts of a trajectory's latents; `_NUMBERED` ones besides
ALL, TEXT, VISION = "all", "text", "vision"
_NUMBERED = re.compile(r"(span|latent)(\d+)")
_PART_KINDS = {
    ALL: (
        PositionKind.LATENT,
        PositionKind.SELECTED,
        PositionKind.MIXED,
        PositionKind.FED_START,
    ),
    TEXT: (PositionKind.LATENT, PositionKind.MIXED, PositionKind.FED_START),
    VISION: (PositionKind.SELECTED,),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: positions of a completion at most, latents and forced tokens included.
        temperature: 0 is greedy.
        top_k, top_p: truncation; `top_k` <= 0 and `top_p` 1 switch it off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            (
                "max_new_tokens",
                isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1,
                "an int >= 1",
            ),
            ("temperature", 0 <= self.temperature < math.inf, "finite, >= 0"),
            ("top_k", isinstance(self.top_k, int), "an int"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ConfigError(
                    "not usable",
                    where=f"sampling.{name}",
                    got=getattr(self, name),
                    expected=expected,
                )


@dataclass(frozen=True)
class LatentOverride:
    """Vectors fed at latent positions instead of the model's own (causal ablations).

    A trajectory's latent positions of the part are counted from 0, and number i is fed vector i
    mod K. All others are fed what the model makes of the prefix as it then is.

    Attributes:
        vectors: float [K, H], K >= 1.
        part: `all`; `text`, what hidden states made (LATENT, MIXED); `vision`, the chosen image
            embeddings (SELECTED); `span<k>`, the latents of the k-th span from 0; `latent<k>`, the
            k-th latent and the image embeddings chosen for it.
        selected_idx: for prompt slots: the image positions taken by the SELECTED positions, where
            attention shall not choose anew (an own trajectory's, so that other vectors at some
            positions change nothing at the others).
    """

    vectors: Tensor = field(repr=False)
    part: str = ALL
    selected_idx: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_part(self.part, "latent_override.part")


def part_number(part: str, unit: str) -> int | None:
    """The number of the `span` or `latent` that a part names, None for parts of all of them."""
    match = _NUMBERED.fullmatch(part)
    return int(match[2]) if match is not None and match[1] == unit else None


def part_kinds(part: str) -> list[int]:
    """`PositionKind`s of the positions that a part may hold."""
    # a numbered span or latent holds what all kinds of latents do
    return [int(kind) for kind in _PART_KINDS.get(part, _PART_KINDS[ALL])]


def check_part(part: str, where: str) -> None:
    """Raises `ConfigError` unless `part` is one that `LatentOverride` knows."""
    if part not in _PART_KINDS and _NUMBERED.fullmatch(part) is None:
        expected = "all, text, vision, span<number> or latent<number>"
        raise ConfigError("unknown part of the latents", where=where, got=part, expected=expected)


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt and the G trajectories wanted of it.

    Attributes:
        prompt_ids: int64 [P], image placeholders expanded.
        seeds: one per trajectory (`rollout.sampling.trajectory_seed`); their number is the group
            size.
        images: pixels of the prompt's images, or None.
        group_id: copied into the trajectories.
        steps: latent steps a span for this prompt, None for the checkpoint's; 0 leaves the
            delimiters alone (no slots).
        max_spans: spans that a trajectory may open, None for the checkpoint's; 0 forces text.
        blind_after_span: text after the first span does not see the image.
        latent_override: vectors fed instead of the model's own latents.
    """

    prompt_ids: Tensor
    seeds: list[int]
    images: ImageInputs | None = None
    group_id: str = ""
    steps: int | None = None
    max_spans: int | None = None
    blind_after_span: bool = False
    latent_override: LatentOverride | None = None

    def __post_init__(self) -> None:
        ids = self.prompt_ids
        where = f"request of group {self.group_id!r}"
        if ids.ndim != 1 or ids.shape[0] == 0 or ids.dtype != torch.int64:
            got = f"prompt_ids {ids.dtype} of shape {tuple(ids.shape)}"
            raise RolloutError(
                "not a prompt", where=where, got=got, expected="int64 [P] with P >= 1"
            )
        if not self.seeds:
            raise RolloutError(
                "no trajectories wanted", where=where, got=self.seeds, expected="a seed for each"
            )
        if not all(isinstance(seed, int) and 0 <= seed < 2**64 for seed in self.seeds):
            raise RolloutError(
                "not seeds", where=where, got=self.seeds, expected="ints in [0, 2**64)"
            )
        for name in ("steps", "max_spans"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 0):
                raise RolloutError(
                    "not a count", where=f"{where}: {name}", got=value, expected="int >= 0 or None"
                )


class RolloutEngine(Protocol):
    """Turns requests into trajectories, by weights, requests and sampling alone."""

    def generate(
        self, requests: list[RolloutRequest], sampling: SamplingParams
    ) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces all weights; names as in the model's `state_dict`."""
        ...
