"""V* Bench (2312.14135): small objects in large photographs."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_latent.eval.benchmarks.choices import choice_item, image_file, malformed, required
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register
from grpo_latent.eval.graders import LETTERS

_OPTION = re.compile(r"^\(([A-Z])\)\s*(.*?)\s*$", re.MULTILINE)


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question, its options taken from its text; raises `DataError`."""
    text, image = (required(row[name], f"{where}: {name}") for name in ("text", "image"))
    question_id = required(row["question_id"], f"{where}: question_id")
    category = row["category"] or ""
    options = _OPTION.findall(text)
    if [letter for letter, _ in options] != list(LETTERS[: len(options)]) or len(options) < 2:
        raise malformed(f"{where}: text", text, 'lines "(A) <option>", in order')
    return choice_item(
        "vstar",
        f"{category}/{question_id}",
        category=category,
        question=text,
        prompt=text,  # it ends in options and instruction already
        images=[image_file(file.parent, (".",), image, where)],
        options=[text for _, text in options],
        answer=row["label"],
        where=where,
    )


VSTAR = register(
    Benchmark(
        "vstar",
        f"{HUB} craigwu/vstar_bench`",
        files=("test_questions.jsonl",),
        columns=("image", "text", "category", "label", "question_id"),
        parse=parse,
    )
)
