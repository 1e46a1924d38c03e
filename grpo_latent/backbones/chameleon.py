"""Chameleon: a VQ model turns an image into token ids, whose embeddings are the image embeddings.

The ids take the place of the placeholders before the forward, which then is that of a text model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import ChameleonProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.registry import register
from grpo_latent.errors import ConfigError

# around the tokens of an image; no field of its config names them
DELIMITERS = ("<racm3:break>", "<eoss>")


@register
class Chameleon(Backbone):
    """A Chameleon model; neither vLLM nor verl gets its images."""

    model_types = ("chameleon",)
    processor_names = ("ChameleonProcessor",)
    image_arguments = ()

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        mapping = self.base.vocabulary_mapping
        ids = [mapping.image_token_id, *(mapping.vocab_map.get(token) for token in DELIMITERS)]
        self.image_token_id = ids[0]
        self.vision_ids = frozenset(token_id for token_id in ids if token_id is not None)
        self.unpredicted_ids = mapping.image_tokens

    @classmethod
    def check_vllm(cls, hf_config: PreTrainedConfig, where: str) -> None:
        raise ConfigError(
            "engine vllm has no image inputs for it",
            where=f"{where}: model_type",
            got="chameleon",
            expected="a text or Qwen-VL model",
            fix="Use engine hf.",
        )

    @classmethod
    def check_verl(cls, where: str) -> None:
        raise ConfigError(
            "its images are token ids that only the rollout engine makes",
            where=where,
            got="a Chameleon model",
            expected="a text or Qwen-VL model",
            fix="Chameleon runs in SFT, rollout, replay and evaluation.",
        )

    @classmethod
    def image_inputs(cls, batch: Mapping[str, Tensor], processor: ProcessorMixin) -> ImageInputs:
        assert isinstance(processor, ChameleonProcessor)
        side = math.isqrt(processor.image_seq_length)  # the token map of an image is square
        pixel_values = batch["pixel_values"]
        return ImageInputs(pixel_values, torch.tensor([[1, side, side]] * pixel_values.shape[0]))

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.base.vqmodel]

    @property
    def trains_vision(self) -> bool:
        return False  # which code vector is nearest has no gradient

    def encode_images(self, images: ImageInputs) -> Tensor:
        return self.embedding(self._token_ids(images))

    def forward_inputs(
        self, input_ids_BT: Tensor, images: ImageInputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        is_image_BT = self.is_image_token(input_ids_BT)
        return input_ids_BT.masked_scatter(is_image_BT, self._token_ids(images)), {}

    @torch.no_grad()
    def _token_ids(self, images: ImageInputs) -> Tensor:
        """int64 [M], token ids of all images in order."""
        weight = next(self.base.vqmodel.parameters())
        pixel_values = images.pixel_values.to(weight.device, weight.dtype)
        return self.base.get_image_tokens(pixel_values).flatten().long()
