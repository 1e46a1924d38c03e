"""The questions of M3CoT and ScienceQA, as SFT, RL and evaluation all ask them.

The prompts are made here alone, so that what is evaluated is what was trained: ours, and the one
that IVT-LR's code trains with (`as_published`).
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from grpo_latent.data.examples import IMAGE_PLACEHOLDER, check_images, split_content
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError


@dataclass(frozen=True)
class ChoiceQuestion:
    """A published question as SFT, RL and evaluation ask it.

    Attributes:
        messages: one user message, content split into text and image parts.
        images: in the order of the image parts.
        choices: texts in the order of their letters.
        answer: the letter of the right one.
        question: its words alone, as published.
    """

    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    choices: tuple[str, ...]
    answer: str
    question: str


# IVT-LR's code scales every image to it, whatever its shape
PUBLISHED_SIZE = (280, 280)


def as_published(question: ChoiceQuestion) -> ChoiceQuestion:
    """Asks as IVT-LR's training code does (2510.12603), without the context.

    The braces are in its text. Its inference code leaves out the parentheses and the last line
    break (`eval.benchmarks.presets`).
    """
    options = "\n".join(
        f"({letter}).{{{choice}}}"
        for letter, choice in zip(string.ascii_uppercase, question.choices, strict=False)
    )
    text = f"[Question]:{{{question.question}}}\n[Options]:\n{options}\nAnswer:\n"
    content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": text}]
    return replace(
        question,
        messages=({"role": "user", "content": content},),
        images=tuple(replace(image, size=PUBLISHED_SIZE) for image in question.images),
    )


def m3cot_question(record: object, where: str) -> ChoiceQuestion:
    """Checks the question of one M3CoT record, which needs no rationale. Raises `DataError`."""
    record = check_record(record, where)
    choices = _choices(record, where)
    answer = record.get("answer")
    letters = string.ascii_uppercase[: len(choices)]
    if not isinstance(answer, str) or answer.strip().upper() not in tuple(letters):
        raise bad_field(where, "answer", "not the letter of a choice", answer, f"one of {letters}")
    return _question(
        record, choices, text_field(record, "context", where), answer.strip().upper(), where
    )


def scienceqa_question(record: object, where: str) -> ChoiceQuestion:
    """Checks the question of one ScienceQA record. Raises `DataError`."""
    record = check_record(record, where)
    choices = _choices(record, where)
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise bad_field(
            where,
            "answer",
            "not the index of a choice",
            answer,
            f"an integer in [0, {len(choices)})",
        )
    return _question(
        record, choices, text_field(record, "hint", where), string.ascii_uppercase[answer], where
    )


def bad_field(where: str, field: str, what: str, got: object, expected: str) -> DataError:
    return DataError(
        what,
        where=f"{where}: {field}",
        got=got,
        expected=expected,
        fix="Compare with the published schema; drop the row.",
    )


def check_record(record: object, where: str) -> dict:
    if not isinstance(record, dict):
        raise bad_field(
            where, "record", "not a record", record, "an object with the published fields"
        )
    return record


def text_field(record: dict, field: str, where: str) -> str:
    """Returns the stripped text of an optional field."""
    value = record.get(field)
    if not isinstance(value, str | None):
        raise bad_field(where, field, "not a text", value, "a string or null")
    return (value or "").strip()


def _choices(record: dict, where: str) -> list[str]:
    choices = record.get("choices")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(string.ascii_uppercase)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise bad_field(
            where, "choices", "not a list of choices", choices, "2 to 26 non-empty strings"
        )
    return [choice.strip() for choice in choices]


def _question(
    record: dict, choices: list[str], context: str, answer: str, where: str
) -> ChoiceQuestion:
    question = text_field(record, "question", where)
    if not question:
        raise bad_field(
            where, "question", "no question", record.get("question"), "a non-empty string"
        )
    image = record.get("image")
    images = []
    if image is not None:
        data = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(data, bytes) or not data:
            raise bad_field(
                where,
                "image",
                "no image bytes",
                image,
                '{"bytes": <file content>, "path": ...} or null',
            )
        images = [ImageRef(f"{where}: image", data=data)]
    options = "\n".join(
        f"({letter}) {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    parts = [question, *([f"Context: {context}"] if context else []), f"Options:\n{options}"]
    content = split_content(IMAGE_PLACEHOLDER * len(images)) + [
        {"type": "text", "text": "\n".join(parts)}
    ]
    messages = ({"role": "user", "content": content},)
    check_images(messages, images, f"{where}: question")
    return ChoiceQuestion(messages, tuple(images), tuple(choices), answer, question)
