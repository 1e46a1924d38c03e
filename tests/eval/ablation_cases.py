"""Prompts with an evaluator of a random model, and trajectories whose latents are known by hand."""

import functools

import torch
from latent_cases import build_case, case

from grpo_latent.eval.decode import Evaluator
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.loading import LatentModel
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

TEXTS = ("read red ?", "read blue ?", "? green", "read ? ?", "red", "blue ? read", "green", "? ?")


@functools.cache
def evaluator(visibility="full", steps=2):
    """A random model; `max_new_tokens` 10, so that trajectories hold one span or two, or none."""
    c = build_case("qwen2_5_vl")
    config = c.mechanism(visibility=visibility, steps=steps)
    loaded = LatentModel(c.model, c.tokenizer, c.processor, config, (c.eos_id,))
    return Evaluator(loaded, max_new_tokens=10)


def prompts(with_images=True):
    c, found = case("qwen2_5_vl"), []
    for index, text in enumerate(TEXTS):
        images = c.images(1, seed=index) if with_images else None
        request = c.request(text, images)
        found.append(
            EvalPrompt(
                request.prompt_ids,
                images,
                "test",
                str(index),
                f"row {index}",
                str(index),
                (index % 6,),
            )
        )
    return found


def trajectory(latents, kinds=None):
    if kinds is None:
        kinds = (
            [K.START, *[K.LATENT] * len(latents), K.FORCED, K.TEXT] if len(latents) else [K.TEXT]
        )
    kinds = torch.tensor(kinds)
    zeros = torch.zeros(len(kinds))
    ids = torch.zeros(len(kinds), dtype=torch.long)
    return Trajectory(
        torch.ones(2, dtype=torch.long),
        ids,
        kinds,
        torch.as_tensor(latents).float(),
        zeros,
        zeros,
        "eos",
    )


OWN = [
    trajectory([[3.0, 4.0], [0.0, 2.0]]),
    trajectory(torch.zeros(0, 2)),
    trajectory([[6.0, 8.0]]),
]
VISUAL = [torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), torch.ones(3, 2), None]
