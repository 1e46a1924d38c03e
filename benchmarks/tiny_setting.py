"""The experiment's model with random weights, and the published way to decode it, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

from grpo_latent.data.embedded import digits
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.models import tiny
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.trajectory import PositionKind

NEVER = -1e4  # added to the logit of EOS


class TinyModel(NamedTuple):
    """The experiment's, whatever its sizes and tokens."""

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    processor: ProcessorMixin
    eos_id: int


def tiny_model(
    logits: dict[str, float], sizes: tiny.TinySizes, latent_tokens: Sequence[str]
) -> TinyModel:
    """The experiment's model with random weights; `logits` are added to those of some tokens."""
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(
        digits.WORDS, sizes, latent_tokens=latent_tokens
    )
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration) and processor is not None
    ids = tokenizer.get_vocab()
    eos_id = ids[str(tokenizer.eos_token)]
    bias = torch.zeros(model.lm_head.out_features)
    for token, logit in logits.items():
        bias[ids[token]] = logit
    bias[eos_id] = NEVER
    model.lm_head.bias = torch.nn.Parameter(bias)
    model.requires_grad_(False)
    return TinyModel(model, tokenizer, processor, eos_id)


@dataclass(frozen=True)
class Setting:
    """One model and the prompts that all contenders answer.

    Attributes:
        batch: the processor's output for all prompts, padded on the left.
    """

    model: Qwen2_5_VLForConditionalGeneration
    processor: ProcessorMixin
    mechanism: SpanMechanism
    eos_id: int
    batch: dict
    requests: list[RolloutRequest]


@torch.no_grad()
def naive_trajectory(
    setting: Setting, request: RolloutRequest, new_tokens: int, generator: torch.Generator
) -> list[PositionKind]:
    """Kinds of one trajectory: `DynamicCache`, the whole prompt and its image for itself."""
    model = setting.model
    mechanism = setting.mechanism
    assert request.images is not None, "each prompt has an image"
    ids = request.prompt_ids[None]
    cache = DynamicCache(config=model.config.get_text_config())
    images = dict(image_grid_thw=request.images.image_grid_thw)
    token_types = (ids == model.config.image_token_id).int()
    position_ids, _ = model.model.get_rope_index(ids, mm_token_type_ids=token_types, **images)
    hidden: Tensor = model.model(
        input_ids=ids,
        position_ids=position_ids,
        pixel_values=request.images.pixel_values,
        past_key_values=cache,
        use_cache=True,
        **images,
    ).last_hidden_state[:, -1]
    next_position = int(position_ids.max()) + 1
    embed = model.get_input_embeddings()
    kinds: list[PositionKind] = []
    steps_left: int | None = None  # of the span, None outside of one
    num_spans = 0
    for position in range(new_tokens):
        if steps_left is None:
            logits = model.lm_head(hidden).float()
            if num_spans == mechanism.max_spans:
                logits[:, mechanism.start_id] = -torch.inf
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            kinds.append(PositionKind.TEXT)
            if int(token) == setting.eos_id:
                break
            if int(token) == mechanism.start_id:
                kinds[-1] = PositionKind.START
                steps_left = mechanism.steps
                num_spans += 1
            vector = embed(token)
        elif steps_left > 0:
            kinds.append(PositionKind.LATENT)
            vector = hidden[:, None]
            steps_left -= 1
        else:
            kinds.append(PositionKind.FORCED)
            vector = embed(torch.tensor([[mechanism.end_id]]))
            steps_left = None
        is_latent = kinds[-1] == PositionKind.LATENT
        hidden = model.model.language_model(
            inputs_embeds=vector,
            position_ids=torch.full((3, 1, 1), next_position + position),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        if (
            is_latent
            and mechanism.exit == "end_token"
            and int(model.lm_head(hidden).argmax()) == mechanism.end_id
        ):
            steps_left = 0
    return kinds
