"""From messages and images to the prompt ids and pixels that models, rollouts and SFT take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """`ids` int64 [P], image placeholders expanded; `images` in their order, or None."""

    ids: Tensor
    images: ImageInputs | None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    messages: Sequence[dict],
    images: Sequence[Image.Image],
    where: str,
) -> Prompt:
    """The prompt as the model sees it before its response: chat template, then the processor.

    Args:
        messages: contents are lists of {"type": "text", "text": ...} and {"type": "image"}.
        images: one per image part, in order.
        where: file and row, for errors.

    Raises:
        DataError: the numbers of images and of image parts differ, or images for a model without a
            processor.
    """
    num_parts = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_parts != len(images):
        raise DataError(
            "images do not match the prompt",
            where=where,
            got=f"{len(images)} image(s), {num_parts} <image> in the prompt",
            expected="one <image> per image",
        )
    if images and processor is None:
        raise DataError(
            "an image for a text-only model",
            where=where,
            got=f"{len(images)} image(s)",
            expected="none",
        )
    if processor is None:  # templates of text models print a list of parts as it is
        messages = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            for message in messages
        ]
    # Chameleon's processor cannot have a template
    has_own = processor is not None and bool(getattr(processor, "chat_template", None))
    template_owner = processor if processor is not None and has_own else tokenizer
    text = template_owner.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=False
    )
    if not images or processor is None:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return Prompt(ids, None)
    batch = processor(
        text=[text], images=list(images), add_special_tokens=False, return_tensors="pt"
    )
    return Prompt(
        batch["input_ids"][0].to(torch.long),
        backbone_of_processor(processor).image_inputs(batch, processor),
    )
