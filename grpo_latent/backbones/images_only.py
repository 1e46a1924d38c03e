"""Processors that load without torchvision.

The stock processors of many families own a video processor, and transformers' video processors
need torchvision, which the CPU set leaves out. Here each of them has an images-only subclass *of
the same name*: verl picks the position function by the class name, and `processor_class` in a
saved folder is that name. Where torchvision is missing, importing the family's file puts the
subclass where `AutoProcessor` looks the name up; transformers has no public hook for it, as its
own lookup finds the stock class first. Where torchvision is present nothing changes, and a folder
written here loads as the stock processor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers.utils import is_torchvision_available

from grpo_latent.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase
    from transformers import ProcessorMixin as _StockProcessor
else:
    # a mixin: the stock class comes behind it in the bases of whoever uses it
    _StockProcessor = object


class ImagesOnly(_StockProcessor):
    """Mixin over a stock processor: no video processor; a video is an error, never ignored.

    `__init__` names no video processor, which is how transformers learns that there is none to
    load. Saving still writes a `video_processor` entry, so that the folder is complete for a
    machine with torchvision.
    """

    video_processor_type = ""
    _loaded_video_config: dict | None = None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
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
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor._loaded_video_config = processor_dict.get("video_processor")
        return loaded

    def to_dict(self) -> dict:
        return {
            **super().to_dict(),
            "video_processor": self._loaded_video_config or self.default_video_config(),
        }

    def default_video_config(self) -> dict:
        """What a saved folder says of the video processor where the loaded one said nothing."""
        return {"video_processor_type": self.video_processor_type}


def use_images_only(model_type: str, images_only: type[ImagesOnly]) -> bool:
    """Lets `AutoProcessor` find the class for `model_type`, where torchvision is missing.

    In this process only; idempotent.

    Returns:
        Whether the images-only class is in use.
    """
    if is_torchvision_available():
        return False
    setattr(
        importlib.import_module(f"transformers.models.{model_type}"),
        images_only.__name__,
        images_only,
    )
    return True
