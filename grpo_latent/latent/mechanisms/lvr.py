"""LVR (2509.24251): spans of h, of the checkpoint's length or until a learned end vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms.fed_back import HEAD_ATTRIBUTE, check_switch
from grpo_latent.latent.mechanisms.protocol import CHECKPOINT_ONLY, Mechanism, Refusal
from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.spans import (
    END_TOKEN,
    LATENT_END,
    SAMPLED_END,
    STEPS,
    SpanMechanism,
    SpanRows,
    span_refusals,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

END_VECTOR_ATTRIBUTE = "lvr_latent_end_emb"
# fields of the official checkpoints' config.json
_OFFICIAL_IDS = {
    "lvr_start_id": "start",
    "lvr_id": "latent",
    "lvr_end_id": "end",
    "lvr_latent_end_id": "latent_end",
}
_OFFICIAL_HEADS = {"simple": "mlp", "glu": "glu"}


@register
@dataclass(frozen=True)
class LVR(SpanMechanism):
    """Spans end after `steps`, near a learned end vector, or at the end token.

    Attributes:
        latent_end_token, latent_end_id: token that stands for the learned end vector of exit
            `latent_end`; with a sampled end the one that is written before `end`. None without
            either.
        end_vector: whether there is a learned end vector; None: wherever there is that token.
            Published models have the token in their data and seldom the vector.
        latent_end_threshold: mean squared distance within which a fed vector is the end vector.
    """

    latent_end_token: str | None = None
    latent_end_id: int | None = None
    latent_end_threshold: float = 0.02
    end_vector: bool | None = field(default=None, metadata=CHECKPOINT_ONLY)

    name: ClassVar[str] = "lvr"
    published_tokens: ClassVar[Mapping[str, str]] = {
        "start": "<|lvr_start|>",
        "latent": "<|lvr|>",
        "latent_end": "<|lvr_latent_end|>",
        "end": "<|lvr_end|>",
    }
    parameter_prefixes: ClassVar[tuple[str, ...]] = (f"{HEAD_ATTRIBUTE}.", END_VECTOR_ATTRIBUTE)
    exits: ClassVar[tuple[str, ...]] = (STEPS, LATENT_END, END_TOKEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = self.latent_end_threshold
        if (
            isinstance(threshold, bool)
            or not isinstance(threshold, (int, float))
            or not threshold > 0
        ):
            raise ConfigError(
                "not a distance",
                where="latent.latent_end_threshold",
                got=threshold,
                expected="> 0",
            )
        if self.end_vector is not None:
            check_switch("end_vector", self.end_vector)
        if self.exit == LATENT_END and not self.has_end_vector:
            raise ConfigError(
                "exit by distance needs the learned end vector",
                where="latent.exit",
                got=f"latent_end, latent_end_id {self.latent_end_id}, "
                f"end_vector {self.end_vector}",
                expected="a checkpoint with the vector",
                fix="Train SFT with loss.end=latent_end, or set latent.exit=steps.",
            )

    @property
    def has_end_vector(self) -> bool:
        """Whether the model has the learned end vector."""
        if self.end_vector is None:
            return self.latent_end_id is not None
        return self.end_vector

    @property
    def closing_ids(self) -> frozenset[int]:
        closing_ids = super().closing_ids
        if self.span_end == SAMPLED_END and self.latent_end_id is not None:
            closing_ids |= {self.latent_end_id}
        return closing_ids

    @property
    def reads_latents(self) -> bool:
        return self.exit == LATENT_END

    def new_parameters(
        self, text_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Module | nn.Parameter]:
        parameters = super().new_parameters(text_config, dtype, device)
        if self.has_end_vector:
            end_vector_H = torch.empty(text_config.hidden_size, device=device, dtype=dtype)
            nn.init.normal_(end_vector_H, std=text_config.initializer_range)
            parameters[END_VECTOR_ATTRIBUTE] = nn.Parameter(end_vector_H)
        return parameters

    def check_model(self, model: nn.Module) -> None:
        if self.exit == LATENT_END and not hasattr(model, END_VECTOR_ATTRIBUTE):
            raise CheckpointError(
                "exit latent_end without an end vector",
                where="model",
                expected=END_VECTOR_ATTRIBUTE,
            )

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> SpanRows:
        if self.exit != LATENT_END:
            return super().begin(model, steps_N, max_spans_N)
        return LVRRows(self, steps_N, max_spans_N, end_vector(model))

    def refusals(self, engine: str) -> list[Refusal]:
        return span_refusals(self, engine)

    @classmethod
    def official_layout(
        cls, config_json: dict, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> Mechanism | None:
        """Reads the `lvr_*` fields of config.json; tokens are found by their ids.

        The published SFT data end every span by `<|lvr_latent_end|><|lvr_end|>`, whatever
        `latent_end_token` says, and the published decoding leaves both to the sampler.
        """
        if "lvr_start_id" not in config_json:
            return None
        missing = [
            name for name in ("lvr_id", "lvr_end_id") if not isinstance(config_json.get(name), int)
        ]
        if missing:
            raise CheckpointError(
                "not an LVR checkpoint", where=where, got=f"no {missing}", expected="token ids"
            )
        ids = {
            role: config_json[name]
            for name, role in _OFFICIAL_IDS.items()
            if isinstance(config_json.get(name), int)
        }
        head = "none"
        if config_json.get("lvr_head"):
            head_type = config_json.get("lvr_head_type", "simple")
            if head_type not in _OFFICIAL_HEADS:
                raise CheckpointError(
                    "unknown head type",
                    where=f"{where}: lvr_head_type",
                    got=head_type,
                    expected="simple or glu",
                )
            head = _OFFICIAL_HEADS[head_type]
        settings: dict[str, Any] = {
            "head": head,
            "span_end": SAMPLED_END,
            "end_vector": bool(config_json.get("latent_end_token")),
        }
        for role, token_id in ids.items():
            settings[f"{role}_token"] = tokenizer.convert_ids_to_tokens(token_id)
            settings[f"{role}_id"] = token_id
        return cls(**settings)


class LVRRows(SpanRows):
    """Spans that end by distance, too.

    Args:
        end_vector_H: the learned end vector.
    """

    mechanism: LVR

    def __init__(
        self, mechanism: LVR, steps_N: Tensor, max_spans_N: Tensor | None, end_vector_H: Tensor
    ):
        super().__init__(mechanism, steps_N, max_spans_N)
        self.end_vector_H = end_vector_H

    def _is_end(self, latents_NH: Tensor) -> Tensor:
        # in float32: squares of bf16 differences would lose the threshold's digits
        distance_N = (latents_NH.float() - self.end_vector_H.float()).square().mean(-1)
        return distance_N < self.mechanism.latent_end_threshold


def end_vector(model: nn.Module) -> Tensor:
    """The learned end vector [H] of exit `latent_end`."""
    return getattr(model, END_VECTOR_ATTRIBUTE)
