"""InternVL (2.5, 3, 3.5) in its Hugging Face form: images are tiles, positions are those of text.

    image ──processor──▶ square tiles [n, 3, S, S], the last a thumbnail of all if n > 1
          ──tower──▶ patches ──2 x 2──▶ projector ──▶ n tiles of s x s tokens: grid (n, s, s)

A box is looked up in the view that shows the whole image: the only tile, or the thumbnail. `<img>`
and `</img>` around the placeholders count as words, as no field of the model's config names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.internvl.processing_internvl import (
    InternVLProcessor as StockInternVLProcessor,
)

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.images_only import ImagesOnly, use_images_only
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.registry import register
from grpo_latent.errors import ConfigError


@register
class InternVL(Backbone):
    """An InternVL model; verl trains it by Hugging Face's own forward."""

    model_types = ("internvl",)
    processor_names = ("InternVLProcessor",)
    image_arguments = ("pixel_values",)

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        image_token_id = self.config.image_token_id
        self.image_token_id = image_token_id
        self.vision_ids = frozenset({image_token_id})

    @classmethod
    def check_vllm(cls, hf_config: PreTrainedConfig, where: str) -> None:
        raise ConfigError(
            "engine vllm is not given tiles",
            where=f"{where}: model_type",
            got=hf_config.model_type,
            expected="a text or Qwen-VL model",
            fix="Use engine hf.",
        )

    @classmethod
    def image_inputs(cls, batch: Mapping[str, Tensor], processor: ProcessorMixin) -> ImageInputs:
        assert isinstance(processor, StockInternVLProcessor)
        tokens_of_tile = processor.image_seq_length
        if "num_patches" in batch:  # of the image processor alone; in its words a patch is a tile
            tiles = [int(count) for count in batch["num_patches"]]
        else:
            is_image = (batch["input_ids"].flatten() == processor.image_token_id).int()
            # delimiters stand between two images: each run of placeholders is one image
            nothing = torch.zeros(1)
            edges = torch.diff(is_image, prepend=nothing, append=nothing).nonzero()[:, 0]
            tiles = [length // tokens_of_tile for length in (edges[1::2] - edges[::2]).tolist()]
        side = math.isqrt(tokens_of_tile)
        return ImageInputs(
            batch["pixel_values"], torch.tensor([[count, side, side] for count in tiles])
        )

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.base.vision_tower, self.base.multi_modal_projector]

    def merger_parameters(self) -> list[nn.Parameter]:
        return list(self.base.multi_modal_projector.parameters())

    def num_pixel_rows(self, images: ImageInputs) -> int:
        return int(images.image_grid_thw[:, 0].sum())

    def box_view(self, grid_thw: list[int]) -> tuple[int, list[int]]:
        tiles, height, width = grid_thw
        return (tiles - 1) * height * width, [1, height, width]

    def encode_images(self, images: ImageInputs) -> Tensor:
        pixel_values = images.pixel_values.to(self.embedding.weight.device)
        features = self.base.get_image_features(pixel_values, return_dict=True)
        return features.pooler_output.flatten(0, 1)


class InternVLProcessor(ImagesOnly, StockInternVLProcessor):
    """Images-only `InternVLProcessor`."""

    video_processor_type = "InternVLVideoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        StockInternVLProcessor.__init__(
            self, image_processor, tokenizer, None, image_seq_length, chat_template
        )


use_images_only("internvl", InternVLProcessor)
