"""CoMT (2412.12932) as ILVR publishes it: records in which only question and answer are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.answers import same_answer
from grpo_latent.data.formats.ilvr_jsonl import read_ilvr_jsonl
from grpo_latent.eval.benchmarks.protocol import HUB, Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import register
from grpo_latent.eval.graders import Grade, committed_answer


@dataclass(frozen=True)
class WordedItem(BenchmarkItem):
    """A question whose options, if it has any, stand in its text."""

    def grade(self, completion: str) -> Grade:
        answer = committed_answer(completion)
        if answer is None:
            return Grade(False, None, "unparsed: the completion commits to no single answer")
        is_right = same_answer(self.answer, answer)
        return Grade(is_right, answer, f"answered {answer}, truth {self.answer}")


def read(file: Path) -> Iterator[BenchmarkItem]:
    """Yields the rows that have an answer; raises `DataError`."""
    for index, example in enumerate(read_ilvr_jsonl(file, reads_plan=False)):
        if not example.has_answer:
            continue
        texts = [part.get("text", "") for part in example.messages[0]["content"]]
        yield WordedItem(
            "comt",
            str(index),
            str(index),
            "",
            example.messages,
            example.images,
            (),
            example.answer,
            "".join(texts),
        )


COMT = register(
    Benchmark(
        "comt",
        f"{HUB} shuai22/comt`",
        files=("TEST.jsonl",),
        columns=("text_input", "image_input", "original_final_answer"),
        read=read,
    )
)
