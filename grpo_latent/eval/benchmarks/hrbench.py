"""HR-Bench (2408.15556): images in 4k and 8k, each question over rotated options."""

from __future__ import annotations

import hashlib
from pathlib import Path

from grpo_latent.eval.benchmarks.choices import choice_item, required, stored_base64
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one rotation of a question; raises `DataError`."""
    image = stored_base64(row["image"], f"{where}: image")
    options = [required(row[letter], f"{where}: {letter}") for letter in "ABCD"]
    question = required(row["question"], f"{where}: question")
    # each question comes four times with its options rotated; other questions may have its words,
    # of another image
    image_digest = hashlib.blake2b(image.read_bytes(), digest_size=8).hexdigest()
    return choice_item(
        "hrbench",
        f"{file.stem}/{required(row['index'], f'{where}: index')}",
        group_id=f"{file.stem}: {row['category']}: {question} {image_digest}",
        category=row["category"],
        question=question,
        images=[image],
        options=options,
        answer=row["answer"],
        where=where,
    )


HRBENCH = register(
    Benchmark(
        "hrbench",
        f"{HUB} DreamMr/HR-Bench`",
        files=("hr_bench_*.parquet", "hr_bench_*.tsv"),
        columns=("index", "question", "A", "B", "C", "D", "answer", "category", "image"),
        parse=parse,
    )
)
