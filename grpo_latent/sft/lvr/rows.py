"""From an example to the positions that SFT trains on.

    response   <lvr> <answer> 7 </answer>        box of token 5 of the image, EOS because the answer is known

    token      <start>  <latent>  <end>   <answer>  7     </answer>  <eos>
    kind       START    LATENT    FORCED  TEXT      TEXT  TEXT       TEXT
    input      e(start) v_5       e(end)  e(…)      …
    label      <start>  -         <end>   <answer>  7     </answer>  <eos>
    target     -        v_5       -       -

One latent position per merged visual token of the box (2509.24251 section 3.1). An example without an answer stops
where the answer would begin: it teaches spans and format, never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.data.boxes import box_to_visual_tokens
from grpo_latent.data.examples import LVR_PLACEHOLDER, LvrExample
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.adapter import ImageInputs
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.trajectory import PositionKind, prompt_kinds

IGNORED = -100
END_VECTOR = -1  # in `roi_N`: the learned end vector stands there, not a visual token


@dataclass(frozen=True)
class SFTRow:
    """One tokenised example of T positions, N of them latent.

    Attributes:
        input_ids: int64 [T].
        kinds: int64 [T], `PositionKind`.
        labels: int64 [T], label-aligned (`labels[t]` scores position t given < t), `IGNORED` where nothing is scored.
        roi_N: int64 [N], index of each latent's target among the row's merged visual tokens, or `END_VECTOR`.
        images: pixels of the row, or None.
        num_visual_tokens: merged visual tokens of the row.
    """

    input_ids: Tensor
    kinds: Tensor
    labels: Tensor
    roi_N: Tensor
    images: ImageInputs | None
    num_visual_tokens: int


@dataclass(frozen=True)
class RowEncoder:
    """Tokenises examples for one model.

    Attributes:
        eos_id: ends a response whose answer is known.
        vision_ids: image placeholder and delimiter ids.
        merge_size: patches a side of one merged visual token.
        has_end_vector: whether a span ends with a latent position for the learned end vector.
        max_length: longest row allowed, None for any.
    """

    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin
    config: LatentConfig
    eos_id: int
    vision_ids: frozenset[int]
    merge_size: int
    has_end_vector: bool = False
    max_length: int | None = None

    def __call__(self, example: LvrExample) -> SFTRow:
        """The example's positions.

        Raises:
            DataError: unreadable image, a latent or vision token spelled out in the response, or a row too long.
        """
        pictures = [image.open() for image in example.images]
        prompt = encode_prompt(self.tokenizer, self.processor, example.messages, pictures, example.where)
        grids = [] if prompt.images is None else prompt.images.image_grid_thw.tolist()
        counts = [time * height * width // self.merge_size**2 for time, height, width in grids]
        spans = [
            [sum(counts[:image_idx]) + token for token in box_to_visual_tokens(box, grids[image_idx], self.merge_size)]
            for box, image_idx in zip(example.boxes, example.box_images, strict=True)
        ]
        ids, kinds, roi = self._response(example, spans)
        response_ids, response_kinds = torch.tensor(ids), torch.tensor(kinds)
        labels = torch.where(response_kinds == PositionKind.LATENT, IGNORED, response_ids)
        input_ids = torch.cat([prompt.ids, response_ids])
        if self.max_length is not None and input_ids.shape[0] > self.max_length:
            raise DataError(
                "row too long",
                where=example.where,
                got=f"{input_ids.shape[0]} positions, {sum(counts)} of them image, {len(roi)} latent",
                expected=f"at most {self.max_length}",
                fix="Raise data.max_length, lower data.max_image_tokens, or drop the row.",
            )
        return SFTRow(
            input_ids=input_ids,
            kinds=torch.cat([prompt_kinds(prompt.ids, self.vision_ids), response_kinds]),
            labels=torch.cat([torch.full_like(prompt.ids, IGNORED), labels]),
            roi_N=torch.tensor(roi, dtype=torch.long),
            images=prompt.images,
            num_visual_tokens=sum(counts),
        )

    def _response(self, example: LvrExample, spans: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
        """Ids and kinds of the response, and the visual tokens of its latents."""
        pieces = example.response.split(LVR_PLACEHOLDER)
        if len(pieces) != len(spans) + 1:
            raise DataError(
                "spans do not match the boxes",
                where=example.where,
                got=f"{len(pieces) - 1} {LVR_PLACEHOLDER} in {example.response!r}, {len(spans)} boxes",
                expected=f"one {LVR_PLACEHOLDER} per box",
            )
        ids, kinds, roi = [], [], []
        for piece_idx, piece in enumerate(pieces):
            if piece_idx > 0:
                targets = spans[piece_idx - 1] + [END_VECTOR] * self.has_end_vector
                ids += [self.config.start_id, *[self.config.latent_id] * len(targets), self.config.end_id]
                kinds += [PositionKind.START, *[PositionKind.LATENT] * len(targets), PositionKind.FORCED]
                roi += targets
            text_ids = self.tokenizer(piece, add_special_tokens=False).input_ids
            self._check_text(text_ids, example)
            ids += text_ids
            kinds += [PositionKind.TEXT] * len(text_ids)
        if example.has_answer:
            ids.append(self.eos_id)
            kinds.append(PositionKind.TEXT)
        return ids, [int(kind) for kind in kinds], roi

    def _check_text(self, text_ids: list[int], example: LvrExample) -> None:
        latent_ids = {self.config.start_id, self.config.latent_id, self.config.end_id, self.config.latent_end_id}
        reserved = sorted(set(text_ids) & (self.vision_ids | latent_ids))
        if reserved:
            raise DataError(
                "a reserved token in the text of the response",
                where=example.where,
                got=self.tokenizer.convert_ids_to_tokens(reserved),
                expected=f"plain text, with {LVR_PLACEHOLDER} where a span stands",
                fix=f"Write {LVR_PLACEHOLDER}; SFT spells the span out.",
            )


class SFTDataset(torch.utils.data.Dataset):
    """Tokenises rows when they are asked for, and keeps them up to `cache_bytes` of pixels.

    Args:
        cache_bytes: 0 keeps nothing; a small data set that is read many times saves the time of decoding.
    """

    def __init__(self, examples: Sequence[LvrExample], encoder: RowEncoder, cache_bytes: int = 0):
        if len(examples) == 0:
            raise DataError("no examples", where="data.train_files", got="0 rows", expected="at least one")
        self.examples, self.encoder = examples, encoder
        self._cache: dict[int, SFTRow] = {}
        self._bytes_left = cache_bytes

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SFTRow:
        row = self._cache.get(index)
        if row is None:
            row = self.encoder(self.examples[index])
            num_bytes = 0 if row.images is None else row.images.pixel_values.nbytes
            if num_bytes <= self._bytes_left:
                self._bytes_left -= num_bytes
                self._cache[index] = row
        return row

    @property
    def has_answer(self) -> list[bool]:
        return [example.has_answer for example in self.examples]


def set_image_tokens(processor: ProcessorMixin, minimum: int | None, maximum: int | None) -> None:
    """Bounds the merged visual tokens of an image; the processor is saved with the model, so RL sees the same images."""
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
