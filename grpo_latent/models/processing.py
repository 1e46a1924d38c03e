"""Qwen-VL processors that load without torchvision.

The stock Qwen-VL processors own a video processor, and transformers' video processors need torchvision, which the CPU
set leaves out. Here each of them has an images-only subclass *of the same name*: verl picks the position function by
the class name, and `processor_class` in a saved folder is that name. Where torchvision is missing, importing this
module puts the subclasses where `AutoProcessor` looks the name up; transformers has no public hook for it, as its own
lookup finds the stock class first. Where torchvision is present nothing changes, and a folder written here loads as the
stock processor.
"""

from __future__ import annotations

import importlib

from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor as StockQwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor as StockQwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as StockQwen3VLProcessor
from transformers.utils import is_torchvision_available

from grpo_latent.errors import DataError


class ImagesOnly:
    """Mixin over a stock Qwen-VL processor: no video processor; a video is an error, never ignored.

    `__init__` names no video processor, which is how transformers learns that there is none to load. Saving still
    writes a `video_processor` entry, so that the folder is complete for a machine with torchvision.
    """

    video_processor_type = "Qwen2VLVideoProcessor"
    _loaded_video_config: dict | None = None

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As the stock processor's.

        Raises:
            DataError: `videos` holds a video.
        """
        if videos is not None and len(videos) > 0:
            raise DataError(
                "this processor takes images only",
                where=f"{type(self).__name__} without torchvision",
                got=f"{len(videos)} video(s)",
                expected="images and text",
                fix="Install torchvision, or drop rows with videos.",
            )
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor._loaded_video_config = processor_dict.get("video_processor")
        return loaded

    def to_dict(self) -> dict:
        return {**super().to_dict(), "video_processor": self._loaded_video_config or self._default_video_config()}

    def _default_video_config(self) -> dict:
        geometry = ("patch_size", "temporal_patch_size", "merge_size")
        return {
            "video_processor_type": self.video_processor_type,
            **{name: getattr(self.image_processor, name) for name in geometry},
            "size": dict(self.image_processor.size),
        }

    @property
    def model_input_names(self) -> list[str]:
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names + ["mm_token_type_ids"]
        return list(dict.fromkeys(names))


class Qwen2VLProcessor(ImagesOnly, StockQwen2VLProcessor):
    """Images-only `Qwen2VLProcessor`."""


class Qwen2_5_VLProcessor(ImagesOnly, StockQwen2_5_VLProcessor):  # noqa: N801  (the stock class's name, see above)
    """Images-only `Qwen2_5_VLProcessor`."""


class Qwen3VLProcessor(ImagesOnly, StockQwen3VLProcessor):
    """Images-only `Qwen3VLProcessor`."""

    video_processor_type = "Qwen3VLVideoProcessor"


# model type -> (images-only class, stock class)
PROCESSORS = {
    "qwen2_vl": (Qwen2VLProcessor, StockQwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, StockQwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLProcessor, StockQwen3VLProcessor),
}


def register_images_only_processors() -> bool:
    """Puts the images-only classes where `AutoProcessor` looks, in this process, if torchvision is missing.

    Runs on import of this module; idempotent.

    Returns:
        Whether the images-only classes are in use.
    """
    if is_torchvision_available():
        return False
    for model_type, (images_only, _) in PROCESSORS.items():
        setattr(importlib.import_module(f"transformers.models.{model_type}"), images_only.__name__, images_only)
    return True


def build_processor(model_type: str, tokenizer, *, patch_size: int, merge_size: int, temporal_patch_size: int = 2):
    """A Qwen-VL processor with its own geometry, for a model built from config.

    Images are resized only if a side is no multiple of `patch_size * merge_size`, or if they have more than 1024 merged
    visual tokens.

    Args:
        model_type: key of `PROCESSORS`.
        tokenizer: with a chat template and the Qwen vision tokens.
    """
    images_only, stock = PROCESSORS[model_type]
    geometry = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": temporal_patch_size}
    token_pixels = (patch_size * merge_size) ** 2
    size = {"shortest_edge": token_pixels, "longest_edge": 1024 * token_pixels}
    image_processor = Qwen2VLImageProcessorPil(size=size, **geometry)
    if not is_torchvision_available():
        return images_only(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    video_class = getattr(importlib.import_module("transformers"), images_only.video_processor_type)
    video_processor = video_class(size=dict(size), **geometry)
    return stock(image_processor, tokenizer, video_processor, chat_template=tokenizer.chat_template)


register_images_only_processors()
