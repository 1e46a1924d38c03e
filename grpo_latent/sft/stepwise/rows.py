"""Rows of SFT with prompt slots (IVT-LR, Coconut).

The first `stage` steps of a rationale become slots, the rest stays text:

    stage 0    [question] step 1. step 2. step 3. Therefore, the answer is B <eos>
    stage 1    [question] slot                    step 2. step 3. Therefore, the answer is B <eos>
    stage 3    [question] slot slot slot          Therefore, the answer is B <eos>

Coconut may also give a step several slots and end with a stage of answers alone
(`sft.stepwise.curriculum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.data.formats.stepwise import StepwiseExample, remaining_text
from grpo_latent.errors import DataError
from grpo_latent.sft.common.images import image_columns
from grpo_latent.sft.common.rows import RowEncoder
from grpo_latent.sft.stepwise.curriculum import CurriculumConfig, Stage


@dataclass(frozen=True)
class StepwiseRow:
    """One tokenised example.

    Attributes:
        prompt_ids: int64 [P].
        response_ids: int64 [R] with EOS, for each stage: what it writes out.
        images: of the prompt, or None.
    """

    prompt_ids: Tensor
    response_ids: tuple[Tensor, ...]
    images: ImageInputs | None


@dataclass(frozen=True, kw_only=True)
class StepwiseEncoder(RowEncoder[StepwiseExample, StepwiseRow]):
    """Tokenises examples for the stages of a curriculum, up to the mechanism's `steps` slots.

    Attributes:
        image_token_id: the image placeholder, None for a text-only model.
    """

    image_token_id: int | None
    curriculum: CurriculumConfig = CurriculumConfig()

    def __call__(self, example: StepwiseExample) -> StepwiseRow:
        """The example's prompt, and what each stage writes out.

        Raises:
            DataError: unreadable image, a latent or vision token spelled out in the text, an image
                with fewer tokens than slots, or a row too long.
        """
        prompt = self.encode_prompt(example)
        self._check_image_tokens(prompt.ids, len(example.images), example.where)
        stages = self.curriculum.stages(self.mechanism.steps)
        responses = tuple(self._response(example, stage) for stage in stages)
        length = prompt.ids.shape[0] + max(response.shape[0] for response in responses)
        length += self.mechanism.steps * (1 + self.mechanism.top_k_image)
        self.check_length(length, example.where, ["slots included"])
        return StepwiseRow(prompt.ids, responses, prompt.images)

    def _check_image_tokens(self, prompt_ids: Tensor, num_images: int, where: str) -> None:
        """Refuses an image with fewer tokens than slots.

        A slot may take fewer than `top_k_image`, what is left; one that can take none is a
        mistake of the data.
        """
        if not (self.mechanism.top_k_image and num_images):
            return
        assert self.image_token_id is not None, "encode_prompt takes no images for a text model"
        num_tokens = int(prompt_ids.eq(self.image_token_id).sum())
        if num_tokens < self.mechanism.steps:
            raise DataError(
                "more slots than image tokens",
                where=where,
                got=f"{self.mechanism.steps} slots, {num_tokens} image tokens",
                expected="at least one image token a slot",
                fix="Raise data.min_image_tokens, lower latent.steps, or drop the row.",
            )

    def _response(self, example: StepwiseExample, stage: Stage) -> Tensor:
        ids = self.encode_text(remaining_text(example, stage.first_step), example.where)
        return torch.tensor([*ids, self.eos_id])


def collate_rows(rows: Sequence[StepwiseRow], stage: int) -> dict[str, Tensor]:
    """Pads rows at one stage to a batch: prompts left, responses right.

    Returns:
        prompt_ids, response_ids: int64 [B, P] and [B, R].
        prompt_valid, response_valid: bool, likewise.
        pixel_values, image_grid_thw: of all rows in order, absent if there are none.
    """
    batch: dict[str, Tensor] = {}
    columns_of = {
        "prompt": [row.prompt_ids for row in rows],
        "response": [row.response_ids[stage] for row in rows],
    }
    for name, ids_of_rows in columns_of.items():
        length = max(row_ids.shape[0] for row_ids in ids_of_rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        valid = torch.zeros(len(rows), length, dtype=torch.bool)
        for row_idx, row_ids in enumerate(ids_of_rows):
            start = length - row_ids.shape[0] if name == "prompt" else 0
            columns = slice(start, start + row_ids.shape[0])
            ids[row_idx, columns] = row_ids
            valid[row_idx, columns] = True
        batch |= {f"{name}_ids": ids, f"{name}_valid": valid}
    return batch | image_columns(ImageInputs.concat([row.images for row in rows]))
