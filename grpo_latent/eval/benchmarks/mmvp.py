"""MMVP (2401.06209): pairs of images that CLIP takes for one, scored as a whole."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_latent.eval.benchmarks.choices import (
    choice_item,
    image_file,
    integer,
    malformed,
    required,
)
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register

_OPTIONS = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|\Z)", re.DOTALL)


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question of a pair; raises `DataError`."""
    index = integer(row["Index"], f"{where}: Index")
    lettered = _OPTIONS.findall(row["Options"] or "")
    options = [text for _, text in lettered]
    if [letter for letter, _ in lettered] != ["a", "b"] or not all(options):
        raise malformed(f"{where}: Options", row["Options"], '"(a) <text> (b) <text>"')
    return choice_item(
        "mmvp",
        str(index),
        group_id=f"pair {(index + 1) // 2}",  # rows 1 and 2 ask one question about two images, …
        question=required(row["Question"], f"{where}: Question"),
        images=[image_file(file.parent, ("MMVP Images", "images", "."), f"{index}.jpg", where)],
        options=options,
        answer=row["Correct Answer"],
        where=where,
    )


MMVP = register(
    Benchmark(
        "mmvp",
        f"{HUB} MMVP/MMVP`",
        files=("Questions.csv",),
        columns=("Index", "Question", "Options", "Correct Answer"),
        parse=parse,
        group_size=2,
        corrections={"99": "B", "100": "A", "279": "B", "280": "A"},
        corrections_note="the labels of MMVP's rows 99/100 (tusks) and 279/280 (standing) are "
        "swapped in Questions.csv (tsb0601/MMVP#14 and #30, lmms-eval#1018); lmms-eval's own copy "
        "has them corrected",
        spellings={"lndex": "Index"},  # with a small L, as published readers ask for it
    )
)
