"""Whose latents, image or ground truth a prompt gets in place of its own.

Always another question's: rows that share one (`EvalPrompt.cluster`) are no strangers, so that
what is swapped between them may well be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.rollout.sampling import trajectory_seed


def donors(num_latents: Sequence[int], clusters: Sequence[str], seed: int) -> list[int | None]:
    """Draws for each trajectory one of another cluster whose latents it gets, none twice.

    Random; None for those without latents, and where no other cluster is left.
    """
    holders = torch.tensor([i for i, count in enumerate(num_latents) if count], dtype=torch.long)
    generator = torch.Generator().manual_seed(trajectory_seed(seed, 0, "shuffle", 0))
    order = holders[torch.randperm(len(holders), generator=generator)].tolist()
    giver = of_other_clusters(order, clusters)
    return [giver.get(i) for i in range(len(num_latents))]


def image_partners(
    prompts: Sequence[EvalPrompt], rows: Sequence[int] | None = None
) -> dict[int, int]:
    """Finds each prompt (of `rows`) one of another cluster whose images have the same grids.

    Those that have none are left out.
    """
    by_grid: dict[str, list[int]] = {}
    clusters = [prompt.cluster for prompt in prompts]
    for index in range(len(prompts)) if rows is None else rows:
        images = prompts[index].images
        if images is not None:
            by_grid.setdefault(str(images.image_grid_thw.tolist()), []).append(index)
    return {
        a: b for same in by_grid.values() for a, b in of_other_clusters(same, clusters).items()
    }


def with_truth_of(
    prompts: Sequence[EvalPrompt], sources: Sequence[int | None]
) -> list[EvalPrompt]:
    """Gives each prompt the ground truth of its donor, for `follow`.

    Entries without a donor stay as they are.

    Everything else, `extra_info` too, stays the prompt's own: a reward may judge by it what the
    completion should look like.
    """
    return [
        prompt if source is None else replace(prompt, ground_truth=prompts[source].ground_truth)
        for prompt, source in zip(prompts, sources, strict=True)
    ]


def of_other_clusters(order: Sequence[int], clusters: Sequence[str]) -> dict[int, int]:
    """Gives each of `order` the next one, cyclically, of another cluster, and nobody else that.

    Clusters stand side by side, and each takes the one that is as many places on as the largest
    cluster has members. Those whose cluster holds more than half of all may find none.

    >>> of_other_clusters([2, 0, 1], "abc"), of_other_clusters([0, 1, 2, 3], "aabb")
    ({2: 0, 0: 1, 1: 2}, {0: 2, 1: 3, 2: 0, 3: 1})
    """
    sizes = Counter(clusters[i] for i in order)  # in order of first appearance
    places = {cluster: place for place, cluster in enumerate(sizes)}
    row = sorted(order, key=lambda i: places[clusters[i]])
    shift = max(sizes.values(), default=0)
    return {
        a: b
        for a, b in zip(row, row[shift:] + row[:shift], strict=True)
        if clusters[a] != clusters[b]
    }
