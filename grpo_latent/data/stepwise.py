"""Multiple-choice questions with a rationale in steps: what IVT-LR's curriculum replaces by latents, one by one.

Two published schemas on the Hugging Face hub, read from their parquet files:

    M3CoT      id, question, choices [str], context, answer "B", rationale, image {bytes, path}, domain, topic, …
    ScienceQA  question, choices [str], answer 1 (index), hint, lecture, solution, image {bytes, path} or null, …

Both become a `StepwiseExample`; the prompt is made here, once for training and evaluation (the published code's two differ).
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.data.examples import IMAGE_PLACEHOLDER, ImageRef, check_images, split_content
from grpo_latent.errors import DataError

MAX_STEPS = 3  # 2510.12603: a rationale becomes at most three steps
SENTENCE_END = ". "
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class StepwiseExample:
    """One question with its rationale.

    Attributes:
        messages: one user message, content split into text and image parts.
        images: none or one.
        steps: of the rationale, at most `MAX_STEPS`; () where the data set has no rationale for the row.
        answer: the letter of the right choice.
        where: file and row, for messages.
    """

    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    steps: tuple[str, ...]
    answer: str
    data_source: str
    where: str


def rationale_steps(rationale: str, max_steps: int = MAX_STEPS) -> tuple[str, ...]:
    """The rationale split at ". " and merged, in order, into at most `max_steps` steps of nearly equal sentence counts.

    >>> rationale_steps("Red is at r1. It is a 7. Blue is a 2. 7 and 2 make 9.", 3)
    ('Red is at r1. It is a 7.', 'Blue is a 2.', '7 and 2 make 9.')
    >>> rationale_steps("Only one")
    ('Only one',)
    """
    sentences = [part.strip() for part in rationale.strip().split(SENTENCE_END) if part.strip(" .")]
    # the split took the full stop of all but the last sentence
    sentences = [part if part.endswith(".") else f"{part}." for part in sentences[:-1]] + sentences[-1:]
    num_steps = min(max_steps, len(sentences))
    steps, start = [], 0
    for step_idx in range(num_steps):
        size = len(sentences) // num_steps + (step_idx < len(sentences) % num_steps)
        steps.append(" ".join(sentences[start : start + size]))
        start += size
    return tuple(steps)


def stage_text(example: StepwiseExample, stage: int) -> str:
    """What stage `stage` of the curriculum writes out: the steps from `stage` on, then the answer.

    >>> example = StepwiseExample((), (), ("Red is a 7.", "Blue is a 2."), "B", "m3cot", "")
    >>> stage_text(example, 1)
    'Blue is a 2. Therefore, the answer is B'
    """
    return " ".join([*example.steps[stage:], f"Therefore, the answer is {example.answer}"])


def read_m3cot(path: str | Path) -> Iterator[StepwiseExample]:
    """Checked examples of an M3CoT parquet file. Raises `DataError`."""
    return _read(path, parse_m3cot_record)


def read_scienceqa(path: str | Path) -> Iterator[StepwiseExample]:
    """Checked examples of a ScienceQA parquet file. Raises `DataError`."""
    return _read(path, parse_scienceqa_record)


def parse_m3cot_record(record: object, where: str) -> StepwiseExample:
    """A checked example of one M3CoT record.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    record = _check_record(record, where)
    choices = _choices(record, where)
    answer = record.get("answer")
    letters = string.ascii_uppercase[: len(choices)]
    if not isinstance(answer, str) or answer.strip().upper() not in tuple(letters):
        raise _problem(where, "answer", "not the letter of a choice", answer, f"one of {letters}")
    rationale = _text(record, "rationale", where)
    if not rationale:
        raise _problem(where, "rationale", "no rationale", record.get("rationale"), "a non-empty string")
    context = _text(record, "context", where)
    return _example(record, choices, context, rationale, answer.strip().upper(), "m3cot", where)


def parse_scienceqa_record(record: object, where: str) -> StepwiseExample:
    """A checked example of one ScienceQA record; lecture and solution make the rationale, either may be missing.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    record = _check_record(record, where)
    choices = _choices(record, where)
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _problem(where, "answer", "not the index of a choice", answer, f"an integer in [0, {len(choices)})")
    rationale = " ".join(text for text in (_text(record, name, where) for name in ("lecture", "solution")) if text)
    hint = _text(record, "hint", where)
    return _example(record, choices, hint, rationale, string.ascii_uppercase[answer], "scienceqa", where)


def _read(path: str | Path, parse) -> Iterator[StepwiseExample]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "not a readable parquet file",
            where=str(path),
            got=str(error),
            expected="a parquet file of the data set's hub repository",
            fix="Check the path.",
        ) from error
    if file.metadata.num_rows == 0:
        raise DataError("no rows", where=str(path), got="an empty file", expected="at least one row")
    index = 0
    for batch in file.iter_batches(ROWS_PER_BATCH):
        for record in batch.to_pylist():
            yield parse(record, f"{path} row {index}")
            index += 1


def _problem(where: str, field: str, what: str, got: object, expected: str) -> DataError:
    return DataError(
        what,
        where=f"{where}: {field}",
        got=got,
        expected=expected,
        fix="Compare with the published schema; drop the row.",
    )


def _check_record(record: object, where: str) -> dict:
    if not isinstance(record, dict):
        raise _problem(where, "record", "not a record", record, "an object with the published fields")
    return record


def _text(record: dict, field: str, where: str) -> str:
    """The stripped text of an optional field."""
    value = record.get(field)
    if not isinstance(value, str | None):
        raise _problem(where, field, "not a text", value, "a string or null")
    return (value or "").strip()


def _choices(record: dict, where: str) -> list[str]:
    choices = record.get("choices")
    valid = isinstance(choices, list) and 2 <= len(choices) <= len(string.ascii_uppercase)
    if not valid or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise _problem(where, "choices", "not a list of choices", choices, "2 to 26 non-empty strings")
    return [choice.strip() for choice in choices]


def _example(
    record: dict, choices: list[str], context: str, rationale: str, answer: str, data_source: str, where: str
) -> StepwiseExample:
    question = _text(record, "question", where)
    if not question:
        raise _problem(where, "question", "no question", record.get("question"), "a non-empty string")
    image = record.get("image")
    images = []
    if image is not None:
        data = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(data, bytes) or not data:
            raise _problem(where, "image", "no image bytes", image, '{"bytes": <file content>, "path": ...} or null')
        images = [ImageRef(f"{where}: image", data=data)]
    options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    parts = [question, *([f"Context: {context}"] if context else []), f"Options:\n{options}"]
    content = split_content(IMAGE_PLACEHOLDER * len(images)) + [{"type": "text", "text": "\n".join(parts)}]
    messages = ({"role": "user", "content": content},)
    check_images(messages, images, f"{where}: question")
    return StepwiseExample(messages, tuple(images), rationale_steps(rationale), answer, data_source, where)
