"""Qwen2-VL."""

from __future__ import annotations

from transformers.models.qwen2_vl.processing_qwen2_vl import (
    Qwen2VLProcessor as StockQwen2VLProcessor,
)

from grpo_latent.backbones.images_only import use_images_only
from grpo_latent.backbones.qwen_vl import QwenImagesOnly, QwenVL
from grpo_latent.backbones.registry import register


@register
class Qwen2VL(QwenVL):
    """A Qwen2-VL model."""

    model_types = ("qwen2_vl",)
    processor_names = ("Qwen2VLProcessor",)


class Qwen2VLProcessor(QwenImagesOnly, StockQwen2VLProcessor):
    """Images-only `Qwen2VLProcessor`."""


use_images_only("qwen2_vl", Qwen2VLProcessor)
