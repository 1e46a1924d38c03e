"""Makes vLLM's engine inputs of rollout requests: ids and pixels as they are.

No second image processor is involved, so both engines see the same pixels.
"""

from __future__ import annotations

import hashlib

import torch  # noqa: F401  (doctest)
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import RolloutError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.rollout.protocol import RolloutRequest


def engine_input(request: RolloutRequest, adapter: ModelAdapter, policy_version: int) -> dict:
    """What `LLMEngine.add_request` takes.

    Args:
        policy_version: goes into each image's hash, as vLLM keeps encoded images over a change of
            weights.
    """
    token_ids = request.prompt_ids.tolist()
    if request.images is None:
        return tokens_input(token_ids)
    images = request.images
    num_tokens = adapter.num_image_tokens(images).tolist()
    sizes = images.image_grid_thw.prod(-1)
    items = MultiModalKwargsItems.from_hf_inputs(
        BatchFeature(
            {"pixel_values": images.pixel_values, "image_grid_thw": images.image_grid_thw}
        ),
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", sizes),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    image_token_id = adapter.image_token_id
    assert image_token_id is not None  # `check_prompt` refuses images for a text-only model
    ranges = placeholder_ranges(request.prompt_ids, image_token_id, num_tokens, request.group_id)
    return mm_input(
        token_ids,
        items,
        {"image": image_hashes(images, sizes.tolist(), policy_version)},
        {"image": [PlaceholderRange(offset=start, length=length) for start, length in ranges]},
    )


def placeholder_ranges(
    prompt_ids: Tensor, image_token_id: int, num_tokens: list[int], group_id: str
) -> list[tuple[int, int]]:
    """(start, length) of each image's placeholders, images in order.

    >>> placeholder_ranges(torch.tensor([1, 9, 9, 2, 9]), 9, [2, 1], "")
    [(1, 2), (4, 1)]
    """
    positions = (prompt_ids == image_token_id).nonzero()[:, 0].tolist()
    ranges = []
    done = 0
    for length in num_tokens:
        # by number, not by gaps: two images may stand side by side with nothing between
        own = positions[done : done + length]
        if len(own) != length or own[-1] - own[0] + 1 != length:
            raise RolloutError(
                "an image's placeholders are not contiguous",
                where=f"request of group {group_id!r}",
                got=own[:8],
                expected=f"{length} placeholders in a row",
            )
        ranges.append((own[0], length))
        done += length
    return ranges


def image_hashes(images: ImageInputs, num_patches: list[int], policy_version: int) -> list[str]:
    """One hash an image, over pixels, grid and policy version."""
    hashes = []
    for pixels, grid in zip(
        images.pixel_values.split(num_patches), images.image_grid_thw.tolist(), strict=True
    ):
        digest = hashlib.blake2b(
            f"{policy_version}/{grid}/{pixels.dtype}".encode(), digest_size=16
        )
        # float32 holds all that bfloat16 does, which numpy does not know
        digest.update(pixels.cpu().contiguous().float().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes
