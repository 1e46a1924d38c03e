"""Vectors that ablations feed in place of a trajectory's own latents.

One function an ablation, from all trajectories' latents of one part to what each is fed there.
Shape letters: K latents of the part, N of the trajectory, R rows of a table to draw from, H hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.eval.donors import donors
from grpo_latent.rollout.protocol import part_kinds, part_number
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import PositionKind, Trajectory, made_mask

SHUFFLE = "shuffle"
ORACLE = "oracle"
IMAGE_SWAP = "image_swap"
LATENT_KINDS = (int(PositionKind.LATENT), int(PositionKind.SELECTED), int(PositionKind.MIXED))
# [K, H] of each prompt; None leaves the prompt as it is
Vectors = list[Tensor | None]


class Places:
    """The K latent positions of a part of a trajectory.

    Attributes:
        kinds_K: LATENT, SELECTED or MIXED.
        idx_K: place among all latents of the trajectory.
        rank_K: place among those of the same kind in the part.
        latents_KH: the vectors that stood there.
    """

    def __init__(self, trajectory: Trajectory, part: str):
        kinds_N = trajectory.kinds[trajectory.recorded_mask]
        is_part_N = torch.isin(kinds_N, torch.tensor(part_kinds(part)))
        span_number, latent_number = part_number(part, "span"), part_number(part, "latent")
        if span_number is not None:
            lengths = torch.tensor([span.length for span in trajectory.spans], dtype=torch.long)
            is_part_N &= (
                torch.repeat_interleave(torch.arange(len(lengths)), lengths) == span_number
            )
        if latent_number is not None:
            is_own_N = made_mask(kinds_N).long()
            is_part_N &= is_own_N.cumsum(-1) - is_own_N == latent_number
        self.idx_K = is_part_N.nonzero()[:, 0]
        self.kinds_K = kinds_N[self.idx_K]
        is_text_K = made_mask(self.kinds_K)
        self.rank_K = torch.where(is_text_K, is_text_K.cumsum(-1), (~is_text_K).cumsum(-1)) - 1
        self.latents_KH = trajectory.latents[self.idx_K]

    def __len__(self) -> int:
        return len(self.idx_K)

    def of_kind(self, kind: int) -> Tensor:
        return self.latents_KH[self.kinds_K == kind]

    def filled_from(self, source: Callable[[int], Tensor]) -> Tensor:
        """At each place vector `rank` mod their number of `source(kind)`; its own where that is
        empty.

        Of latents of one kind that is what the engine makes of the source itself, however many
        steps a trajectory takes.
        """
        kinds = self.kinds_K.unique().tolist()
        if len(kinds) == 1 and len(source(kinds[0])):
            return source(kinds[0])
        vectors_KH = self.latents_KH.clone()
        for kind in LATENT_KINDS:
            table_RH, is_kind_K = source(kind), self.kinds_K == kind
            if len(table_RH):
                vectors_KH[is_kind_K] = table_RH[self.rank_K[is_kind_K] % len(table_RH)].to(
                    vectors_KH.dtype
                )
        return vectors_KH


@dataclass(frozen=True)
class PartInputs:
    """`AblationInputs` for one part of the latents."""

    own: Sequence[Places]
    ideal: Sequence[Tensor | None]
    seed: int
    swapped: Sequence[Places | None]
    clusters: Sequence[str]


def _zero(inputs: PartInputs) -> Vectors:
    return [torch.zeros_like(own.latents_KH) for own in inputs.own]


def _noise(inputs: PartInputs) -> Vectors:
    """Gaussian directions, each scaled to the norm of the latent that it replaces."""
    vectors: Vectors = []
    for index, own in enumerate(inputs.own):
        generator = torch.Generator().manual_seed(
            trajectory_seed(inputs.seed, 0, f"noise/{index}", 0)
        )
        directions_KH = torch.randn(own.latents_KH.shape, generator=generator)
        vectors.append(
            directions_KH
            * own.latents_KH.norm(dim=-1, keepdim=True)
            / directions_KH.norm(dim=-1)[:, None]
        )
    return vectors


def _shuffle(inputs: PartInputs) -> Vectors:
    sources = donors([len(own) for own in inputs.own], inputs.clusters, inputs.seed)
    return [
        None if source is None else own.filled_from(inputs.own[source].of_kind)
        for own, source in zip(inputs.own, sources, strict=True)
    ]


def _mean(inputs: PartInputs) -> Vectors:
    """At each place the mean over the prompts that have a latent of that kind and rank."""
    means: dict[int, Tensor] = {}
    for kind in LATENT_KINDS:
        tables = [own.of_kind(kind) for own in inputs.own]
        longest = max(map(len, tables), default=0)
        rows = [
            torch.stack([t[rank] for t in tables if len(t) > rank]).mean(0)
            for rank in range(longest)
        ]
        means[kind] = torch.stack(rows) if rows else torch.zeros(0)
    return [own.filled_from(means.__getitem__) for own in inputs.own]


def _first_repeat(inputs: PartInputs) -> Vectors:
    return [own.filled_from(lambda kind, own=own: own.of_kind(kind)[:1]) for own in inputs.own]


def _oracle(inputs: PartInputs) -> Vectors:
    """Latent number i of the trajectory is the embedding of the boxes' visual token i; of slots,
    chosen embedding i is.
    """
    vectors: Vectors = []
    for own, ideal_RH in zip(inputs.own, inputs.ideal, strict=True):
        if ideal_RH is None:
            vectors.append(None)
            continue
        is_selected_K = own.kinds_K == PositionKind.SELECTED
        ideal_K = torch.where(is_selected_K, own.rank_K, own.idx_K) % len(ideal_RH)
        is_kept_K = ~is_selected_K & bool(is_selected_K.any())
        vectors.append(torch.where(is_kept_K[:, None], own.latents_KH, ideal_RH[ideal_K]))
    return vectors


def _image_swap(inputs: PartInputs) -> Vectors:
    return [
        None if swapped is None else own.filled_from(swapped.of_kind)
        for own, swapped in zip(inputs.own, inputs.swapped, strict=True)
    ]


VECTORS: dict[str, Callable[[PartInputs], Vectors]] = {
    "zero": _zero,
    "noise": _noise,
    SHUFFLE: _shuffle,
    "mean": _mean,
    "first_repeat": _first_repeat,
    ORACLE: _oracle,
    IMAGE_SWAP: _image_swap,
}
