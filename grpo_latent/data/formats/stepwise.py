"""Questions with a rationale in steps, which a curriculum replaces by latents, one by one.

Two published schemas on the Hugging Face hub, read from their parquet files, Coconut's JSON (a
list), and verl's:

    M3CoT      id, question, choices [str], context, answer "B", rationale, image {bytes, path}, …
    ScienceQA  question, choices [str], answer 1 (index), hint, lecture, solution, image or null, …
    Coconut    question, answer "18", steps ["<<16-3-4=9>>", "<<9*2=18>>"]   (as GSM8K-Aug)
    verl       as in data.rows, with extra_info.steps [str]

`m3cot_published` and `scienceqa_published` read the first two as IVT-LR's own code trains with
them: its prompts, images at 280 x 280, sentences split at every ". ", steps in lines of their own.

All become a `StepwiseExample`, whose prompt `to_verl_rows` writes down for RL:

    python -m grpo_latent.data.formats.stepwise --format m3cot --in train.parquet --out rl.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from grpo_latent.common.command import command
from grpo_latent.data.examples import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    check_images,
    join_content,
    split_content,
)
from grpo_latent.data.files import iter_verl_rows
from grpo_latent.data.formats.choice_questions import (
    ChoiceQuestion,
    as_published,
    bad_field,
    check_record,
    m3cot_question,
    scienceqa_question,
    text_field,
)
from grpo_latent.data.formats.json_records import read_json_records
from grpo_latent.data.formats.sentences import split_sentences
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import check_prompt, verl_row, write_verl_parquet
from grpo_latent.errors import DataError

MAX_STEPS = 3  # 2510.12603: a rationale becomes at most three steps
CLOSING = (".", "!", "?", ":", ";", ",")
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class StepwiseExample:
    """One question with its rationale.

    Attributes:
        messages: one user message, content split into text and image parts.
        images: in the order of the image parts.
        steps: of the rationale; () where the data set has none for the row. At most `MAX_STEPS` of
            M3CoT and ScienceQA.
        answer: the letter of the right choice, or what verl's ground truth says.
        closing: what follows the steps, with the answer in it.
        joiner: what stands behind each step.
        where: file and row, for messages.
    """

    has_answer: ClassVar[bool] = True  # one without teaches nothing, and is refused

    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    steps: tuple[str, ...]
    answer: str
    closing: str
    data_source: str
    where: str
    joiner: str = " "


def rationale_steps(rationale: str, max_steps: int = MAX_STEPS) -> tuple[str, ...]:
    """Merges the sentences of the rationale, in order, into `max_steps` steps at most.

    The steps have nearly equal numbers of sentences.

    >>> rationale_steps("Red is at r1. It is a 7. Blue is a 2. 7 and 2 make 9.", 3)
    ('Red is at r1. It is a 7.', 'Blue is a 2.', '7 and 2 make 9.')
    >>> rationale_steps("Only one")
    ('Only one',)
    """
    sentences = split_sentences(rationale)
    # merged ones stand in one line, where an item of a list or a heading needs an end
    sentences = [
        part if part.endswith(CLOSING) else f"{part}." for part in sentences[:-1]
    ] + sentences[-1:]
    return _in_steps(sentences, " ", max_steps)


def published_steps(rationale: str, max_steps: int = MAX_STEPS) -> tuple[str, ...]:
    """Splits a rationale as IVT-LR's code does: at every ". ", its full stops lost at the cuts.

    >>> published_steps("Red, e.g. r1. It is a 7. Blue is a 2. 7 and 2 make 9.")
    ('Red, e.g. r1', 'It is a 7. Blue is a 2', '7 and 2 make 9.')
    """
    sentences = rationale.replace("\n", " ").strip().split(". ")
    if sentences[-1] == "":
        sentences.pop()
    return _in_steps(sentences, ". ", max_steps)


def _in_steps(sentences: Sequence[str], joiner: str, max_steps: int) -> tuple[str, ...]:
    num_steps = min(max_steps, len(sentences))
    steps = []
    start = 0
    for step_idx in range(num_steps):
        size = len(sentences) // num_steps + (step_idx < len(sentences) % num_steps)
        steps.append(joiner.join(sentences[start : start + size]))
        start += size
    return tuple(steps)


def remaining_text(example: StepwiseExample, first_step: int | None) -> str:
    """Joins the steps from `first_step` on, None for no step at all, then the answer.

    >>> steps = ("Red is a 7.", "Blue is a 2.")
    >>> closing = "Therefore, the answer is B"
    >>> remaining_text(StepwiseExample((), (), steps, "B", closing, "m3cot", ""), 1)
    'Blue is a 2. Therefore, the answer is B'
    """
    steps = () if first_step is None else example.steps[first_step:]
    return example.joiner.join([*steps, example.closing])


def read_m3cot(path: str | Path, published: bool = False) -> Iterator[StepwiseExample]:
    """Yields checked examples of an M3CoT parquet file. Raises `DataError`."""
    return _read(path, partial(parse_m3cot_record, published=published))


def read_scienceqa(path: str | Path, published: bool = False) -> Iterator[StepwiseExample]:
    """Yields checked examples of a ScienceQA parquet file. Raises `DataError`."""
    return _read(path, partial(parse_scienceqa_record, published=published))


def read_coconut_json(path: str | Path) -> Iterator[StepwiseExample]:
    """Yields checked examples of a JSON file in Coconut's form. Raises `DataError`."""
    records = read_json_records(path, '{"question", "answer", "steps"}')
    for index, record in enumerate(records):
        yield parse_coconut_record(record, f"{path} row {index}")


def read_stepwise_rows(path: str | Path) -> Iterator[StepwiseExample]:
    """Yields checked examples of a parquet file in verl's schema. Raises `DataError`."""
    for row, where in iter_verl_rows(path):
        yield parse_stepwise_row(row, where)


def parse_stepwise_row(row: dict, where: str) -> StepwiseExample:
    """Checks one verl row; its answer is written in answer tags.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    messages, images = check_prompt(row, where)
    extra_info = row.get("extra_info") or {}
    answer = row["reward_model"]["ground_truth"]
    if extra_info.get("has_answer") is False or not isinstance(answer, str) or not answer.strip():
        raise bad_field(
            where, "reward_model.ground_truth", "no answer", answer, "a non-empty string"
        )
    steps = _steps(extra_info.get("steps"), "extra_info.steps", where)
    return _tagged(messages, images, steps, answer.strip(), row["data_source"], where)


def parse_coconut_record(record: object, where: str) -> StepwiseExample:
    """Checks one record of Coconut's JSON; its answer is written in answer tags, not after "###".

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    record = check_record(record, where)
    texts = {name: text_field(record, name, where) for name in ("question", "answer")}
    for name, text in texts.items():
        if not text:
            raise bad_field(where, name, f"no {name}", record.get(name), "a non-empty string")
    messages = [{"role": "user", "content": split_content(texts["question"])}]
    check_images(messages, [], f"{where}: question")
    return _tagged(
        messages,
        [],
        _steps(record.get("steps"), "steps", where),
        texts["answer"],
        "coconut",
        where,
    )


def _steps(steps: object, field: str, where: str) -> tuple[str, ...]:
    if not isinstance(steps, list) or not all(
        isinstance(step, str) and step.strip() for step in steps
    ):
        raise bad_field(
            where, field, "no rationale in steps", steps, "a list of non-empty strings, or []"
        )
    return tuple(step.strip() for step in steps)


def _tagged(
    messages, images, steps: tuple[str, ...], answer: str, data_source: str, where: str
) -> StepwiseExample:
    closing = f"{ANSWER_OPEN} {answer} {ANSWER_CLOSE}"
    return StepwiseExample(
        tuple(messages), tuple(images), steps, answer, closing, data_source, where
    )


def parse_m3cot_record(record: object, where: str, published: bool = False) -> StepwiseExample:
    """Checks one M3CoT record.

    Args:
        published: in the form that IVT-LR's code trains with.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    record = check_record(record, where)
    question = m3cot_question(record, where)
    rationale = text_field(record, "rationale", where)
    if not rationale:
        raise bad_field(
            where, "rationale", "no rationale", record.get("rationale"), "a non-empty string"
        )
    return _example(question, rationale, "m3cot", where, published)


def parse_scienceqa_record(record: object, where: str, published: bool = False) -> StepwiseExample:
    """Checks one ScienceQA record; lecture and solution, or one of them, make the rationale.

    Args:
        published: in the form that IVT-LR's code trains with.

    Raises:
        DataError: names row, field, what was got and expected, and a fix.
    """
    record = check_record(record, where)
    question = scienceqa_question(record, where)
    rationale = " ".join(
        text
        for text in (text_field(record, name, where) for name in ("lecture", "solution"))
        if text
    )
    return _example(question, rationale, "scienceqa", where, published)


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
        raise DataError(
            "no rows", where=str(path), got="an empty file", expected="at least one row"
        )
    index = 0
    for batch in file.iter_batches(ROWS_PER_BATCH):
        for record in batch.to_pylist():
            yield parse(record, f"{path} row {index}")
            index += 1


def _example(
    question: ChoiceQuestion, rationale: str, data_source: str, where: str, published: bool
) -> StepwiseExample:
    closing = f"Therefore, the answer is {question.answer}"
    steps = published_steps(rationale) if published else rationale_steps(rationale)
    asked = as_published(question) if published else question
    return StepwiseExample(
        asked.messages,
        asked.images,
        steps,
        asked.answer,
        closing,
        data_source,
        where,
        joiner="\n" if published else " ",
    )


READERS: dict[str, Callable[[str | Path], Iterator[StepwiseExample]]] = {
    "m3cot": read_m3cot,
    "scienceqa": read_scienceqa,
    "m3cot_published": partial(read_m3cot, published=True),
    "scienceqa_published": partial(read_scienceqa, published=True),
    "coconut_json": read_coconut_json,
    "parquet": read_stepwise_rows,
}


def to_verl_rows(examples: Iterator[StepwiseExample], split: str) -> Iterator[dict]:
    """Makes verl rows with the prompts of SFT; `extra_info.steps` keeps the rationale."""
    for index, example in enumerate(examples):
        yield verl_row(
            data_source=example.data_source,
            prompt=join_content(example.messages[0]["content"]),
            images=[image.scaled_bytes() for image in example.images],
            answer=example.answer,
            index=index,
            split=split,
            steps=example.steps,
        )


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.formats.stepwise", description="Writes rows for RL."
    )
    parser.add_argument(
        "--format", choices=[name for name in READERS if name != "parquet"], required=True
    )
    parser.add_argument(
        "--in", dest="source", type=Path, nargs="+", required=True, help="published files"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="train")
    options = parser.parse_args(arguments)
    examples = (example for path in options.source for example in READERS[options.format](path))
    num_rows = write_verl_parquet(options.out, to_verl_rows(examples, options.split))
    print(f"{options.out}: {num_rows} rows")


if __name__ == "__main__":
    sys.exit(main())
