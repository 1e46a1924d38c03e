"""Prompts to evaluate: rows of verl's parquet schema, encoded for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of
from grpo_latent.data.boxes import box_to_prompt_tokens, check_box
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import check_prompt
from grpo_latent.errors import DataError
from grpo_latent.eval.benchmarks import BenchmarkItem, check_max_rows, first_items
from grpo_latent.eval.pixels import PixelStore
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.prompts import Prompt, encode_prompt


@dataclass(frozen=True)
class EvalPrompt:
    """One row. P prompt positions.

    Attributes:
        prompt_ids: int64 [P], image placeholders expanded.
        images: pixels, perhaps made when they are asked for (`eval.pixels`), or None.
        roi: merged visual tokens of the row's boxes, in the order of the boxes, as indices among
            all visual tokens of the prompt; empty without boxes. What an ideal latent number i
            would be.
        where: file and row, for messages.
        row_id: names the row in its data, wherever that lies: what seeds are made of.
        item: of a benchmark, which then grades; None for rows that a reward function scores.
    """

    prompt_ids: Tensor
    images: ImageInputs | None
    data_source: str
    ground_truth: object
    where: str
    row_id: str
    roi: tuple[int, ...] = ()
    extra_info: dict = field(default_factory=dict)
    item: BenchmarkItem | None = None

    @property
    def cluster(self) -> str:
        """Equal for rows that share a question, which statistics count once.

        Such are MMVP's pairs and HRBench's rotations.
        """
        return self.row_id if self.item is None else self.item.group_id


def read_prompts(
    files: Iterable[str | Path],
    loaded: LatentModel,
    max_rows: int | None = None,
    store: PixelStore | None = None,
    seen: Callable[[EvalPrompt], None] = lambda prompt: None,
    keys: RowKeys | None = None,
) -> list[EvalPrompt]:
    """Reads the rows of all files in order, at most `max_rows`.

    Args:
        store: of their pixels; None makes one.
        seen: called with each prompt while its pixels are at hand.
        keys: names of the columns of prompts and images.

    Raises:
        ConfigError: `max_rows` is no count.
        DataError: unreadable file or malformed row, by file, row and field.
    """
    check_max_rows(max_rows)
    store = store or PixelStore()
    prompts: list[EvalPrompt] = []
    rows = islice((row for path in files for row in iter_verl_rows(path, keys)), max_rows)
    for index, (row, where) in enumerate(rows):
        prompts.append(encode_row(row, where, loaded, str(index), store))
        seen(prompts[-1])
    if not prompts:
        raise DataError(
            "no rows to evaluate",
            where="data.val_files",
            got=str(list(files)),
            expected="at least one row",
        )
    return prompts


def benchmark_prompts(
    items: Sequence[BenchmarkItem],
    loaded: LatentModel,
    max_rows: int | None = None,
    store: PixelStore | None = None,
    seen: Callable[[EvalPrompt], None] = lambda prompt: None,
) -> list[EvalPrompt]:
    """Encodes the questions of a benchmark, at most `max_rows`; arguments as `read_prompts`.

    Raises:
        ConfigError: `max_rows` cuts rows of one question apart.
        DataError: an image cannot be read.
    """
    store = store or PixelStore()
    prompts: list[EvalPrompt] = []
    for item in first_items(items, max_rows):
        where = f"{item.benchmark} {item.item_id}"
        ids, images = _encode(loaded, item.messages, item.images, where, store)
        prompts.append(
            EvalPrompt(ids, images, item.benchmark, item.answer, where, item.item_id, item=item)
        )
        seen(prompts[-1])
    return prompts


def encode_row(
    row: dict, where: str, loaded: LatentModel, row_id: str, store: PixelStore | None = None
) -> EvalPrompt:
    """Encodes a row of verl's schema as a prompt.

    Args:
        store: of its pixels; None leaves them in the prompt.

    Raises:
        DataError: the row is malformed.
    """
    messages, refs = check_prompt(row, where)
    ids, images = _encode(loaded, messages, refs, where, store)
    extra_info = row.get("extra_info") or {}
    return EvalPrompt(
        prompt_ids=ids,
        images=images,
        data_source=row["data_source"],
        ground_truth=row["reward_model"]["ground_truth"],
        where=where,
        row_id=row_id,
        roi=_roi(extra_info, images, loaded, where),
        extra_info=extra_info,
    )


def _encode(
    loaded: LatentModel,
    messages: Sequence[dict],
    refs: Sequence[ImageRef],
    where: str,
    store: PixelStore | None,
) -> tuple[Tensor, ImageInputs | None]:
    """Makes prompt ids int64 [P] and images, whose pixels are the store's where there is one."""

    def encode() -> Prompt:
        return encode_prompt(
            loaded.tokenizer, loaded.processor, messages, [ref.open() for ref in refs], where
        )

    prompt = encode()
    if store is None or prompt.images is None:
        return prompt.ids, prompt.images

    def pixels_again() -> Tensor:
        images = encode().images
        assert images is not None, "the same row has the same images"
        return images.pixel_values

    return prompt.ids, store.add(prompt.images, pixels_again)


def _roi(
    extra_info: dict, images: ImageInputs | None, loaded: LatentModel, where: str
) -> tuple[int, ...]:
    boxes = extra_info.get("bboxes") or []
    # rows of one image need not say whose boxes they are
    owners = extra_info.get("bbox_images") or [0] * len(boxes)
    if not boxes:
        return ()
    num_images = 0 if images is None else len(images.image_grid_thw)
    are_indices = all(type(owner) is int and 0 <= owner < num_images for owner in owners)
    if images is None or len(owners) != len(boxes) or not are_indices:
        raise DataError(
            "boxes do not match the images",
            where=f"{where}: extra_info.bbox_images",
            got=f"{owners} for {len(boxes)} boxes, {num_images} images",
            expected="the index of an image for each box",
        )
    backbone = backbone_of(loaded.model)
    tokens: list[int] = []
    for box, owner in zip(boxes, owners, strict=True):
        check_box(box, f"{where}: extra_info.bboxes")
        tokens += box_to_prompt_tokens(box, owner, images, backbone)
    return tuple(tokens)
