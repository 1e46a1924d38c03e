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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.vectors import (
    IMAGE_SWAP,
    SHUFFLE,
    VECTORS,
    PartInputs,
    Places,
    Vectors,
)
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.rollout.protocol import ALL, LatentOverride, check_part
from grpo_latent.trajectory import Trajectory

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
    """(ablation, part) of `name` or `name@part`.

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
    """Whether a loss under this ablation shows that what the latents hold is used.

    `shuffle` and `image_swap` feed each place what the model itself makes there, for another
    question or image. Zeros, noise, means, the first latent at every place and missing latents are
    inputs that it has never seen, under which it may fail whatever it reads; the oracle's vectors
    are better ones; `no_span` and `image_blind_after_span` take away something else.

    Raises:
        ConfigError: it does not, or there is no such ablation.
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
    """How an ablation changes each prompt's request; prompts whose own trajectory has no latents
    stay as they are.
    """
    base, part = parse_name(name)
    changes: Changes = []
    if base in REQUESTS:
        for prompt, own in zip(inputs.prompts, inputs.own, strict=True):
            applies = len(own.latents) and (base != BLIND or prompt.images is not None)
            changes.append(REQUESTS[base](inputs.mechanism) if applies else None)
        return changes
    for own, vectors_KH in zip(inputs.own, make_vectors(base, part, inputs), strict=True):
        selected_idx = own.selected_idx if len(own.selected_idx) else None
        override = None if vectors_KH is None else LatentOverride(vectors_KH, part, selected_idx)
        changes.append(None if override is None else {"latent_override": override})
    return changes


def make_vectors(base: str, part: str, inputs: AblationInputs) -> Vectors:
    """What each prompt's latents of the part are fed; None also where that is what they are
    anyway.
    """
    swapped = [
        None if trajectory is None else Places(trajectory, part) for trajectory in inputs.swapped
    ]
    places = [Places(trajectory, part) for trajectory in inputs.own]
    clusters = [prompt.cluster for prompt in inputs.prompts]
    vectors = VECTORS[base](PartInputs(places, inputs.ideal, inputs.seed, swapped, clusters))
    return [
        None
        if vectors_KH is None or not len(own) or torch.equal(vectors_KH, own.latents_KH)
        else vectors_KH
        for own, vectors_KH in zip(places, vectors, strict=True)
    ]
