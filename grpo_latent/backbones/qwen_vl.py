"""What the Qwen-VL families share: a tower `visual` with its merger, mRoPE, one image processor.

image ──processor──▶ patches [t * h * w, channels * 2 * patch * patch], grid (t, h, w)
      ──visual──▶ t * h * w / merge² embeddings
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.images_only import ImagesOnly
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.published_configs import read_as_published
from grpo_latent.errors import ConfigError

_MERGERS = ("merger.", "deepstack_merger_list.")


class QwenVL(Backbone):
    """A Qwen-VL model; subclasses name their model type and processor."""

    has_mrope = True
    caches_tower = True
    runs_tower_without_images = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        names = (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
        ids = [getattr(self.config, name, None) for name in names]
        self.image_token_id = ids[0]
        self.vision_ids = frozenset(token_id for token_id in ids if token_id is not None)

    @classmethod
    def image_inputs(cls, batch: Mapping[str, Tensor], processor: ProcessorMixin) -> ImageInputs:
        return ImageInputs(batch["pixel_values"], batch["image_grid_thw"])

    @classmethod
    def bound_image_tokens(
        cls, processor: ProcessorMixin, minimum: int | None, maximum: int | None
    ) -> None:
        image_processor = processor.image_processor
        token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
        size = dict(image_processor.size)
        for name, count in (("shortest_edge", minimum), ("longest_edge", maximum)):
            if count is not None:
                size[name] = count * token_pixels
        if size["shortest_edge"] > size["longest_edge"]:
            raise ConfigError(
                "no image size fits",
                where="data.min_image_tokens, data.max_image_tokens",
                got=(size["shortest_edge"] // token_pixels, size["longest_edge"] // token_pixels),
                expected="minimum <= maximum",
            )
        image_processor.size = type(image_processor.size)(**size)

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.base.visual]

    def merger_parameters(self) -> list[nn.Parameter]:
        named = self.base.visual.named_parameters()
        return [parameter for name, parameter in named if name.startswith(_MERGERS)]

    @property
    def merge_size(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def num_pixel_rows(self, images: ImageInputs) -> int:
        return int(images.image_grid_thw.prod(-1).sum())

    def encode_images(self, images: ImageInputs) -> Tensor:
        images = images.to(self.embedding.weight.device)
        features = self.base.get_image_features(images.pixel_values, images.image_grid_thw)
        return torch.cat(tuple(features.pooler_output))

    def position_ids(
        self, input_ids_BT: Tensor, valid_BT: Tensor, images: ImageInputs, plain: Tensor
    ) -> Tensor:
        # without `mm_token_type_ids` transformers numbers image positions as text, silently
        position_ids, _ = self.base.get_rope_index(
            input_ids_BT,
            mm_token_type_ids=self.is_image_token(input_ids_BT).int(),
            image_grid_thw=images.image_grid_thw,
            attention_mask=valid_BT.long(),
        )
        return position_ids


class QwenImagesOnly(ImagesOnly):
    """Images-only form of a Qwen-VL processor."""

    video_processor_type = "Qwen2VLVideoProcessor"

    def default_video_config(self) -> dict:
        geometry = ("patch_size", "temporal_patch_size", "merge_size")
        return {
            **super().default_video_config(),
            **{name: getattr(self.image_processor, name) for name in geometry},
            "size": dict(self.image_processor.size),
        }

    @property
    def model_input_names(self) -> list[str]:
        names = (
            self.tokenizer.model_input_names
            + self.image_processor.model_input_names
            + ["mm_token_type_ids"]
        )
        return list(dict.fromkeys(names))


def build_qwen_processor(
    images_only: type[QwenImagesOnly],
    tokenizer: PreTrainedTokenizerBase,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int = 2,
) -> ProcessorMixin:
    """A Qwen-VL processor with its own geometry, for a model built from config.

    Images are resized only if a side is no multiple of `patch_size * merge_size`, or if they have
    more than 1024 merged visual tokens.

    Args:
        images_only: the family's class, directly above the stock one that is taken where
            torchvision is present.
        tokenizer: with a chat template and the Qwen vision tokens.
    """
    geometry = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": temporal_patch_size,
    }
    token_pixels = (patch_size * merge_size) ** 2
    size = {"shortest_edge": token_pixels, "longest_edge": 1024 * token_pixels}
    image_processor = Qwen2VLImageProcessorPil(size=size, **geometry)
    if not is_torchvision_available():
        return images_only(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    video_class = getattr(
        importlib.import_module("transformers"), images_only.video_processor_type
    )
    video_processor = video_class(size=dict(size), **geometry)
    stock = images_only.__bases__[-1]
    return stock(
        image_processor, tokenizer, video_processor, chat_template=tokenizer.chat_template
    )


for _model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
    read_as_published(_model_type)
