"""From an example to a row: what all encoders share, and the checks that every row passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.prompts import Prompt, encode_prompt

IGNORED = -100  # a label that is not scored; torch's cross-entropy skips it too


class Prompted(Protocol):
    """What every method's example has."""

    @property
    def messages(self) -> Sequence[dict]: ...

    @property
    def images(self) -> Sequence[ImageRef]: ...

    @property
    def where(self) -> str: ...


Example = TypeVar("Example", bound=Prompted)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class RowEncoder(Generic[Example, Row]):
    """Tokenises examples for one model; each method derives its own, callable on an example.

    Attributes:
        processor: None for a text-only model.
        eos_id: ends a response whose answer is known.
        vision_ids: image placeholder and delimiter ids.
        max_length: longest row allowed, in positions; None for any.
    """

    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    mechanism: Mechanism
    eos_id: int
    vision_ids: frozenset[int]
    max_length: int | None = None

    @classmethod
    def of_model(cls, latent: LatentModel, **fields: Any) -> Self:
        """Makes the encoder of a loaded model; `fields` are those that it does not decide."""
        return cls(
            tokenizer=latent.tokenizer,
            processor=latent.processor,
            mechanism=latent.mechanism,
            eos_id=latent.tokenizer.eos_token_id,
            vision_ids=ModelAdapter(latent.model).vision_ids,
            **fields,
        )

    def __call__(self, example: Example) -> Row:
        """Makes the row of an example."""
        raise NotImplementedError

    def encode_prompt(self, example: Example) -> Prompt:
        """Encodes the example's prompt; decoded images live no longer than this call.

        Raises:
            DataError: an image cannot be read, or does not belong to the prompt.
        """
        pictures = [image.open() for image in example.images]
        return encode_prompt(
            self.tokenizer, self.processor, example.messages, pictures, example.where
        )

    def encode_text(
        self, text: str, where: str, expected: str = "plain text", fix: str = ""
    ) -> list[int]:
        """Tokenises a text of the response.

        Raises:
            DataError: the text spells out a latent or vision token, which would be taken for a
                real one.
        """
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        latent_ids = set(self.mechanism.token_ids.values())
        reserved = sorted(set(ids) & (self.vision_ids | latent_ids))
        if reserved:
            raise DataError(
                "a reserved token in the text of the response",
                where=where,
                got=self.tokenizer.convert_ids_to_tokens(reserved),
                expected=expected,
                fix=fix or "Take the token out, or drop the row.",
            )
        return ids

    def check_length(self, num_positions: int, where: str, made_of: Iterable[str] = ()) -> None:
        """Raises `DataError` for a row longer than `max_length`; `made_of` says of what."""
        if self.max_length is not None and num_positions > self.max_length:
            raise DataError(
                "row too long",
                where=where,
                got=", ".join([f"{num_positions} positions", *made_of]),
                expected=f"at most {self.max_length}",
                fix="Raise data.max_length, lower data.max_image_tokens, or drop the row.",
            )
