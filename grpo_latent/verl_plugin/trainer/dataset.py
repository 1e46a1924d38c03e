"""verl's data set with this package's checks, and without torchvision where there are only images.

Chosen by `data.custom_cls.path=pkg://grpo_latent.verl_plugin.trainer.dataset
data.custom_cls.name=LatentDataset`.

Two differences to `RLHFDataset`. Each row is checked before verl sees it, since verl's length
filter drops rows that raise and only prints. And images reach the processor as they are: verl goes
through qwen_vl_utils, which needs torchvision and resizes first; the processor resizes anyway, by
the same rule, and SFT has no such first step.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from verl.utils.dataset.rl_dataset import RLHFDataset

from grpo_latent.data.examples import ImageRef, to_rgb
from grpo_latent.data.rows import check_prompt
from grpo_latent.errors import DataError

_IMAGE_KEYS = {"type", "image", "bytes", "path"}


class LatentDataset(RLHFDataset):
    """`RLHFDataset` of checked rows.

    Raises:
        DataError: a malformed row, or an empty data set after filtering.
    """

    def maybe_filter_out_long_prompts(self, dataframe=None):
        files = ", ".join(self.original_data_files)
        seen: dict[object, int] = {}  # an index ▸ its row
        for number, row in enumerate(dataframe):
            check_prompt(row, where=f"{files} row {number}")
            index = (row.get("extra_info") or {}).get("index")
            if index is not None and index in seen:
                raise DataError(
                    "two rows have one index",
                    where=f"{files} rows {seen[index]} and {number}, extra_info.index",
                    got=index,
                    expected="an index that is unique over all files: it seeds the row's "
                    "trajectories and names its dumps",
                    fix="Number the rows of the second file on from the first.",
                )
            seen[index] = number
        kept = super().maybe_filter_out_long_prompts(dataframe)
        if len(kept) == 0:
            raise DataError(
                "no row is left after filtering prompts by length",
                where=", ".join(self.original_data_files),
                got=f"{len(dataframe)} rows, all longer than "
                f"data.max_prompt_length={self.max_prompt_length}",
                expected="prompts, image tokens included, of at most that length",
                fix="Raise data.max_prompt_length.",
            )
        return kept

    @classmethod
    async def process_multi_modal_info(cls, messages, image_patch_size, config):
        """(images, videos, audios) of messages; images as RGB, in order, None without any."""
        if _only_images(messages):
            return cls._process_multi_modal_info(messages, image_patch_size, config)
        return await super().process_multi_modal_info(messages, image_patch_size, config)

    @classmethod
    async def process_vision_info(cls, messages, image_patch_size, config):
        images, videos, _ = await cls.process_multi_modal_info(messages, image_patch_size, config)
        return images, videos

    @classmethod
    def _process_multi_modal_info(cls, messages, image_patch_size, config):
        if not _only_images(messages):
            return super()._process_multi_modal_info(messages, image_patch_size, config)
        images = [_load(part["image"]) for part in _parts(messages) if part.get("type") == "image"]
        return images or None, None, None


def _parts(messages) -> list[dict]:
    return [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    ]


def _only_images(messages) -> bool:
    """Whether nothing needs qwen_vl_utils: no video, audio, URL, or size limit of one image."""
    return all(
        part.get("type") == "text"
        or (part.get("type") == "image" and set(part) <= _IMAGE_KEYS and _is_local(part))
        for part in _parts(messages)
    )


def _is_local(part: dict) -> bool:
    image = part.get("image")
    return isinstance(image, Image.Image) or (
        isinstance(image, str) and not image.startswith(("http", "data:"))
    )


def _load(image: Image.Image | str) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return ImageRef("prompt", path=Path(image.removeprefix("file://"))).open()
