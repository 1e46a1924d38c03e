"""Readers of benchmarks from local files, in the schemas in which they were published. Nothing is
downloaded.

    name       file                                        columns
    mmvp       Questions.csv + "MMVP Images/<Index>.jpg"    Index, Question, Options, Correct Answer
    vstar      test_questions.jsonl + images               image, text, category, label, question_id
    blink      <subset>/val-*.parquet                      idx, question, choices, answer, image_1 … image_4
    hrbench    hr_bench_{4k,8k}.{parquet,tsv}              index, question, A, B, C, D, answer, category, image (base64)
    m3cot      data/test-*.parquet, or test.jsonl + images  id, question, choices, context, answer, image
    scienceqa  data/test-*.parquet                         question, choices, answer (index), hint, image
    digits     the embedded task, or any parquet of verl's  data_source, prompt, images, reward_model
               schema whose answers are numbers

m3cot and scienceqa are asked in the form that IVT-LR is trained with (`data.stepwise`), which asks
for no form of answer; the other choice questions end with `INSTRUCTION`.

Each row becomes a `BenchmarkItem`; graders see its options and answer. A missing or malformed file
raises `DataError` with the file, where it comes from and the expected columns.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.data.examples import ImageRef
from grpo_latent.data.formats.stepwise import ChoiceQuestion, m3cot_question, scienceqa_question
from grpo_latent.data.rows import read_verl_parquet
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.graders import LETTERS, Grade, grade

INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class BenchmarkItem:
    """One question.

    Attributes:
        item_id: unique in its benchmark.
        group_id: what is scored together (an MMVP pair, an HRBench question over its cycled
            options), else `item_id`.
        category: subset or category of the publication, "" where there is none.
        messages: contents are lists of {"type": "text", "text"} and {"type": "image"} in order.
        images: in the order of the image parts.
        options: texts in the order of their letters; empty where the answer is a number.
        answer: the right letter, or the number.
    """

    benchmark: str
    item_id: str
    group_id: str
    category: str
    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    options: tuple[str, ...]
    answer: str

    def grade(self, completion: str) -> Grade:
        return grade(completion, self.options, self.answer)

    @property
    def chance(self) -> float:
        """Accuracy of guessing an option; 0 for numbers."""
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read.

    Attributes:
        files: globs below its folder.
        parse: (row, where, file) -> item.
        group_size: rows of each group, where its score is not defined for fewer; None where groups
            may differ.
    """

    name: str
    source: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    parse: Callable[[dict, str, Path], BenchmarkItem] | None = None
    group_size: int | None = None

    @property
    def schema(self) -> str:
        return f"{' or '.join(self.files)} with columns {', '.join(self.columns)}"


def load_benchmark(name: str, path: str | Path, subset: str | None = None) -> list[BenchmarkItem]:
    """The items of a benchmark, in file order.

    Args:
        name: key of `BENCHMARKS`.
        path: its folder as downloaded, or one of its files (images are then sought beside it).
        subset: only this category, such as BLINK's `Counting` or V*'s `relative_position`.

    Raises:
        ConfigError: unknown benchmark.
        DataError: no such file, a malformed row, equal ids, a pair of which a half is missing, or
            no row of the subset.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            "unknown benchmark",
            where="benchmark",
            got=name,
            expected=f"one of {sorted(BENCHMARKS)}",
        )
    benchmark, path = BENCHMARKS[name], Path(path)
    items: list[BenchmarkItem] = []
    for file in _find_files(benchmark, path, subset):
        items += [
            item
            for item in _read_file(benchmark, file)
            if subset is None or item.category == subset
        ]
    if not items:
        raise _problem(
            benchmark,
            str(path),
            "no rows" if subset is None else f"no rows of subset {subset!r}",
            subset,
        )
    if len({item.item_id for item in items}) != len(items):
        raise _problem(benchmark, str(path), "two rows have one id", "val and test files mixed?")
    sizes = Counter(item.group_id for item in items)
    if benchmark.group_size is not None and set(sizes.values()) != {benchmark.group_size}:
        found = {group: size for group, size in sizes.items() if size != benchmark.group_size}
        got = dict(list(found.items())[:5])
        raise _problem(
            benchmark,
            str(path),
            f"not {benchmark.group_size} rows a group",
            f"rows by group: {got}",
        )
    return items


def first_items(
    items: Sequence[BenchmarkItem], max_rows: int | None, where: str = "data.max_rows"
) -> list[BenchmarkItem]:
    """The first `max_rows` items, or all: asked before anything is decoded.

    Scores are of groups as a whole (both questions of an MMVP pair, all rotations of an HRBench
    question), so a part of one must not be left out.

    Raises:
        ConfigError: the cut goes through a group, or leaves nothing.
    """
    check_max_rows(max_rows, where)
    if max_rows is None or max_rows >= len(items):
        return list(items)
    last = {item.group_id: index for index, item in enumerate(items)}
    whole, end = [], 0  # numbers of rows that cut no group
    for index, item in enumerate(items):
        end = max(end, last[item.group_id])
        if end == index:
            whole.append(index + 1)
    if max_rows not in whole:
        below = [str(size) for size in whole if size < max_rows][-1:]
        above = [str(size) for size in whole if size > max_rows][:1]
        raise ConfigError(
            "rows of one question would be cut apart",
            where=where,
            got=max_rows,
            expected=" or ".join(below + above) + f", or null for all {len(items)} rows",
        )
    return list(items[:max_rows])


def check_max_rows(max_rows: object, where: str = "data.max_rows") -> None:
    """Raises `ConfigError` unless it is None or a count."""
    if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
        raise ConfigError(
            "not a number of rows", where=where, got=max_rows, expected="int >= 1, or null for all"
        )


def _find_files(benchmark: Benchmark, path: Path, subset: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    for pattern in benchmark.files:
        found = sorted(path.glob(f"**/{pattern}")) if path.is_dir() else []
        if found:
            # BLINK keeps each subset in a folder of its own name
            own = [file for file in found if subset is not None and subset in file.parts]
            return own or found
    listing = (
        sorted(entry.name for entry in path.iterdir())[:10] if path.is_dir() else "no such folder"
    )
    raise _problem(benchmark, str(path), f"no file of benchmark {benchmark.name}", listing)


def _problem(benchmark: Benchmark, where: str, what: str, got: object) -> DataError:
    return DataError(
        what,
        where=where,
        got=got,
        expected=benchmark.schema,
        fix=f"Get it with {benchmark.source} and pass its folder.",
    )


def _read_file(benchmark: Benchmark, file: Path) -> Iterator[BenchmarkItem]:
    if benchmark.parse is None:
        yield from _verl_items(file)
        return
    index = -1
    try:
        for index, row in enumerate(_rows(file)):
            where = f"{file} row {index}"
            missing = [column for column in benchmark.columns if column not in row]
            if missing:
                raise _problem(
                    benchmark,
                    where,
                    f"columns {missing} are missing",
                    f"columns {sorted(map(str, row))}",
                )
            yield benchmark.parse(row, where, file)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        what = f"not a readable {file.suffix} file"
        raise _problem(
            benchmark, f"{file} after row {index}", what, f"{type(error).__name__}: {error}"
        ) from error
    except (TypeError, AttributeError, LookupError) as error:  # a value of another type, or none
        got = f"{type(error).__name__}: {error}"
        raise _problem(benchmark, f"{file} row {index}", "malformed row", got) from error


def _rows(file: Path) -> Iterable[dict]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    elif file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else {}
    else:
        csv.field_size_limit(1 << 30)  # HRBench keeps 8k images as text
        with open(file, encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")


# ---- one parser a benchmark
# -----------------------------------------------------------------------------------------


def _mmvp(row: dict, where: str, file: Path) -> BenchmarkItem:
    index = _integer(row["Index"], f"{where}: Index")
    options = re.findall(
        r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|\Z)", row["Options"] or "", re.DOTALL
    )
    if [letter for letter, _ in options] != ["a", "b"] or not all(text for _, text in options):
        raise _bad(f"{where}: Options", row["Options"], '"(a) <text> (b) <text>"')
    return _item(
        "mmvp",
        str(index),
        f"pair {(index + 1) // 2}",  # rows 1 and 2 ask one question about two images, and so on
        "",
        _options_prompt(row["Question"], [text for _, text in options]),
        [_image_file(file.parent, ("MMVP Images", "images", "."), f"{index}.jpg", where)],
        [text for _, text in options],
        row["Correct Answer"],
        where,
    )


def _vstar(row: dict, where: str, file: Path) -> BenchmarkItem:
    options = re.findall(r"^\(([A-Z])\)\s*(.*?)\s*$", row["text"], re.MULTILINE)
    if [letter for letter, _ in options] != list(LETTERS[: len(options)]) or len(options) < 2:
        raise _bad(f"{where}: text", row["text"], 'lines "(A) <option>", in order')
    # its text ends in options and instruction already
    image = _image_file(file.parent, (".",), row["image"], where)
    texts = [text for _, text in options]
    item_id = str(row["question_id"])
    category = row["category"]
    return _item(
        "vstar",
        f"{category}/{item_id}",
        None,
        category,
        row["text"],
        [image],
        texts,
        row["label"],
        where,
    )


def _blink(row: dict, where: str, file: Path) -> BenchmarkItem:
    images = [row.get(f"image_{n}") for n in range(1, 5)]
    images = [
        _stored_image(image, f"{where}: image_{n}")
        for n, image in enumerate(images, 1)
        if image is not None
    ]
    category = row.get("sub_task") or file.parent.name
    if "hidden" in str(row["answer"]).lower():
        raise _bad(
            f"{where}: answer",
            row["answer"],
            "a letter; the test split's answers are not public, use val",
        )
    prompt = _options_prompt(row["question"], row["choices"])
    return _item(
        "blink",
        str(row["idx"]),
        None,
        category,
        prompt,
        images,
        row["choices"],
        row["answer"],
        where,
    )


def _hrbench(row: dict, where: str, file: Path) -> BenchmarkItem:
    try:
        data = base64.b64decode(row["image"] or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise _bad(f"{where}: image", str(row["image"])[:40], f"base64 ({error})") from error
    if not data:
        raise _bad(f"{where}: image", row["image"], "base64 of an image")
    options = [str(row[letter]) for letter in "ABCD"]
    prompt, image = (
        _options_prompt(row["question"], options),
        ImageRef(f"{where}: image", data=data),
    )
    # each question comes four times with its options rotated; other questions may have its words,
    # of another image
    group = (
        f"{row['category']}: {row['question']} {hashlib.blake2b(data, digest_size=8).hexdigest()}"
    )
    return _item(
        "hrbench",
        f"{file.stem}/{row['index']}",
        f"{file.stem}: {group}",
        row["category"],
        prompt,
        [image],
        options,
        row["answer"],
        where,
    )


def _m3cot(row: dict, where: str, file: Path) -> BenchmarkItem:
    if isinstance(row["image"], str):  # the jsonl names a file
        image = _image_file(file.parent, ("images", "."), row["image"], where)
        row = row | {"image": {"bytes": image.read_bytes()}}
    return _choice_item("m3cot", str(row["id"]), row.get("domain"), m3cot_question(row, where))


def _scienceqa(row: dict, where: str, file: Path) -> BenchmarkItem:
    item_id = where.rsplit(" ", 1)[-1] if row.get("id") is None else str(row["id"])
    return _choice_item("scienceqa", item_id, row.get("subject"), scienceqa_question(row, where))


def _choice_item(
    benchmark: str, item_id: str, category: str | None, question: ChoiceQuestion
) -> BenchmarkItem:
    """Asked as in training."""
    return BenchmarkItem(
        benchmark,
        item_id,
        item_id,
        category or "",
        question.messages,
        question.images,
        question.choices,
        question.answer,
    )


def _verl_items(file: Path) -> Iterator[BenchmarkItem]:
    for index, example in enumerate(read_verl_parquet(file)):
        if not example.has_answer:
            continue
        yield BenchmarkItem(
            "digits",
            str(index),
            str(index),
            example.data_source,
            example.messages,
            example.images,
            (),
            example.answer,
        )


# ---- parts of a row
# -------------------------------------------------------------------------------------------------


def _item(
    benchmark, item_id, group_id, category, prompt, images, options, answer, where
) -> BenchmarkItem:
    options = [str(option) for option in options or []]
    letter = str(answer).strip().strip("()").upper()
    if len(options) < 2:
        raise _bad(f"{where}: choices", options, "two options or more")
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise _bad(f"{where}: answer", answer, f"one of {', '.join(LETTERS[: len(options)])}")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    message = {"role": "user", "content": content}
    return BenchmarkItem(
        benchmark,
        item_id,
        group_id or item_id,
        str(category or ""),
        (message,),
        tuple(images),
        tuple(options),
        letter,
    )


def _options_prompt(question: str, options: Iterable[str]) -> str:
    lines = [f"({LETTERS[i]}) {option}" for i, option in enumerate(options or [])]
    return "\n".join([str(question).strip(), *lines, INSTRUCTION])


def _bad(where: str, got: object, expected: str) -> DataError:
    return DataError(
        "malformed row", where=where, got=got, expected=expected, fix="Download the file again."
    )


def _integer(value: object, where: str) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise _bad(where, value, "an integer") from error


def _image_file(folder: Path, places: tuple[str, ...], name: str, where: str) -> ImageRef:
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


def _stored_image(image: object, where: str) -> ImageRef:
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise _bad(where, type(image).__name__, '{"bytes": <file content>, "path": ...}')
    return ImageRef(where, data=image["bytes"])


_DOWNLOAD = "`hf download --repo-type dataset"
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mmvp",
            f"{_DOWNLOAD} MMVP/MMVP`",
            ("Questions.csv",),
            ("Index", "Question", "Options", "Correct Answer"),
            _mmvp,
            group_size=2,
        ),
        Benchmark(
            "vstar",
            f"{_DOWNLOAD} craigwu/vstar_bench`",
            ("test_questions.jsonl",),
            ("image", "text", "category", "label", "question_id"),
            _vstar,
        ),
        Benchmark(
            "blink",
            f"{_DOWNLOAD} BLINK-Benchmark/BLINK`",
            ("val-*.parquet",),
            ("idx", "question", "choices", "answer", "image_1"),
            _blink,
        ),
        Benchmark(
            "hrbench",
            f"{_DOWNLOAD} DreamMr/HR-Bench`",
            ("hr_bench_*.parquet", "hr_bench_*.tsv"),
            ("index", "question", "A", "B", "C", "D", "answer", "category", "image"),
            _hrbench,
        ),
        Benchmark(
            "m3cot",
            f"{_DOWNLOAD} LightChen2333/M3CoT`",
            ("test-*.parquet", "test.jsonl"),
            ("id", "question", "choices", "answer", "image"),
            _m3cot,
        ),
        Benchmark(
            "scienceqa",
            f"{_DOWNLOAD} derek-thomas/ScienceQA`",
            ("test-*.parquet",),
            ("question", "choices", "answer", "image"),
            _scienceqa,
        ),
        Benchmark(
            "digits",
            "`python -m grpo_latent.data.embedded.digits --out data`",
            ("heldout.parquet", "*.parquet"),
            ("data_source", "prompt", "images", "reward_model"),
        ),
    )
}
