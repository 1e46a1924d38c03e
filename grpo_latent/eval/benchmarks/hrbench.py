"""HR-Bench (2408.15556): images in 4k and 8k, each question over rotated options."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

from grpo_latent.data.examples import ImageRef
from grpo_latent.eval.benchmarks.choices import choice_item, malformed, options_prompt, required
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one rotation of a question; raises `DataError`."""
    try:
        data = base64.b64decode(row["image"] or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise malformed(f"{where}: image", str(row["image"])[:40], f"base64 ({error})") from error
    if not data:
        raise malformed(f"{where}: image", row["image"], "base64 of an image")
    options = [required(row[letter], f"{where}: {letter}") for letter in "ABCD"]
    question = required(row["question"], f"{where}: question")
    # each question comes four times with its options rotated; other questions may have its words,
    # of another image
    image_digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return choice_item(
        "hrbench",
        f"{file.stem}/{required(row['index'], f'{where}: index')}",
        group_id=f"{file.stem}: {row['category']}: {question} {image_digest}",
        category=row["category"],
        prompt=options_prompt(question, options),
        images=[ImageRef(f"{where}: image", data=data)],
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
