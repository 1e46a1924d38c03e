"""Readers of benchmarks from local files, in their published schemas; nothing is downloaded.

One file a benchmark or family, which registers itself:

    name       file                                         schema
    mmvp       Questions.csv + "MMVP Images/<Index>.jpg"    mmvp.py
    vstar      test_questions.jsonl + images                vstar.py
    blink      <subset>/val-*.parquet                       blink.py
    hrbench    hr_bench_{4k,8k}.{parquet,tsv}               hrbench.py
    mme_realworld  mme_realworld_lite.tsv, …            mme_realworld.py
    comt       TEST.jsonl + images                      comt.py
    m3cot      data/test-*.parquet, or test.jsonl + images  stepwise.py
    scienceqa  data/test-*.parquet                          stepwise.py
    digits     the embedded task, or any parquet of verl's  digits.py
               schema whose answers are numbers

Each row becomes a `BenchmarkItem`; graders see its options and answer. A missing or malformed file
raises `DataError` with the file, where it comes from and the expected columns.

To add one, write a file here that ends in `NAME = register(Benchmark(…))`, as `vstar.py` does; or
anywhere that Python can import a `Benchmark`, or a class of it without arguments, and evaluate
with `data.benchmark.name=package.module:NAME`. `presets.py` asks them as papers do.
"""

from grpo_latent.common.registry import import_folder
from grpo_latent.eval.benchmarks.loading import (
    LABELS,
    check_max_rows,
    first_items,
    load_benchmark,
)
from grpo_latent.eval.benchmarks.presets import PRESETS, Preset, find_preset
from grpo_latent.eval.benchmarks.protocol import Benchmark, BenchmarkItem, PublishedGrade
from grpo_latent.eval.benchmarks.registry import BENCHMARKS, find_benchmark, register

__all__ = [
    "BENCHMARKS",
    "LABELS",
    "PRESETS",
    "Benchmark",
    "BenchmarkItem",
    "Preset",
    "PublishedGrade",
    "check_max_rows",
    "find_benchmark",
    "find_preset",
    "first_items",
    "load_benchmark",
    "register",
]

import_folder(__name__, __path__)
