"""ILVR (2512.05665): spans of h between pieces of text, each until the model would say `end`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms.protocol import Mechanism, Refusal
from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.spans import END_TOKEN, SpanMechanism, span_refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@register
@dataclass(frozen=True)
class ILVR(SpanMechanism):
    """Spans repeat, and end at the end token or after `steps`."""

    exit: str = END_TOKEN

    name: ClassVar[str] = "ilvr"
    published_tokens: ClassVar[Mapping[str, str]] = {
        "start": "<|latent_start|>",
        "latent": "<|latent_pad|>",
        "end": "<|latent_end|>",
    }

    def refusals(self, engine: str) -> list[Refusal]:
        return span_refusals(self, engine)

    @classmethod
    def official_layout(
        cls, config_json: dict, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> Mechanism | None:
        """Reads `latent_size` of config.json; tokens are found by their text."""
        if "latent_size" not in config_json:
            return None
        vocab = tokenizer.get_vocab()
        missing = [token for token in cls.published_tokens.values() if token not in vocab]
        if missing:
            raise CheckpointError(
                "not an ILVR checkpoint",
                where=where,
                got=f"latent_size, and a tokenizer without {missing}",
                expected="the tokenizer of the same checkpoint",
            )
        try:
            return cls.from_tokens(vocab, steps=config_json["latent_size"])
        except ConfigError as error:
            where = f"{where}: latent_size"
            raise CheckpointError(
                error.what, where=where, got=error.got, expected=error.expected
            ) from error
