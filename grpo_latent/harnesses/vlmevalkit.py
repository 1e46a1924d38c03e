"""A latent checkpoint as a model of VLMEvalKit, whose own run.py this becomes.

    python -m grpo_latent.harnesses.vlmevalkit --config mine.json [arguments of run.py]

mine.json names one of two classes, which are registered before run.py starts:

    {"model": {"LVR-7B": {"class": "GrpoLatent", "folder": "LVR-7B", "dtype": "bfloat16"}},
     "data": {"MMVP": {"class": "ImageMCQDataset", "dataset": "MMVP"}}}

`GrpoLatent` decodes in this process; `GrpoLatentServed` is VLMEvalKit's OpenAI-compatible class
against `python -m grpo_latent.serve`, and takes what that class takes (`api_base`, `model`, …).
Both give answers without tags, which VLMEvalKit cannot parse.
"""

from __future__ import annotations

from typing import Any

import vlmeval.api
import vlmeval.vlm
from vlmeval.api import LMDeployAPI
from vlmeval.vlm.base import BaseModel

from grpo_latent.errors import DataError
from grpo_latent.harnesses.answers import (
    MIN_NEW_TOKENS,
    Answerer,
    Question,
    bare_answer,
    read_content,
)


class GrpoLatent(BaseModel):
    """Answers VLMEvalKit's questions.

    Args:
        folder: the checkpoint's.
        template: what is asked instead of VLMEvalKit's own prompt, with columns of the table in
            braces, such as `{question}`; images stand before it. None asks as VLMEvalKit does.
        settings: of `Answerer`.
    """

    INTERLEAVE = True

    def __init__(
        self,
        folder: str,
        template: str | None = None,
        max_new_tokens: int = MIN_NEW_TOKENS,
        **settings: Any,
    ):
        super().__init__()
        self.answerer = Answerer(folder, **settings)
        self.template = template
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.template is not None

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict]:
        """Fills the template with a row's columns; raises `DataError` where one is missing."""
        assert self.template is not None, "`use_custom_prompt` says so"
        files = self.dump_image(line, dataset)
        try:
            text = self.template.format_map(dict(line))
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(
                "the template asks for a column that is not there",
                where=f"{dataset} row {line['index']}",
                got=f"{self.template!r}: {error!r}",
                expected=f"columns {sorted(map(str, line.keys()))}",
            ) from error
        images = [{"type": "image", "value": file} for file in files]
        return [*images, {"type": "text", "value": text}]

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        return self.answerer([question_of(message, str(dataset))], self.max_new_tokens)[0].text


class GrpoLatentServed(LMDeployAPI):
    """VLMEvalKit's OpenAI-compatible class, its answers without tags."""

    def generate_inner(self, inputs: Any, **kwargs: Any) -> tuple[int, str, Any]:
        code, text, log = super().generate_inner(inputs, **kwargs)
        return code, bare_answer(text) if code == 0 else text, log


def question_of(message: list[dict], where: str) -> Question:
    """Reads VLMEvalKit's message, a list of texts and image files in order.

    Raises:
        DataError: video, or an image that is not here.
    """
    content, images = read_content(message, where, "value", "value")
    return Question(({"role": "user", "content": content},), tuple(images))


def register() -> None:
    """Makes both classes known by name to VLMEvalKit's configs."""
    vlmeval.vlm.GrpoLatent = GrpoLatent
    vlmeval.api.GrpoLatentServed = GrpoLatentServed


def main() -> None:
    """Becomes VLMEvalKit's run.py."""
    import vlmeval.run

    register()
    vlmeval.run.main()


if __name__ == "__main__":
    main()
