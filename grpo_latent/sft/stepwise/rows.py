"""SFT with prompt slots: the first `stage` steps of a rationale become slots, the rest stays text (IVT-LR, Coconut).

    stage 0    [question] step 1. step 2. step 3. Therefore, the answer is B <eos>
    stage 1    [question] slot                    step 2. step 3. Therefore, the answer is B <eos>
    stage 3    [question] slot slot slot          Therefore, the answer is B <eos>

Slots run as in a rollout (`models.slots`): what is trained is what is rolled out. CE on the text only; through the slots'
h the gradient is cut (IVT-LR, 2510.12603) or flows (Coconut, 2412.06769), which may also give a step several slots and
end with a stage of answers alone (`sft.curriculum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.data.formats.stepwise import StepwiseExample, remaining_text
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.positions import count_on, with_components
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.replay import caching_layers
from grpo_latent.models.slots import prefill_with_slots
from grpo_latent.models.visibility import attention_bias
from grpo_latent.sft.common.losses import cross_entropy_sum
from grpo_latent.sft.stepwise.curriculum import CurriculumConfig, Stage
from grpo_latent.trajectory import PositionKind


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


@dataclass(frozen=True)
class StepwiseEncoder:
    """Tokenises examples for one model, for the stages of a curriculum up to `config.steps` slots.

    Attributes:
        eos_id: ends every response.
        vision_ids: image placeholder and delimiter ids.
        image_token_id: the placeholder, None for a text-only model.
        max_length: longest row allowed, slots included; None for any.
    """

    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    config: LatentConfig
    eos_id: int
    vision_ids: frozenset[int]
    image_token_id: int | None
    max_length: int | None = None
    curriculum: CurriculumConfig = CurriculumConfig()

    def __call__(self, example: StepwiseExample) -> StepwiseRow:
        """The example's prompt, and what each stage writes out.

        Raises:
            DataError: unreadable image, a latent or vision token spelled out in the text, an image with fewer tokens than
                slots, or a row too long.
        """
        pictures = [image.open() for image in example.images]
        prompt = encode_prompt(self.tokenizer, self.processor, example.messages, pictures, example.where)
        self._check_image_tokens(prompt.ids, len(pictures), example.where)
        stages = self.curriculum.stages(self.config.steps)
        responses = tuple(self._response(example, stage) for stage in stages)
        length = prompt.ids.shape[0] + max(response.shape[0] for response in responses)
        length += self.config.steps * (1 + self.config.top_k_image)
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                "row too long",
                where=example.where,
                got=f"{length} positions, slots included",
                expected=f"at most {self.max_length}",
                fix="Raise data.max_length, lower data.max_image_tokens, or drop the row.",
            )
        return StepwiseRow(prompt.ids, responses, prompt.images)

    def _check_image_tokens(self, prompt_ids: Tensor, num_images: int, where: str) -> None:
        """A slot may take fewer than `top_k_image`, what is left; a slot that can take none is a mistake of the data."""
        if not (self.config.top_k_image and num_images):
            return
        num_tokens = int((prompt_ids == self.image_token_id).sum())
        if num_tokens < self.config.steps:
            raise DataError(
                "more slots than image tokens",
                where=where,
                got=f"{self.config.steps} slots, {num_tokens} image tokens",
                expected="at least one image token a slot",
                fix="Raise data.min_image_tokens, lower latent.steps, or drop the row.",
            )

    def _response(self, example: StepwiseExample, stage: Stage) -> Tensor:
        ids = self.tokenizer(remaining_text(example, stage.first_step), add_special_tokens=False).input_ids
        latent_ids = {self.config.start_id, self.config.latent_id, self.config.end_id}
        reserved = sorted(set(ids) & (self.vision_ids | latent_ids))
        if reserved:
            raise DataError(
                "a reserved token in the text of the response",
                where=example.where,
                got=self.tokenizer.convert_ids_to_tokens(reserved),
                expected="plain text",
            )
        return torch.tensor([*ids, self.eos_id])


def collate_stepwise(rows: Sequence[StepwiseRow], stage: int) -> dict[str, Tensor]:
    """Rows at one stage: prompts padded left, responses right.

    Returns:
        prompt_ids, prompt_valid: [B, P]; response_ids, response_valid: [B, R]; pixel_values, image_grid_thw of all rows
        in order, absent if there are none.
    """
    batch = {}
    columns_of = {"prompt": [row.prompt_ids for row in rows], "response": [row.response_ids[stage] for row in rows]}
    for name, parts in columns_of.items():
        length = max(part.shape[0] for part in parts)
        ids, valid = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
        for row, part in enumerate(parts):
            columns = slice(length - part.shape[0], length) if name == "prompt" else slice(0, part.shape[0])
            ids[row, columns], valid[row, columns] = part, True
        batch |= {f"{name}_ids": ids, f"{name}_valid": valid}
    images = ImageInputs.concat([row.images for row in rows])
    if images is not None:
        batch |= {"pixel_values": images.pixel_values, "image_grid_thw": images.image_grid_thw}
    return batch


def slot_sums(
    adapter: ModelAdapter, batch: dict[str, Tensor], config: LatentConfig, num_slots: int, cut: bool
) -> dict[str, Tensor]:
    """Sum of the cross-entropy (`ce`) of the responses after `num_slots` slots; float32 scalar.

    Args:
        adapter: with the config's positions.
        cut: whether the slots' h are constants.

    Raises:
        ConfigError: the adapter numbers positions otherwise than the config says.
    """
    if adapter.positions != config.positions:
        raise ConfigError(
            "another numbering of positions", where="adapter", got=adapter.positions, expected=config.positions
        )
    images = ImageInputs(batch["pixel_values"], batch["image_grid_thw"]) if "pixel_values" in batch else None
    num_slots_B = torch.full((batch["prompt_ids"].shape[0],), num_slots, device=adapter.device)
    prefill = prefill_with_slots(
        adapter, batch["prompt_ids"], batch["prompt_valid"], images, num_slots_B, config.top_k_image, cut
    )
    response_ids_BR, valid_BR = batch["response_ids"], batch["response_valid"]
    # the last response position scores nothing
    fed_ids_BR, num_before = response_ids_BR[:, :-1], prefill.kinds_BS.shape[1]
    kinds = torch.cat([prefill.kinds_BS, torch.full_like(fed_ids_BR, int(PositionKind.TEXT))], 1)
    valid = torch.cat([prefill.valid_BS, valid_BR[:, :-1]], 1)
    positions_BR = count_on(prefill.next_position_B, valid_BR[:, :-1])
    with caching_layers(adapter.model):
        hidden_BRH = adapter.decoder(
            inputs_embeds=adapter.embed(fed_ids_BR),
            attention_mask=attention_bias(kinds, valid, "full", adapter.dtype, num_before),
            position_ids=with_components(positions_BR, adapter.has_mrope),
            past_key_values=prefill.cache,
            use_cache=True,
        ).last_hidden_state
    hidden_BRH = torch.cat([prefill.hidden_BH[:, None], hidden_BRH], 1)
    return {"ce": cross_entropy_sum(adapter.logits(hidden_BRH[valid_BR]), response_ids_BR[valid_BR])}
