"""Qwen2.5-VL."""

from __future__ import annotations

from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import (
    Qwen2_5_VLProcessor as StockQwen2_5_VLProcessor,
)

from grpo_latent.backbones.images_only import use_images_only
from grpo_latent.backbones.qwen_vl import QwenImagesOnly, QwenVL
from grpo_latent.backbones.registry import register


@register
class Qwen2_5VL(QwenVL):  # noqa: N801  (the family's name)
    """A Qwen2.5-VL model."""

    model_types = ("qwen2_5_vl",)
    processor_names = ("Qwen2_5_VLProcessor",)


class Qwen2_5_VLProcessor(QwenImagesOnly, StockQwen2_5_VLProcessor):  # noqa: N801
    """Images-only `Qwen2_5_VLProcessor`."""


use_images_only("qwen2_5_vl", Qwen2_5_VLProcessor)
