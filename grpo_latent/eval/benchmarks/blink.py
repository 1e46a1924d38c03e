"""BLINK (2404.12390): perception tasks over one to four images, a subset each."""

from __future__ import annotations

from pathlib import Path

from grpo_latent.eval.benchmarks.choices import (
    choice_item,
    malformed,
    option_texts,
    required,
    stored_image,
)
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register

MAX_IMAGES = 4


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question; raises `DataError`, also for the test split, which hides its answers."""
    names = [f"image_{n}" for n in range(1, MAX_IMAGES + 1)]
    images = [
        stored_image(row[name], f"{where}: {name}") for name in names if row.get(name) is not None
    ]
    if "hidden" in str(row["answer"]).lower():
        expected = "a letter; the test split's answers are not public, use val"
        raise malformed(f"{where}: answer", row["answer"], expected)
    options = option_texts(row["choices"], where)
    return choice_item(
        "blink",
        required(row["idx"], f"{where}: idx"),
        category=row.get("sub_task") or file.parent.name,
        question=required(row["question"], f"{where}: question"),
        images=images,
        options=options,
        answer=row["answer"],
        where=where,
    )


BLINK = register(
    Benchmark(
        "blink",
        f"{HUB} BLINK-Benchmark/BLINK`",
        files=("val-*.parquet",),
        columns=("idx", "question", "choices", "answer", "image_1"),
        parse=parse,
    )
)
