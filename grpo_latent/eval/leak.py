"""Looks for leaks past the latents: an image is swapped under recorded ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_latent.eval.donors import image_partners
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.trajectory import Trajectory, is_start, is_text

ROWS_PER_FORWARD = 16


@torch.no_grad()
def leak(
    adapter: ModelAdapter,
    prompts: Sequence[EvalPrompt],
    own: Sequence[Trajectory],
    visibility: str,
    max_prompts: int = 64,
) -> float | None:
    """Measures how far a post-span log-prob moves, in nats, when the image is swapped.

    It is the largest change under the recorded latents, exactly 0.0 if these are the only way from
    the image to the text. Each prompt gets the image of another one with the same image grid; None
    if no prompt has a span with text after it and such a partner.
    """
    rows = [
        i
        for i, t in enumerate(own)
        if prompts[i].images is not None and bool(_post_span(t.kinds).any())
    ]
    pairs = sorted(image_partners(prompts, rows).items())[:max_prompts]
    largest = None
    for start in range(0, len(pairs), ROWS_PER_FORWARD):
        chunk = pairs[start : start + ROWS_PER_FORWARD]
        trajectories = [own[i] for i, _ in chunk]
        own_images = [prompts[i].images for i, _ in chunk]
        other_images = [prompts[partner].images for _, partner in chunk]
        batch = collate(trajectories, own_images, adapter, visibility, "both")
        swapped = collate(trajectories, other_images, adapter, visibility, "both")
        change_BT = (replay(adapter, swapped)[0] - replay(adapter, batch)[0]).abs()
        change = float(change_BT[_post_span(batch.kinds_BT)].max())
        largest = change if largest is None else max(largest, change)
    return largest


def _post_span(kinds: Tensor) -> Tensor:
    """Marks sampled text after the end of a span: bool, same shape."""
    # no text stands inside a span, and a sampled end need not be there at all
    return (is_start(kinds).cumsum(-1) > 0) & is_text(kinds)
