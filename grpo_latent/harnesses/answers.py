"""Answers the questions of an evaluation harness with a latent checkpoint.

What a harness gets of a completion is text that its parsers read: no latent position and no
special token is in it, and where the model commits to an answer by tags, the answer alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.rollout.llm import LatentLLM
from grpo_latent.rollout.protocol import SamplingParams

MIN_NEW_TOKENS = 512  # positions that evaluations of latent models decode (LVR, IVT-LR)
_TAGS = re.compile(r"</?answer>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """What a harness asks.

    Attributes:
        messages: contents are lists of {"type": "text", "text"} and {"type": "image"} in order.
        images: in the order of the image parts.
    """

    messages: tuple[dict, ...]
    images: tuple[Image.Image, ...]


def read_content(
    parts: Sequence[dict], where: str, text_key: str, image_key: str
) -> tuple[list[dict], list[Image.Image]]:
    """Reads a harness's texts and images, in order, as a `Question` has them.

    Args:
        where: names the question in messages.
        text_key, image_key: of a part, what holds its text, its picture or an image's file.

    Raises:
        DataError: video, audio, or an image that is not here.
    """
    content, images = [], []
    for part in parts:
        if part["type"] == "text":
            content.append({"type": "text", "text": part[text_key]})
        elif part["type"] == "image":
            content.append({"type": "image"})
            images.append(_picture(part[image_key], where))
        else:
            raise DataError(
                "a question that a latent checkpoint cannot be asked",
                where=where,
                got=part["type"],
                expected="text and images",
            )
    return content, images


def _picture(image: object, where: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return ImageRef(where, path=Path(image)).open()
    raise DataError(
        "not an image",
        where=where,
        got=type(image).__name__,
        expected="a picture or a file's path",
    )


@dataclass(frozen=True)
class Answer:
    """What a harness gets: the text, and how many positions the completion took."""

    text: str
    num_tokens: int


class Answerer:
    """Answers questions with one checkpoint.

    Args:
        folder: a latent checkpoint, ours or published.
        engine: `hf` or `vllm`.
        device: of engine hf; None takes a GPU where there is one.
        steps: latent steps a span, None for the checkpoint's.
        min_new_tokens: positions that a completion has at least, whatever the task's bound:
            latents count, and a bound for a bare letter would cut them off.
        answer_only: whether text around `<answer>…</answer>` is left out.
        engine_options: further arguments of the engine's class.

    Raises:
        ConfigError: a setting cannot be used.
        CheckpointError: the folder cannot.
    """

    def __init__(
        self,
        folder: str,
        engine: str = "hf",
        dtype: str = "float32",
        device: str | None = None,
        steps: int | None = None,
        min_new_tokens: int = MIN_NEW_TOKENS,
        answer_only: bool = True,
        seed: int = 0,
        **engine_options: Any,
    ):
        if type(min_new_tokens) is not int or min_new_tokens < 1:
            raise ConfigError(
                "no room for an answer",
                where="min_new_tokens",
                got=min_new_tokens,
                expected="int >= 1",
            )
        overrides = None if steps is None else {"steps": steps}
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.llm = LatentLLM(
            folder, engine, parse_dtype(dtype, "dtype"), place, overrides, **engine_options
        )
        self.min_new_tokens = min_new_tokens
        self.answer_only = answer_only
        self.seed = seed
        self._raised: set[int] = set()  # bounds of tasks that were told of

    def __call__(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = -1,
    ) -> list[Answer]:
        """Answers each question once; greedily at temperature 0.

        Args:
            max_new_tokens: the task's bound, raised to `min_new_tokens`, which is said once.
        """
        bound = self._bound(max_new_tokens)
        sampling = (
            SamplingParams(bound, temperature, top_k, top_p)
            if temperature > 0
            else SamplingParams(bound, temperature=0.0)
        )
        groups = self.llm.chat(
            [question.messages for question in questions],
            [question.images for question in questions],
            sampling,
            seed=self.seed,
        )
        return [
            Answer(bare_answer(self.llm.text(group[0]), self.answer_only), len(group[0].token_ids))
            for group in groups
        ]

    def _bound(self, max_new_tokens: int) -> int:
        if max_new_tokens >= self.min_new_tokens:
            return max_new_tokens
        if max_new_tokens not in self._raised:
            self._raised.add(max_new_tokens)
            # printed: harnesses filter warnings
            print(
                f"grpo_latent: the task allows {max_new_tokens} new tokens, which latents and "
                f"answer tags would fill; {self.min_new_tokens} are decoded (min_new_tokens)",
                file=sys.stderr,
            )
        return self.min_new_tokens


def bare_answer(text: str, answer_only: bool = True) -> str:
    """Takes the tags of an answer off, with what stands around them if `answer_only`.

    Parsers of harnesses do not know them: to VLMEvalKit `<answer>A</answer>` is one word, no A.

    >>> bare_answer("It is red. <answer>A</answer>"), bare_answer("It is. <answer> A", False)
    ('A', 'It is. A')
    """
    found = _ANSWER.findall(text) if answer_only else []
    if len(found) == 1:
        return found[0].strip()
    return (
        re.sub(" {2,}", " ", _TAGS.sub(" ", text)).strip() if _TAGS.search(text) else text.strip()
    )
