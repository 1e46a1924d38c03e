"""verl's data set with this package's checks, and without torchvision where there are only images.

Chosen by `data.custom_cls.path=pkg://grpo_latent.verl_plugin.trainer.dataset
data.custom_cls.name=LatentDataset`.

Three differences to `RLHFDataset`. Rows are read by `data.files` and stay as each file has them:
verl joins the files into one table, which `datasets` cannot where a column is null or of another
type in one of them, and which guesses dates in JSON. Each row is checked before verl sees it,
since verl's length filter drops rows that raise and only prints. And images reach the processor as
they are: verl goes through qwen_vl_utils, which needs torchvision and resizes first; the processor
resizes anyway, by the same rule, and SFT has no such first step.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from verl.utils.dataset.rl_dataset import RLHFDataset

from grpo_latent.common.pictures import to_rgb
from grpo_latent.data.checks import check_files
from grpo_latent.data.files import RowKeys, as_row, is_json, iter_verl_rows
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.models.prompts import PromptLength

_IMAGE_KEYS = {"type", "image", "bytes", "path"}


class FileRows(Sequence[dict]):
    """Rows of files by their number over all of them, each read when it is asked for.

    Args:
        paths: parquet files, which `datasets` keeps as memory-mapped tables, or JSON.
    """

    def __init__(self, paths: Sequence[str], keys: RowKeys):
        self._paths = list(paths)
        self._keys = keys
        self._parts = [self._open(path) for path in paths]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))
        self._chosen: Sequence[int] = range(self._ends[-1])

    def _open(self, path: str):
        if is_json(path):
            return [row for row, _ in iter_verl_rows(path, self._keys)]
        import datasets

        table = datasets.load_dataset("parquet", data_files=path)["train"]
        return table.with_format("arrow")  # as stored: images of its type `Image` stay undecoded

    def choose(self, numbers: Sequence[int]) -> None:
        """Leaves these of the rows that are there, in this order."""
        self._chosen = [self._chosen[number] for number in numbers]

    @property
    def numbers(self) -> Sequence[int]:
        """Of the rows that are there, their numbers over all files."""
        return self._chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, item):
        number = self._chosen[item]
        part_idx = bisect.bisect_right(self._ends, number)
        part = self._parts[part_idx]
        row_idx = number - (self._ends[part_idx] - len(part))
        if isinstance(part, list):
            return copy.deepcopy(part[row_idx])  # verl writes into its messages
        (record,) = part[row_idx].to_pylist()
        return as_row(record, self._keys, f"{self._paths[part_idx]} row {row_idx}")

    def __iter__(self) -> Iterator[dict]:
        return (self[item] for item in range(len(self)))


class LatentDataset(RLHFDataset):
    """`RLHFDataset` of checked rows.

    Raises:
        DataError: a malformed row, a prompt that is too long, or no row left by the filter.
    """

    def _read_files_and_tokenize(self):
        keys = RowKeys.of(self.config)
        # from here on: `FileRows` gives the columns these names
        self.prompt_key, self.image_key = "prompt", "images"
        checked = check_files(self.data_files, PromptLength(self.tokenizer, self.processor), keys)
        num_tokens = [count for file in checked for count in file.num_tokens]
        self.dataframe = FileRows(self.data_files, keys)
        total = len(self.dataframe)
        if 0 < self.max_samples < total:  # as verl draws them
            numbers = np.arange(self.max_samples)
            if self.shuffle:
                arguments = () if self.seed is None else (self.seed,)
                drawn = np.random.default_rng(*arguments)
                numbers = drawn.choice(total, size=self.max_samples, replace=False)
            self.dataframe.choose(numbers.tolist())
        fitting = [
            item
            for item, number in enumerate(self.dataframe.numbers)
            if num_tokens[number] <= self.max_prompt_length
        ]
        if self.filter_overlong_prompts:
            self._check_some_left(fitting, num_tokens)
            self.dataframe.choose(fitting)
        print(f"dataset len: {len(self.dataframe)} of {total}")

    def _check_some_left(self, fitting: list[int], num_tokens: list[int]) -> None:
        if not fitting:
            raise DataError(
                "no row is left after filtering prompts by length",
                where=", ".join(self.original_data_files),
                got=f"{len(self.dataframe)} rows, all longer than "
                f"data.max_prompt_length={self.max_prompt_length}, the shortest "
                f"{min(num_tokens)} tokens",
                expected="prompts, image tokens included, of at most that length",
                fix="Raise data.max_prompt_length.",
            )

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
