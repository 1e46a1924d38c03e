"""What the readers of multiple-choice benchmarks share: the prompt, the check of a row, images."""

from __future__ import annotations

import ast
import base64
import binascii
import math
from collections.abc import Sequence
from pathlib import Path

from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.eval.benchmarks.protocol import BenchmarkItem
from grpo_latent.eval.graders import LETTERS

INSTRUCTION = "Answer with the option's letter from the given choices directly."


def choice_item(
    benchmark: str,
    item_id: str,
    *,
    question: str,
    prompt: str | None = None,
    images: Sequence[ImageRef],
    options: Sequence[str],
    answer: object,
    where: str,
    category: object = None,
    group_id: str | None = None,
) -> BenchmarkItem:
    """Checks and makes an item whose images stand before its text.

    Args:
        question: its words as published.
        prompt: what is asked; None for `options_prompt`.
        answer: the right letter, perhaps small or in parentheses.
        group_id: None where each row is a question of its own.

    Raises:
        DataError: fewer than two options, or an answer that names none.
    """
    texts = tuple(options)
    letter = str(answer).strip().strip("()").upper()
    if len(texts) < 2:
        raise malformed(f"{where}: choices", list(texts), "two options or more")
    letters = LETTERS[: len(texts)]
    if len(letter) != 1 or letter not in letters:
        raise malformed(f"{where}: answer", answer, f"one of {', '.join(letters)}")
    text = options_prompt(question, texts) if prompt is None else prompt
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return BenchmarkItem(
        benchmark,
        item_id,
        group_id or item_id,
        str(category or ""),
        ({"role": "user", "content": content},),
        tuple(images),
        texts,
        letter,
        question,
    )


def options_prompt(question: str, options: Sequence[str]) -> str:
    """Writes the question, its lettered options and `INSTRUCTION`, a line each."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines, INSTRUCTION])


def option_texts(choices: object, where: str) -> tuple[str, ...]:
    """Reads a cell of options: a list, or one written as text (`["1", "2"]`, `['1', '2']`).

    >>> option_texts("['one', 'two']", "row 0")
    ('one', 'two')

    Raises:
        DataError: it is none, or an option is null or blank.
    """
    given = choices
    if isinstance(choices, str):
        try:
            choices = ast.literal_eval(choices.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            choices = None
    if not isinstance(choices, list | tuple) or len(choices) > len(LETTERS):
        raise malformed(f"{where}: choices", given, "a list of up to 26 options")
    return tuple(
        required(choice, f"{where}: choices: option {letter}")
        for letter, choice in zip(LETTERS, choices, strict=False)
    )


def required(value: object, where: str) -> str:
    """Reads a cell as text; raises `DataError` where it is null, not a number, or blank."""
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    is_nan = isinstance(value, float) and math.isnan(value)  # pandas writes a null so
    if not is_plain or is_nan or not str(value).strip():
        raise malformed(where, repr(value), "a text that is not blank, or a number")
    return str(value)


def malformed(where: str, got: object, expected: str) -> DataError:
    """Makes the error of a row whose value at `where` is not as published."""
    return DataError(
        "malformed row", where=where, got=got, expected=expected, fix="Download the file again."
    )


def integer(value: object, where: str) -> int:
    """Reads the number that a column holds as text; raises `DataError` where it holds none."""
    try:
        return int(str(value))
    except ValueError as error:
        raise malformed(where, value, "an integer") from error


def image_file(folder: Path, places: tuple[str, ...], name: str, where: str) -> ImageRef:
    """Finds the image `name` in the first of `places` below `folder` that has it.

    Raises:
        DataError: none has.
    """
    for place in places:
        if (folder / place / name).is_file():
            return ImageRef(f"{where}: image", path=folder / place / name)
    raise DataError(
        "no such image file",
        where=where,
        got=name,
        expected=f"below {folder} in {' or '.join(map(repr, places))}",
        fix="Keep the benchmark's folder as it was downloaded.",
    )


def stored_image(image: object, where: str) -> ImageRef:
    """Takes an image that a parquet file holds; raises `DataError` where there are no bytes."""
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise malformed(where, type(image).__name__, '{"bytes": <file content>, "path": ...}')
    return ImageRef(where, data=image["bytes"])


def stored_base64(image: object, where: str) -> ImageRef:
    """Takes an image that a table holds as base64; raises `DataError` where it is none."""
    try:
        data = base64.b64decode(image or "", validate=True)  # type: ignore[arg-type]
    except (binascii.Error, ValueError, TypeError) as error:
        raise malformed(where, str(image)[:40], f"base64 ({error})") from error
    if not data:
        raise malformed(where, image, "base64 of an image")
    return ImageRef(where, data=data)
