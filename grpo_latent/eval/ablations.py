"""Causal ablations: the same prompts, decoded again with other vectors at the latent positions.

    own trajectory of a prompt ──ablation──▶ vectors [K, H] ──latent_override──▶ the engine feeds them ──▶ outcome

Everything else stays: prompt, image, tokens before the first latent, mask, sampling. If the outcome does not move, the
latents are not used (SYSTEMS: "Are the latents used at all?").

    zero     zeros
    noise    a random direction with the norm of the prompt's own latent
    shuffle  the latents of another prompt
    oracle   the image embeddings of the row's boxes: what SFT's targets are

Latent step i of the ablated trajectory is fed vector i mod K. A prompt that has no latents of its own, no donor or no
boxes keeps its own outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.replay import collate, replay
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import PositionKind, Trajectory

LEAK_ROWS = 16  # sequences of one forward


@dataclass(frozen=True)
class AblationInputs:
    """What ablations are made of, one entry a prompt.

    Attributes:
        own: trajectories with the model's own latents.
        visual: merged image embeddings [M, H] of the prompt, or None.
        seed: of noise and of donors.
    """

    prompts: Sequence[EvalPrompt]
    own: Sequence[Trajectory]
    visual: Sequence[Tensor | None]
    seed: int = 0


Vectors = list[Tensor | None]  # [K, H] for each prompt; None leaves the prompt as it is


def zero(inputs: AblationInputs) -> Vectors:
    return [torch.zeros_like(t.latents) if len(t.latents) else None for t in inputs.own]


def noise(inputs: AblationInputs) -> Vectors:
    """Gaussian directions, each scaled to the norm of the latent that it replaces."""
    vectors = []
    for index, trajectory in enumerate(inputs.own):
        generator = torch.Generator().manual_seed(trajectory_seed(inputs.seed, 0, f"noise/{index}", 0))
        directions = torch.randn(trajectory.latents.shape, generator=generator)
        norms = trajectory.latents.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)
        vectors.append(directions * norms if len(directions) else None)
    return vectors


def shuffle(inputs: AblationInputs) -> Vectors:
    return [None if donor is None else inputs.own[donor].latents for donor in donors(inputs.own, inputs.seed)]


def oracle(inputs: AblationInputs) -> Vectors:
    return [
        visual[list(prompt.roi)] if visual is not None and prompt.roi and len(own.latents) else None
        for prompt, own, visual in zip(inputs.prompts, inputs.own, inputs.visual, strict=True)
    ]


ABLATIONS: dict[str, Callable[[AblationInputs], Vectors]] = {
    "zero": zero,
    "noise": noise,
    "shuffle": shuffle,
    "oracle": oracle,
}


def check_name(name: str) -> None:
    """Raises `ConfigError` at an unknown ablation."""
    if name not in ABLATIONS:
        raise ConfigError("unknown ablation", where="ablations", got=name, expected=f"one of {tuple(ABLATIONS)}")


def make_vectors(name: str, inputs: AblationInputs) -> Vectors:
    check_name(name)
    return ABLATIONS[name](inputs)


def donors(own: Sequence[Trajectory], seed: int) -> list[int | None]:
    """For each trajectory the index of another one whose latents it gets; no one is its own donor.

    A random cycle through the trajectories that have latents; None for the others, or if there is only one.
    """
    holders = torch.tensor([i for i, trajectory in enumerate(own) if len(trajectory.latents)], dtype=torch.long)
    if len(holders) < 2:
        return [None] * len(own)
    generator = torch.Generator().manual_seed(trajectory_seed(seed, 0, "shuffle", 0))
    cycle = holders[torch.randperm(len(holders), generator=generator)].tolist()
    giver = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [giver.get(i) for i in range(len(own))]


def repeat_to(vectors_KH: Tensor, length: int) -> Tensor:
    """[length, H]: vector i mod K at i, since an ablated trajectory may take more latent steps than its source."""
    return vectors_KH[torch.arange(length) % len(vectors_KH)]


def nearest_token_hits(trajectory: Trajectory, roi: Sequence[int], visual_MH: Tensor) -> list[bool]:
    """For the first latents of a trajectory, whether the nearest visual token (L2) is the ideal one.

    Says how well latents are *aligned* with the boxes, not whether they are used.
    """
    pairs = zip(trajectory.latents, roi, strict=False)
    return [int((visual_MH - latent).square().sum(-1).argmin()) == token for latent, token in pairs]


@torch.no_grad()
def leak(
    adapter: ModelAdapter,
    prompts: Sequence[EvalPrompt],
    own: Sequence[Trajectory],
    visibility: str,
    max_prompts: int = 64,
) -> float | None:
    """Largest change of a post-span log-prob, in nats, when the image is swapped under the recorded latents.

    Exactly 0.0 if the latents are the only way from the image to the text. Each prompt gets the image of another one with
    the same image grid; None if no prompt has a span with text after it and such a partner.
    """
    rows = [i for i, t in enumerate(own) if prompts[i].images is not None and bool(_post_span(t.kinds).any())]
    partners = _partners([prompts[i].images for i in rows])
    pairs = [(rows[a], rows[b]) for a, b in partners if a != b][:max_prompts]
    largest = None
    for start in range(0, len(pairs), LEAK_ROWS):
        part = pairs[start : start + LEAK_ROWS]
        trajectories = [own[i] for i, _ in part]
        batch = collate(trajectories, [prompts[i].images for i, _ in part], adapter, "both")
        swapped = collate(trajectories, [prompts[i].images for _, i in part], adapter, "both")
        change_BT = (replay(adapter, swapped, visibility)[0] - replay(adapter, batch, visibility)[0]).abs()
        change = float(change_BT[_post_span(batch.kinds_BT)].max())
        largest = change if largest is None else max(largest, change)
    return largest


def _post_span(kinds: Tensor) -> Tensor:
    """bool, same shape: sampled text after the end of a span."""
    return ((kinds == PositionKind.FORCED).cumsum(-1) > 0) & (kinds == PositionKind.TEXT)


def _partners(images: list[ImageInputs]) -> list[tuple[int, int]]:
    """(i, next one with the same grid) in order of i, cyclic within equal grids."""
    by_grid: dict[str, list[int]] = {}
    for index, pixels in enumerate(images):
        by_grid.setdefault(str(pixels.image_grid_thw.tolist()), []).append(index)
    pairs = [(a, b) for same in by_grid.values() for a, b in zip(same, same[1:] + same[:1], strict=True)]
    return sorted(pairs)


def with_truth_of(prompts: Sequence[EvalPrompt], sources: Sequence[int | None]) -> list[EvalPrompt]:
    """Prompts with the ground truth of their donors, for `follow`; entries without a donor stay as they are."""
    return [
        prompt if source is None else replace(prompts[source], where=prompt.where)
        for prompt, source in zip(prompts, sources, strict=True)
    ]
