"""Qwen3-VL: deepstack features beside the merged ones, interleaved rotary sections."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.qwen3_vl.processing_qwen3_vl import (
    Qwen3VLProcessor as StockQwen3VLProcessor,
)

from grpo_latent.backbones.images_only import use_images_only
from grpo_latent.backbones.qwen_vl import QwenImagesOnly, QwenVL
from grpo_latent.backbones.registry import register
from grpo_latent.errors import ConfigError


@register
class Qwen3VL(QwenVL):
    """A Qwen3-VL model."""

    model_types = ("qwen3_vl",)
    processor_names = ("Qwen3VLProcessor",)
    # they ask its text config, which names no class beside transformers 5.10, for the first of its
    # classes
    vllm_cannot_build = ((0, 28), (0, 29))

    @classmethod
    def check_vllm(cls, hf_config: PreTrainedConfig, where: str) -> None:
        """Raises `ConfigError` for a config on which vLLM and Hugging Face disagree in silence.

        Transformers interleaves the rotary sections whatever the config says, vLLM only if it says
        so.
        """
        rope = getattr(hf_config.get_text_config(), "rope_parameters", None) or {}
        if not rope.get("mrope_interleaved"):
            raise ConfigError(
                "vLLM would number image positions differently from Hugging Face",
                where=f"{where}: text_config.rope_parameters.mrope_interleaved",
                got=rope.get("mrope_interleaved", "nothing"),
                expected="true",
                fix="Add it to config.json, as the published Qwen3-VL checkpoints have it.",
            )


class Qwen3VLProcessor(QwenImagesOnly, StockQwen3VLProcessor):
    """Images-only `Qwen3VLProcessor`."""

    video_processor_type = "Qwen3VLVideoProcessor"


use_images_only("qwen3_vl", Qwen3VLProcessor)
