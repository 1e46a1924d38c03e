"""From messages and images to the prompt ids and pixels that models, rollouts and SFT take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.common.pictures import to_rgb
from grpo_latent.errors import CheckpointError, DataError, GrpoLatentError

# where processors and their tokenizers name the tokens that images and videos are written as
_MEDIA_TOKENS = (
    "image_token",
    "video_token",
    "audio_token",
    "vision_start_token",
    "vision_end_token",
    "image_start_token",
    "image_end_token",
    "start_image_token",
    "end_image_token",
    "context_image_token",
)


@dataclass(frozen=True)
class Prompt:
    """`ids` int64 [P], image placeholders expanded; `images` in their order, or None."""

    ids: Tensor
    images: ImageInputs | None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    messages: Sequence[dict],
    images: Sequence[Image.Image],
    where: str,
) -> Prompt:
    """The prompt as the model sees it before its response: chat template, then the processor.

    Args:
        messages: contents are lists of {"type": "text", "text": ...} and {"type": "image"}.
        images: one per image part, in order, in any mode that `to_rgb` takes.
        where: file and row, for errors.

    Raises:
        CheckpointError: there is no chat template.
        DataError: the numbers of images and of image parts differ, images for a model without a
            processor, an image that the processor refuses, or a text that spells a media token.
    """
    text = render_text(tokenizer, processor, messages, len(images), where)
    if not images or processor is None:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return Prompt(ids, None)
    pictures = [to_rgb(image, where) for image in images]
    try:
        batch = processor(
            text=[text], images=pictures, add_special_tokens=False, return_tensors="pt"
        )
    except GrpoLatentError:
        raise
    except ValueError as error:
        raise _refused(error, [picture.size[::-1] for picture in pictures], where) from error
    return Prompt(
        batch["input_ids"][0].to(torch.long),
        backbone_of_processor(processor).image_inputs(batch, processor),
    )


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    messages: Sequence[dict],
    num_images: int,
    where: str,
) -> str:
    """The chat template's text, one placeholder an image.

    Arguments and errors are those of `encode_prompt`.
    """
    num_parts = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_parts != num_images:
        raise DataError(
            "images do not match the prompt",
            where=where,
            got=f"{num_images} image(s), {num_parts} <image> in the prompt",
            expected="one <image> per image",
        )
    if num_images and processor is None:
        raise DataError(
            "an image for a text-only model",
            where=where,
            got=f"{num_images} image(s)",
            expected="none",
        )
    _check_texts(tokenizer, processor, messages, where)
    if processor is None:  # templates of text models print a list of parts as it is
        messages = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            for message in messages
        ]
    # Chameleon's processor cannot have a template
    has_own = processor is not None and bool(getattr(processor, "chat_template", None))
    template_owner = processor if processor is not None and has_own else tokenizer
    if not template_owner.chat_template:
        raise CheckpointError(
            "no chat template",
            where=str(getattr(tokenizer, "name_or_path", "") or "the tokenizer"),
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="Copy it from the model that this one comes from.",
        )
    text = template_owner.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=False
    )
    assert isinstance(text, str)  # a list is what several chats would give
    return text


def assistant_header(
    tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None, prompt_ids: Tensor
) -> int:
    """Number of positions at the end of a prompt that open the assistant's turn.

    They are what the chat template adds if it is asked for a generation prompt; 0 where it adds
    nothing.

    Args:
        prompt_ids: int64 [P], of `encode_prompt`.

    Raises:
        CheckpointError: the prompt does not end by them.
    """
    has_own = processor is not None and bool(getattr(processor, "chat_template", None))
    template_owner = processor if processor is not None and has_own else tokenizer
    content: Any = "?" if processor is None else [{"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    closed, opened = (
        template_owner.apply_chat_template(messages, add_generation_prompt=asked, tokenize=False)
        for asked in (False, True)
    )
    assert isinstance(closed, str) and isinstance(opened, str)
    header_ids = tokenizer(opened.removeprefix(closed), add_special_tokens=False).input_ids
    length = len(header_ids)
    if not opened.startswith(closed) or prompt_ids[len(prompt_ids) - length :].tolist() != list(
        header_ids
    ):
        raise CheckpointError(
            "the chat template does not end prompts by a header of their own",
            where=str(getattr(tokenizer, "name_or_path", "") or "the tokenizer"),
            got=opened,
            expected=f"{closed!r} and what opens the assistant's turn",
            fix="Use the chat template of the model that this one comes from.",
        )
    return length


def _check_texts(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    messages: Sequence[dict],
    where: str,
) -> None:
    """Raises `DataError` where a text spells a token that stands for an image or video."""
    if processor is None:
        return
    named = [
        getattr(owner, name, None) for owner in (processor, tokenizer) for name in _MEDIA_TOKENS
    ]
    tokens = sorted({token for token in named if isinstance(token, str) and token})
    for message in messages:
        for part in message["content"]:
            found = [token for token in tokens if token in part.get("text", "")]
            if found:
                raise DataError(
                    "a text spells a token that stands for an image",
                    where=where,
                    got=f"{found[0]} in {part['text']!r}",
                    expected="<image> where an image goes, and no token of the model's",
                    fix="Take the token out of the text, or drop the row.",
                )


def _refused(error: Exception, sizes: Sequence[tuple[int, int]], where: str) -> DataError:
    return DataError(
        "the model's image processor refuses the prompt",
        where=where,
        got=f"{error}, for images of (height, width) {list(sizes)}",
        expected="images of sides that it can cut into patches",
        fix="Pad, crop or scale the image, or drop the row.",
    )


class PromptLength:
    """Counts the tokens of prompts from their texts and the sizes of their images, without pixels.

    The text is rendered and tokenised as `encode_prompt` does it. What the processor adds around
    the tokens of an image is the same for all, so it is measured once.

    Raises:
        CheckpointError: as `encode_prompt`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None):
        self.tokenizer = tokenizer
        self.processor = processor
        self._extra: tuple[int, int] | None = None

    def __call__(
        self, messages: Sequence[dict], sizes: Sequence[tuple[int, int]], where: str
    ) -> int:
        """The number of tokens of a prompt, image tokens included.

        Args:
            sizes: (height, width) of the upright images, in order.

        Raises:
            DataError: as `encode_prompt`, save for pixels.
        """
        text = render_text(self.tokenizer, self.processor, messages, len(sizes), where)
        num_tokens = self._num_text_tokens(text)
        if not sizes or self.processor is None:
            return num_tokens
        try:
            num_of_images = self._num_image_tokens(sizes)
        except ValueError as error:
            raise _refused(error, sizes, where) from error
        if self._extra is None:
            self._extra = self._measure()
        of_image, of_prompt = self._extra
        return num_tokens + sum(num_of_images) + len(sizes) * of_image + of_prompt

    def digest(self) -> str:
        """Differs where two models count differently."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = self.tokenizer.get_vocab() if backend is None else backend.to_str()
        parts = [self.tokenizer.chat_template, words]
        if self.processor is not None:
            parts += [
                getattr(self.processor, "chat_template", None),
                self.processor.to_json_string(),
            ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def _num_text_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _num_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        # transformers' name for what vLLM asks of a processor, too
        processor: Any = self.processor
        counts = processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in sizes])
        return counts.num_image_tokens

    def _measure(self) -> tuple[int, int]:
        """Tokens that each image, and a prompt with images, adds to those of images and text."""
        side = 56
        where = "the measuring image"
        extra = []
        for num_images in (1, 2):
            messages = [{"role": "user", "content": [{"type": "image"}] * num_images}]
            pictures = [Image.new("RGB", (side, side))] * num_images
            prompt = encode_prompt(self.tokenizer, self.processor, messages, pictures, where)
            text = render_text(self.tokenizer, self.processor, messages, num_images, where)
            own = sum(self._num_image_tokens([(side, side)] * num_images))
            extra.append(len(prompt.ids) - self._num_text_tokens(text) - own)
        of_image = extra[1] - extra[0]
        return of_image, extra[0] - of_image
