"""Prompts to evaluate: rows of verl's parquet schema, encoded for one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.data.boxes import box_to_prompt_tokens, check_box
from grpo_latent.data.rows import check_prompt, iter_verl_rows
from grpo_latent.errors import DataError
from grpo_latent.eval.benchmarks import BenchmarkItem, check_max_rows, first_items
from grpo_latent.models.adapter import ImageInputs
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.prompts import encode_prompt


@dataclass(frozen=True)
class EvalPrompt:
    """One row. P prompt positions.

    Attributes:
        prompt_ids: int64 [P], image placeholders expanded.
        images: pixels, or None.
        roi: merged visual tokens of the row's boxes, in the order of the boxes, as indices among all visual tokens of the
            prompt; empty without boxes. What an ideal latent number i would be.
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
        """Equal for rows that share a question (MMVP's pairs, HRBench's rotations): statistics count these once."""
        return self.row_id if self.item is None else self.item.group_id


def read_prompts(files: Iterable[str | Path], loaded: LatentModel, max_rows: int | None = None) -> list[EvalPrompt]:
    """The rows of all files in order, at most `max_rows`.

    Raises:
        ConfigError: `max_rows` is no count.
        DataError: unreadable file or malformed row, by file, row and field.
    """
    check_max_rows(max_rows)
    rows = (row for path in files for row in iter_verl_rows(path))
    prompts = [encode_row(row, where, loaded, str(i)) for i, (row, where) in enumerate(islice(rows, max_rows))]
    if not prompts:
        raise DataError(
            "no rows to evaluate", where="data.val_files", got=str(list(files)), expected="at least one row"
        )
    return prompts


def benchmark_prompts(
    items: Sequence[BenchmarkItem], loaded: LatentModel, max_rows: int | None = None
) -> list[EvalPrompt]:
    """The questions of a benchmark, at most `max_rows`.

    Raises:
        ConfigError: `max_rows` cuts rows of one question apart.
        DataError: an image cannot be read.
    """
    prompts = []
    for item in first_items(items, max_rows):
        where = f"{item.benchmark} {item.item_id}"
        images = [image.open() for image in item.images]
        prompt = encode_prompt(loaded.tokenizer, loaded.processor, item.messages, images, where)
        prompts.append(
            EvalPrompt(prompt.ids, prompt.images, item.benchmark, item.answer, where, item.item_id, item=item)
        )
    return prompts


def encode_row(row: dict, where: str, loaded: LatentModel, row_id: str) -> EvalPrompt:
    """Raises `DataError` if the row is malformed."""
    messages, refs = check_prompt(row, where)
    prompt = encode_prompt(loaded.tokenizer, loaded.processor, messages, [ref.open() for ref in refs], where)
    extra_info = row.get("extra_info") or {}
    return EvalPrompt(
        prompt_ids=prompt.ids,
        images=prompt.images,
        data_source=row["data_source"],
        ground_truth=row["reward_model"]["ground_truth"],
        where=where,
        row_id=row_id,
        roi=_roi(extra_info, prompt.images, loaded, where),
        extra_info=extra_info,
    )


def _roi(extra_info: dict, images: ImageInputs | None, loaded: LatentModel, where: str) -> tuple[int, ...]:
    boxes = extra_info.get("bboxes") or []
    owners = extra_info.get("bbox_images") or [0] * len(boxes)
    if not boxes:
        return ()
    grids = torch.zeros(0, 3, dtype=torch.long) if images is None else images.image_grid_thw
    if len(owners) != len(boxes) or not all(0 <= owner < len(grids) for owner in owners):
        raise DataError(
            "boxes do not match the images",
            where=f"{where}: extra_info.bbox_images",
            got=f"{owners} for {len(boxes)} boxes, {len(grids)} images",
            expected="the index of an image for each box",
        )
    backbone, tokens = backbone_of(loaded.model), []
    for box, owner in zip(boxes, owners, strict=True):
        check_box(box, f"{where}: extra_info.bboxes")
        tokens += box_to_prompt_tokens(box, owner, images, backbone)
    return tuple(tokens)
