"""The embedded task, and any parquet file of verl's schema whose answers are numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpo_latent.data.rows import read_verl_parquet
from grpo_latent.eval.benchmarks.protocol import Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register


def read(file: Path) -> Iterator[BenchmarkItem]:
    """Yields the rows that have an answer; raises `DataError`."""
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


DIGITS = register(
    Benchmark(
        "digits",
        "`python -m grpo_latent.data.embedded.digits --out data`",
        files=("heldout.parquet", "*.parquet"),
        columns=("data_source", "prompt", "images", "reward_model"),
        read=read,
    )
)
