"""From an example to the positions that SFT trains on.

    response   <lvr> <answer> 7 </answer>        box of image token 5, EOS as the answer is known

    token      <start>  <latent>  <end>   <answer>  7     </answer>  <eos>
    kind       START    LATENT    FORCED  TEXT      TEXT  TEXT       TEXT
    input      e(start) v_5       e(end)  e(…)      …
    label      <start>  -         <end>   <answer>  7     </answer>  <eos>
    target     -        v_5       -       -

With `latent.span_end=sampled` the tokens that close a span are the model's to write, as published:
`<latent_end> <end>`, both END and both scored (with a learned end vector, which stands where
`<latent_end>` would, `<end>` alone).

One latent position per merged visual token of the box (2509.24251 section 3.1). An example without
an answer stops where the answer would begin: it teaches spans and format, never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.protocol import Backbone
from grpo_latent.data.boxes import box_to_prompt_tokens
from grpo_latent.data.examples import LVR_PLACEHOLDER, LvrExample
from grpo_latent.errors import DataError
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.sft.common.images import image_columns
from grpo_latent.sft.common.rows import IGNORED, RowEncoder
from grpo_latent.trajectory import PositionKind, prompt_kinds

_SPELLED_OUT = (  # what is expected, and the fix, of a text with a latent token in it
    f"plain text, with {LVR_PLACEHOLDER} where a span stands",
    f"Write {LVR_PLACEHOLDER}; SFT spells the span out.",
)
END_VECTOR = -1  # in `roi_N`: the learned end vector stands there, not a visual token


@dataclass(frozen=True)
class LVRRow:
    """One tokenised example of T positions, N of them latent.

    Attributes:
        input_ids: int64 [T].
        kinds: int64 [T], `PositionKind`.
        labels: int64 [T], label-aligned (`labels[t]` scores position t given < t), `IGNORED` where
            nothing is scored.
        roi_N: int64 [N], index of each latent's target among the row's merged visual tokens, or
            `END_VECTOR`.
        images: pixels of the row, or None.
        num_visual_tokens: merged visual tokens of the row.
    """

    input_ids: Tensor
    kinds: Tensor
    labels: Tensor
    roi_N: Tensor
    images: ImageInputs | None
    num_visual_tokens: int


@dataclass(frozen=True, kw_only=True)
class LVREncoder(RowEncoder[LvrExample, LVRRow]):
    """Tokenises examples with boxes.

    Attributes:
        backbone: of the model; says which of an image's tokens a box overlaps.
        has_end_vector: whether a span ends with a latent position for the learned end vector.
    """

    mechanism: SpanMechanism
    backbone: Backbone
    has_end_vector: bool = False

    def __call__(self, example: LvrExample) -> LVRRow:
        """The example's positions.

        Raises:
            DataError: unreadable image, a latent or vision token spelled out in the response, or a
                row too long.
        """
        prompt = self.encode_prompt(example)
        num_visual_tokens = 0
        spans: list[list[int]] = []
        # without images there are no boxes: readers refuse a box that lies in none
        if prompt.images is not None:
            num_visual_tokens = int(self.backbone.num_image_tokens(prompt.images).sum())
            spans = [
                box_to_prompt_tokens(box, image_idx, prompt.images, self.backbone)
                for box, image_idx in zip(example.boxes, example.box_images, strict=True)
            ]
        ids, kinds, roi = self._response(example, spans)
        response_ids = torch.tensor(ids)
        response_kinds = torch.tensor(kinds)
        labels = torch.where(response_kinds == PositionKind.LATENT, IGNORED, response_ids)
        input_ids = torch.cat([prompt.ids, response_ids])
        made_of = f"{num_visual_tokens} of them image", f"{len(roi)} latent"
        self.check_length(input_ids.shape[0], example.where, made_of)
        return LVRRow(
            input_ids=input_ids,
            kinds=torch.cat([prompt_kinds(prompt.ids, self.vision_ids), response_kinds]),
            labels=torch.cat([torch.full_like(prompt.ids, IGNORED), labels]),
            roi_N=torch.tensor(roi, dtype=torch.long),
            images=prompt.images,
            num_visual_tokens=num_visual_tokens,
        )

    def _response(
        self, example: LvrExample, spans: list[list[int]]
    ) -> tuple[list[int], list[int], list[int]]:
        """Lays out the response: its ids and kinds, and the visual tokens of its latents."""
        pieces = example.response.split(LVR_PLACEHOLDER)
        if len(pieces) != len(spans) + 1:
            raise DataError(
                "spans do not match the boxes",
                where=example.where,
                got=f"{len(pieces) - 1} {LVR_PLACEHOLDER} in {example.response!r}, "
                f"{len(spans)} boxes",
                expected=f"one {LVR_PLACEHOLDER} per box",
            )
        ids: list[int] = []
        kinds: list[PositionKind] = []
        roi: list[int] = []
        for piece_idx, piece in enumerate(pieces):
            if piece_idx > 0:
                targets = spans[piece_idx - 1] + [END_VECTOR] * self.has_end_vector
                ids += [
                    self.mechanism.start_id,
                    *[self.mechanism.latent_id] * len(targets),
                    *self._closing_ids,
                ]
                kinds += [
                    PositionKind.START,
                    *[PositionKind.LATENT] * len(targets),
                    *[self.mechanism.end_kind] * len(self._closing_ids),
                ]
                roi += targets
            text_ids = self.encode_text(piece, example.where, *_SPELLED_OUT)
            ids += text_ids
            kinds += [PositionKind.TEXT] * len(text_ids)
        if example.has_answer:
            ids.append(self.eos_id)
            kinds.append(PositionKind.TEXT)
        return ids, [int(kind) for kind in kinds], roi

    @property
    def _closing_ids(self) -> list[int]:
        """What ends a span, in order."""
        before_end = sorted(self.mechanism.closing_ids - {self.mechanism.end_id})
        return [*(() if self.has_end_vector else before_end), self.mechanism.end_id]


def collate_rows(rows: Sequence[LVRRow]) -> dict[str, Tensor]:
    """Puts B rows of at most T positions into one right-padded batch.

    N latents and M merged visual tokens in all.

    Returns:
        input_ids, kinds, labels: int64 [B, T]; valid: bool [B, T], False at padding.
        roi: int64 [N], row-major over the latent positions: index among the M visual tokens, or
            `END_VECTOR`.
        num_visual_tokens: int64 [B].
        pixel_values, image_grid_thw: of all rows in order; absent if no row has an image.
    """
    valid = pad_sequence(
        [torch.ones_like(row.input_ids, dtype=torch.bool) for row in rows], batch_first=True
    )
    counts_B = torch.tensor([row.num_visual_tokens for row in rows])
    offsets = (counts_B.cumsum(0) - counts_B).tolist()
    roi = [
        torch.where(row.roi_N >= 0, row.roi_N + offset, row.roi_N)
        for row, offset in zip(rows, offsets, strict=True)
    ]
    batch = {
        "input_ids": pad_sequence([row.input_ids for row in rows], batch_first=True),
        "kinds": pad_sequence(
            [row.kinds for row in rows], batch_first=True, padding_value=int(PositionKind.PROMPT)
        ),
        "labels": pad_sequence(
            [row.labels for row in rows], batch_first=True, padding_value=IGNORED
        ),
        "valid": valid,
        "roi": torch.cat(roi),
        "num_visual_tokens": counts_B,
    }
    return batch | image_columns(ImageInputs.concat([row.images for row in rows]))
