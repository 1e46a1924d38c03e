"""From an ILVR record to the positions that its SFT trains on.

    segments   "look"  helper image  "it is 7"            K = latent.steps = 3

    token      look  <start>  <latent>  <latent>  <latent>  <end>   it is 7  <eos>
    kind       TEXT  START    LATENT    LATENT    LATENT    FORCED  TEXT     TEXT
    label      look  <start>  -         -         -         <end>   it is 7  <eos>

Every span has K latent positions. In stage 1 the teacher may choose fewer targets than K for a
span: the positions left over are then fed the placeholder's own embedding, without a loss
(`with_targets` makes them FORCED). A record without its answer has no EOS, and no label on a token
that follows an unknown text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.data.formats.ilvr_jsonl import InterleavedExample
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.models.prompts import assistant_header
from grpo_latent.sft.common.images import batch_images, image_columns
from grpo_latent.sft.common.rows import IGNORED, RowEncoder
from grpo_latent.trajectory import PositionKind, prompt_kinds

_HELPER = "helper_"  # before the names of helper images in a batch


@dataclass(frozen=True)
class ILVRRow:
    """One tokenised example of T positions.

    Attributes:
        input_ids, kinds, labels: int64 [T]; labels are label-aligned, `IGNORED` where nothing is
            scored.
        images: of the question, or None.
        helper_images: one per span, in order, or None.
        header_length: last prompt positions that open the assistant's turn; they ask nothing.
    """

    input_ids: Tensor
    kinds: Tensor
    labels: Tensor
    images: ImageInputs | None
    helper_images: ImageInputs | None
    header_length: int = 0


@dataclass(frozen=True, kw_only=True)
class ILVREncoder(RowEncoder[InterleavedExample, ILVRRow]):
    """Tokenises ILVR examples.

    Attributes:
        reads_helpers: whether rows carry their helper images, which stage 1 alone looks at.
    """

    mechanism: SpanMechanism
    reads_helpers: bool = True

    def __call__(self, example: InterleavedExample) -> ILVRRow:
        """The example's positions.

        Raises:
            DataError: unreadable image, a latent or vision token spelled out in a text, or a row
                too long.
        """
        prompt = self.encode_prompt(example)
        ids, kinds, labels = self._response(example)
        input_ids = torch.cat([prompt.ids, ids])
        self.check_length(input_ids.shape[0], example.where)
        return ILVRRow(
            input_ids=input_ids,
            kinds=torch.cat([prompt_kinds(prompt.ids, self.vision_ids), kinds]),
            labels=torch.cat([torch.full_like(prompt.ids, IGNORED), labels]),
            images=prompt.images,
            helper_images=self._helper_images(example) if self.reads_helpers else None,
            header_length=assistant_header(self.tokenizer, self.processor, prompt.ids),
        )

    def _response(self, example: InterleavedExample) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, kinds and labels of the response."""
        mechanism = self.mechanism
        tokens: list[int] = []
        token_kinds: list[PositionKind] = []
        after_unknown: list[int] = []  # indices whose predecessor is a text that nobody knows
        for segment in example.segments:
            if segment.is_unknown:
                after_unknown.append(len(tokens))
                continue
            if segment.text is None:
                tokens += [
                    mechanism.start_id,
                    *[mechanism.latent_id] * mechanism.steps,
                    mechanism.end_id,
                ]
                token_kinds += [
                    PositionKind.START,
                    *[PositionKind.LATENT] * mechanism.steps,
                    mechanism.end_kind,
                ]
                continue
            fix = 'Make it an item of type "latent", or take the token out.'
            text_ids = self.encode_text(segment.text, example.where, fix=fix)
            tokens += text_ids
            token_kinds += [PositionKind.TEXT] * len(text_ids)
        if example.has_answer:
            tokens.append(self.eos_id)
            token_kinds.append(PositionKind.TEXT)
        ids = torch.tensor(tokens)
        kinds = torch.tensor([int(kind) for kind in token_kinds])
        labels = torch.where(kinds == PositionKind.LATENT, IGNORED, ids)
        # the text that is missing before them would come first
        labels[[index for index in after_unknown if index < len(labels)]] = IGNORED
        return ids, kinds, labels

    def _helper_images(self, example: InterleavedExample) -> ImageInputs | None:
        pictures = [
            segment.helper_image.open()
            for segment in example.segments
            if segment.helper_image is not None
        ]
        if not pictures:
            return None
        assert self.processor is not None, "loading for this method refuses a text-only model"
        batch = self.processor.image_processor(images=pictures, return_tensors="pt")
        return backbone_of_processor(self.processor).image_inputs(batch, self.processor)


def collate_rows(rows: Sequence[ILVRRow]) -> dict[str, Tensor]:
    """Pads rows to one batch: prompts left and responses right.

    All responses begin in one column so, which self-fed latents need.

    Returns:
        input_ids, kinds, labels: int64 [B, T]; valid: bool [B, T].
        header_lengths: int64 [B].
        pixel_values, image_grid_thw: of the questions' images in order; absent if there are none.
        helper_pixel_values, helper_image_grid_thw: of the spans' helper images in order; absent if
            there are none.
    """
    prompt_lengths = [int((row.kinds <= PositionKind.VISION).sum()) for row in rows]
    starts = [max(prompt_lengths) - length for length in prompt_lengths]
    shape = (
        len(rows),
        max(start + row.input_ids.shape[0] for start, row in zip(starts, rows, strict=True)),
    )
    fills = {"input_ids": 0, "kinds": int(PositionKind.PROMPT), "labels": IGNORED}
    batch = {name: torch.full(shape, fill, dtype=torch.long) for name, fill in fills.items()}
    batch["valid"] = torch.zeros(shape, dtype=torch.bool)
    for row_idx, (start, row) in enumerate(zip(starts, rows, strict=True)):
        columns = slice(start, start + row.input_ids.shape[0])
        for name in fills:
            batch[name][row_idx, columns] = getattr(row, name)
        batch["valid"][row_idx, columns] = True
    batch["header_lengths"] = torch.tensor([row.header_length for row in rows])
    batch |= image_columns(ImageInputs.concat([row.images for row in rows]))
    return batch | image_columns(ImageInputs.concat([row.helper_images for row in rows]), _HELPER)


def helper_images(batch: dict[str, Tensor]) -> ImageInputs | None:
    """The spans' helper images of a batch, in order."""
    return batch_images(batch, _HELPER)


def span_numbers(kinds_BT: Tensor) -> Tensor:
    """Numbers the batch's spans, row-major: int64 [B, T] at latent positions, -1 elsewhere."""
    is_latent_BT = kinds_BT == PositionKind.LATENT
    opens_BT = is_latent_BT & ~torch.nn.functional.pad(is_latent_BT[:, :-1], (1, 0))
    numbers_BT = (opens_BT.flatten().cumsum(0) - 1).view_as(kinds_BT)
    return numbers_BT.masked_fill(~is_latent_BT, -1)


def with_targets(
    batch: dict[str, Tensor], targets: Sequence[Tensor], hidden_size: int
) -> dict[str, Tensor]:
    """Adds the teacher's choice to the batch: `targets` [N, H] in order of position.

    Latent positions of a span beyond its targets become FORCED.

    Args:
        targets: [K*, H] of each span, in row-major order; none in a batch without spans.
        hidden_size: H.

    Raises:
        LatentMismatchError: not one per span, or more targets than a span has positions.
    """
    numbers_BT = span_numbers(batch["kinds"])
    num_spans = int(numbers_BT.max()) + 1
    sizes_S = torch.bincount(numbers_BT[numbers_BT >= 0], minlength=num_spans)
    counts_S = torch.tensor(
        [len(rows) for rows in targets], device=sizes_S.device, dtype=torch.long
    )
    if (
        len(targets) != num_spans
        or bool((counts_S > sizes_S).any())
        or bool((counts_S == 0).any())
    ):
        raise LatentMismatchError(
            "the teacher's targets do not fit the spans",
            where="with_targets",
            got=[len(rows) for rows in targets],
            expected=f"between 1 and {sizes_S.tolist()} targets",
        )
    if num_spans == 0:
        return batch | {"targets": torch.zeros(0, hidden_size, device=batch["kinds"].device)}
    kinds_BT = batch["kinds"].clone()
    number_N = numbers_BT[numbers_BT >= 0]
    starts_S = sizes_S.cumsum(0) - sizes_S
    place_N = torch.arange(number_N.shape[0], device=number_N.device) - starts_S[number_N]
    kinds_BT[numbers_BT >= 0] = torch.where(
        place_N < counts_S[number_N], int(PositionKind.LATENT), int(PositionKind.FORCED)
    )
    return batch | {"kinds": kinds_BT, "targets": torch.cat(list(targets))}
