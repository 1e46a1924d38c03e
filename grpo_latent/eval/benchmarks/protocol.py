"""What a benchmark is, and what a question of one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import ConfigError
from grpo_latent.eval.graders import Grade, grade

HUB = "`hf download --repo-type dataset"  # how a published benchmark is got; never by us


@dataclass(frozen=True)
class PublishedGrade:
    """How the authors of a paper count a completion, beside our strict grader.

    Attributes:
        grade: (completion, item) -> whether they count it as right.
        sees_special_tokens: whether they read the decoded text with delimiters, placeholders and
            EOS in it.
    """

    grade: Callable[[str, BenchmarkItem], bool]
    sees_special_tokens: bool = False


@dataclass(frozen=True)
class BenchmarkItem:
    """One question. A benchmark that grades in another way subclasses it.

    Attributes:
        benchmark: the `name` of its `Benchmark`.
        item_id: unique in its benchmark.
        group_id: what is scored together (an MMVP pair, an HRBench question over its cycled
            options), else `item_id`.
        category: subset or category of the publication, "" where there is none.
        messages: contents are lists of {"type": "text", "text"} and {"type": "image"} in order.
        images: in the order of the images in `messages`.
        options: texts in the order of their letters; empty where the answer is a number.
        answer: the right letter, or the number.
        question: its words as published, which a preset asks in another form.
        published: how the authors of a preset count; None without one.
    """

    benchmark: str
    item_id: str
    group_id: str
    category: str
    messages: tuple[dict, ...]
    images: tuple[ImageRef, ...]
    options: tuple[str, ...]
    answer: str
    question: str = ""
    published: PublishedGrade | None = None

    def grade(self, completion: str) -> Grade:
        """Grades a completion strictly; raises `DataError` where the answer fits no option."""
        return grade(completion, self.options, self.answer)

    @property
    def chance(self) -> float:
        """Accuracy of guessing an option; 0 for numbers."""
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read: row by row by `parse`, or a file at once by `read`.

    Attributes:
        name: what `data.benchmark.name` says, and `BenchmarkItem.benchmark`.
        source: the command that gets its files, for messages.
        files: globs below its folder, the first that finds something counts.
        columns: which each row must have.
        spellings: other published names of columns -> the one of `columns`.
        parse: (row, where, file) -> item, of a row of a .parquet, .json, .jsonl, .csv or .tsv
            file; what it raises at a value of another type is reported as a malformed row.
        read: file -> items, for files whose reader checks them itself.
        corrections: row's id -> letter, where a published label is known to be wrong; for
            `data.benchmark.labels=corrected`.
        corrections_note: who found them, for the report.
        group_size: rows of each group, where its score is not defined for fewer; None where groups
            may differ. Groups of two are reported as pairs.

    Raises:
        ConfigError: not just one of `parse` and `read`.
    """

    name: str
    source: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    parse: Callable[[dict, str, Path], BenchmarkItem] | None = None
    read: Callable[[Path], Iterator[BenchmarkItem]] | None = None
    corrections: Mapping[str, str] = field(default_factory=dict)
    corrections_note: str = ""
    group_size: int | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("parse", "read") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "a benchmark has one reader",
                where=f"benchmark {self.name}",
                got=given,
                expected="parse or read",
            )

    @property
    def schema(self) -> str:
        return f"{' or '.join(self.files)} with columns {', '.join(self.columns)}"
