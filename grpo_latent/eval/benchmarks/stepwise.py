"""M3CoT (2405.16473) and ScienceQA (2209.09513), in the form that IVT-LR is trained with.

That form (`data.formats.stepwise`) asks for no form of answer, where other choice questions end
with `INSTRUCTION`.
"""

from __future__ import annotations

from pathlib import Path

from grpo_latent.data.formats.stepwise import ChoiceQuestion, m3cot_question, scienceqa_question
from grpo_latent.eval.benchmarks.choices import image_file, required
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register


def parse_m3cot(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question; raises `DataError`."""
    if isinstance(row["image"], str):  # the jsonl names a file
        image = image_file(file.parent, ("images", "."), row["image"], where)
        row = row | {"image": {"bytes": image.read_bytes()}}
    return _item(
        "m3cot", required(row["id"], f"{where}: id"), row.get("domain"), m3cot_question(row, where)
    )


def parse_scienceqa(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question; raises `DataError`."""
    # the hub's parquet has no ids: the row's number in the file stands for one
    item_id = where.rsplit(" ", 1)[-1] if row.get("id") is None else str(row["id"])
    return _item("scienceqa", item_id, row.get("subject"), scienceqa_question(row, where))


def _item(
    benchmark: str, item_id: str, category: str | None, question: ChoiceQuestion
) -> BenchmarkItem:
    return BenchmarkItem(
        benchmark,
        item_id,
        item_id,
        category or "",
        question.messages,
        question.images,
        question.choices,
        question.answer,
        question.question,
    )


M3COT = register(
    Benchmark(
        "m3cot",
        f"{HUB} LightChen2333/M3CoT`",
        files=("test-*.parquet", "test.jsonl"),
        columns=("id", "question", "choices", "answer", "image"),
        parse=parse_m3cot,
    )
)
SCIENCEQA = register(
    Benchmark(
        "scienceqa",
        f"{HUB} derek-thomas/ScienceQA`",
        files=("test-*.parquet",),
        columns=("question", "choices", "answer", "image"),
        parse=parse_scienceqa,
    )
)
