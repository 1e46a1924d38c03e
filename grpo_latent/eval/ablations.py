"""Causal ablations: the same prompts, decoded again with other vectors at the latent positions.

    own trajectory of a prompt ──ablation──▶ changes of its request ──the engine decodes──▶ outcome

Everything else stays: prompt, image, tokens before the first latent, mask, seeds. If the outcome
does not move, the latents are not used.

    zero          zeros
    noise         a random direction with the norm of the prompt's own latent
    shuffle       the latents of another prompt
    mean          the mean of all prompts' latents at the same place
    first_repeat  the first of the prompt's own latents at every place
    oracle        the image embeddings of the row's boxes: what SFT's targets are
    image_swap    the latents that the model makes of the same prompt with another row's image
    markers_only  no latents between the delimiters
    no_span       no span is opened: forced text
    image_blind_after_span  own latents, but text after the first span does not see the image

`name@part` replaces only a part of the latents: `span<k>`, the k-th span (from 0); `latent<k>`,
the k-th latent; or, for prompt slots, `text` (the fed hidden states) or `vision` (the chosen image
embeddings). Whatever is not replaced is what the model makes of the changed prefix; a slot's
chosen image positions stay the own ones. An ablation that changes nothing for a prompt (no latents
there, no donor, no boxes) leaves it its own outcome.

To add one that feeds vectors, write a function from `PartInputs` to `Vectors` and its row in
`VECTORS`; one that changes a request otherwise is a row in `REQUESTS`, made by the mechanism.

Legend: K latents of a part, N of a trajectory, R rows of a table to draw from, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.eval.donors import donors
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.rollout.protocol import (
    ALL,
    LatentOverride,
    check_part,
    part_kinds,
    part_number,
)
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
        span_number = part_number(part, "span")
        latent_number = part_number(part, "latent")
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

    def first_of_kind(self, kind: int) -> Tensor:
        return self.of_kind(kind)[:1]

    def filled_from(self, source: Callable[[int], Tensor]) -> Tensor:
        """Puts vector number `rank` (mod their number) of `source(kind)` at each place.

        A place keeps its own where the source has none of its kind.

        Of latents of one kind that is what the engine makes of the source itself, however many
        steps a trajectory takes.
        """
        kinds = self.kinds_K.unique().tolist()
        if len(kinds) == 1 and len(source(kinds[0])):
            return source(kinds[0])
        vectors_KH = self.latents_KH.clone()
        for kind in LATENT_KINDS:
            table_RH = source(kind)
            is_kind_K = self.kinds_K == kind
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
    """Draws Gaussian directions, each scaled to the norm of the latent that it replaces."""
    vectors: Vectors = []
    for index, own in enumerate(inputs.own):
        # a stream a prompt: its noise does not depend on how many latents stand before it
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
    """Feeds each place the mean over the prompts that have a latent of that kind and rank."""
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
    return [own.filled_from(own.first_of_kind) for own in inputs.own]


def _oracle(inputs: PartInputs) -> Vectors:
    """Feeds latent number i of the trajectory the embedding of the boxes' visual token i.

    Of slots, the chosen embedding number i gets it, and the fed h stay.
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

BLIND = "image_blind_after_span"
# fields of each prompt's `RolloutRequest`; None leaves it as it is
Changes = list[dict | None]
REQUESTS: dict[str, Callable[[Mechanism], dict | None]] = {
    "markers_only": lambda mechanism: mechanism.requests_with_markers_only(),
    "no_span": lambda mechanism: mechanism.requests_without_latents(),
    # behind the bottleneck text is blind anyway
    BLIND: lambda mechanism: (
        {"blind_after_span": True} if mechanism.visibility == "full" else None
    ),
}
ABLATIONS = (*VECTORS, *REQUESTS)
DECIDING = (SHUFFLE, IMAGE_SWAP)


@dataclass(frozen=True)
class AblationInputs:
    """What ablations are made of, one entry a prompt.

    Attributes:
        own: trajectories with the model's own latents.
        ideal: merged image embeddings [R, H] of the row's boxes, None without boxes or image.
        mechanism: the checkpoint's.
        seed: of noise and of donors.
        swapped: for `image_swap`: trajectories of the same prompts with the images of others, None
            where no other fits.
    """

    prompts: Sequence[EvalPrompt]
    own: Sequence[Trajectory]
    ideal: Sequence[Tensor | None]
    mechanism: Mechanism
    seed: int = 0
    swapped: Sequence[Trajectory | None] = ()


def parse_name(name: str) -> tuple[str, str]:
    """Splits `name` or `name@part` into (ablation, part).

    Raises:
        ConfigError: unknown ablation or part, or a part of an ablation that feeds no vectors.

    >>> parse_name("shuffle@span1"), parse_name("zero")
    (('shuffle', 'span1'), ('zero', 'all'))
    """
    base, has_part, part = name.partition("@")
    if base not in ABLATIONS:
        raise ConfigError(
            "unknown ablation", where="ablations", got=name, expected=f"one of {ABLATIONS}"
        )
    if not has_part:
        return base, ALL
    check_part(part, f"ablations: {name}")
    if base not in VECTORS:
        expected = f"a part with one of {tuple(VECTORS)}"
        raise ConfigError(
            "an ablation without vectors has no parts",
            where="ablations",
            got=name,
            expected=expected,
        )
    return base, part


def check_decides(name: str, where: str) -> None:
    """Refuses an ablation under which a loss need not show that the latents are used.

    `shuffle` and `image_swap` feed each place what the model itself makes there, for another
    question or image. Zeros, noise, means, the first latent at every place and missing latents are
    inputs that it has never seen, under which it may fail whatever it reads; the oracle's vectors
    are better ones; `no_span` and `image_blind_after_span` take away something else.

    Raises:
        ConfigError: it need not, or there is no such ablation.
    """
    if parse_name(name)[0] not in DECIDING:
        raise ConfigError(
            "a loss under this ablation need not mean that the latents are used",
            where=where,
            got=name,
            expected=f"{' or '.join(DECIDING)}, or a part as in shuffle@span1",
            fix="It can be one of the other ablations, which are reported beside the verdict.",
        )


def make_changes(name: str, inputs: AblationInputs) -> Changes:
    """Makes the changes of each prompt's request; None for a prompt without latents."""
    base, part = parse_name(name)
    changes: Changes = []
    if base in REQUESTS:
        for prompt, own in zip(inputs.prompts, inputs.own, strict=True):
            applies = len(own.latents) and (base != BLIND or prompt.images is not None)
            changes.append(REQUESTS[base](inputs.mechanism) if applies else None)
        return changes
    for own, vectors_KH in zip(inputs.own, make_vectors(base, part, inputs), strict=True):
        # the own choice of image positions: what differs is to be the vectors alone
        selected_idx = own.selected_idx if len(own.selected_idx) else None
        override = None if vectors_KH is None else LatentOverride(vectors_KH, part, selected_idx)
        changes.append(None if override is None else {"latent_override": override})
    return changes


def make_vectors(base: str, part: str, inputs: AblationInputs) -> Vectors:
    """Makes what each prompt's latents of the part are fed; None where that changes nothing."""
    swapped = [
        None if trajectory is None else Places(trajectory, part) for trajectory in inputs.swapped
    ]
    places = [Places(trajectory, part) for trajectory in inputs.own]
    clusters = [prompt.cluster for prompt in inputs.prompts]
    # what is the same anyway is no change: prompts that it does not change would thin out the gap
    vectors = VECTORS[base](PartInputs(places, inputs.ideal, inputs.seed, swapped, clusters))
    return [
        None
        if vectors_KH is None or not len(own) or torch.equal(vectors_KH, own.latents_KH)
        else vectors_KH
        for own, vectors_KH in zip(places, vectors, strict=True)
    ]
