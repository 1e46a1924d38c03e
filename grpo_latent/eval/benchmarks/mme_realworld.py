"""MME-RealWorld and -Lite (2408.13257): five options over large photographs, E among them "none".

Read from the tables that are published: the .tsv (options as a list that is written as text), the
.json of VLMEvalKit's repository, and the .parquet of lmms-eval's, whose image is in `bytes`.
"""

from __future__ import annotations

import re
from pathlib import Path

from grpo_latent.eval.benchmarks.choices import (
    choice_item,
    malformed,
    option_texts,
    required,
    stored_base64,
)
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register

OPTIONS = "multi-choice options"
INTRODUCTION = "The choices are listed below:"
INSTRUCTION = (
    "Select the best answer to the above multiple-choice question based on the image. Respond "
    "with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is:"
)
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*)", re.DOTALL)


def parse(row: dict, where: str, file: Path) -> BenchmarkItem:
    """Reads one question; raises `DataError`."""
    given = row[OPTIONS]
    if isinstance(given, str) and given.lstrip().startswith(INTRODUCTION):
        given = given.strip().splitlines()[1:]  # as VLMEvalKit writes its own table
    lettered = [_OPTION.fullmatch(text.strip()) for text in option_texts(given, where)]
    found = [match.groups() for match in lettered if match is not None]
    letters = "".join(letter for letter, _ in found)
    options = [text.strip() for _, text in found]
    if len(found) < len(lettered) or letters != "ABCDE"[: len(letters)] or not all(options):
        raise malformed(f"{where}: {OPTIONS}", row[OPTIONS], '"(A) <text>", "(B) <text>", …')
    question = required(row["question"], f"{where}: question")
    lines = [f"({letter}) {text}" for letter, text in zip(letters, options, strict=True)]
    task = "Perception" if "perception" in str(row["category"]).lower() else "Reasoning"
    return choice_item(
        "mme_realworld",
        required(row["index"], f"{where}: index"),
        category=f"{task}/{str(row['category']).rsplit('/', 1)[-1]}",
        question=question,
        prompt="\n".join([f"{question} {INTRODUCTION}", *lines, INSTRUCTION]),
        images=[stored_base64(row["image"], f"{where}: image")],
        options=options,
        answer=row["answer"],
        where=where,
    )


MME_REALWORLD = register(
    Benchmark(
        "mme_realworld",
        f"{HUB} yifanzhang114/MME-RealWorld-Base64`",
        files=("mme_realworld*.tsv", "MME-RealWorld*.tsv", "MME-RealWorld*/*.json", "*.parquet"),
        columns=("index", "question", OPTIONS, "answer", "category", "image"),
        parse=parse,
        spellings={"bytes": "image"},
    )
)
