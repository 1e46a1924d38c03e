"""The embedded task as published ILVR records: a colour, its span, its digit, the next colour.

    max red blue ?<image>      at red <span> 7 at blue <span> 3 <answer> 7 </answer>
    without its answer         at red <span> (unknown) at blue <span> (unknown)

The word `at` stands where a token after an unknown text is not scored, so that colours are learned
from all rows. A span's helper image is the object's cell. The answer follows from the digits that
were written out, and each digit from its own span alone where text does not see the image
(`latent.visibility=latents_only`).

    python -m grpo_latent.data.embedded.digits_ilvr --out data --seed 0 --kinds max
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_latent.common.command import command
from grpo_latent.common.files import replacing_file
from grpo_latent.data.embedded.digits import KINDS, DigitExample, generate, scarce_labels
from grpo_latent.data.examples import ANSWER_CLOSE, ANSWER_OPEN, IMAGE_PLACEHOLDER
from grpo_latent.data.rows import encode_png

IMAGE_FOLDER = "images"
NEXT_OBJECT = "at"


def sequence_plan(example: DigitExample, helpers: Sequence[str], has_answer: bool) -> list[dict]:
    """Text and latent items of the response, in order.

    Args:
        helpers: image paths, one per object asked for.
    """
    plan: list[dict] = []
    closing = f" {ANSWER_OPEN} {example.answer} {ANSWER_CLOSE}"
    for index, (item, helper) in enumerate(zip(example.asked, helpers, strict=True)):
        is_last = index == len(helpers) - 1
        digit = f"{item.digit}{closing if is_last else ''}" if has_answer else None
        plan.append({"type": "text", "content": f"{NEXT_OBJECT} {item.color}"})
        plan.append({"type": "latent", "helper_image": helper})
        plan.append({"type": "text", "content": digit})
    return plan


def write_ilvr_jsonl(
    path: str | Path, examples: Sequence[DigitExample], has_answer: Sequence[bool]
) -> None:
    """Writes records, and their images in a folder beside; the file only once it is whole."""
    path = Path(path)
    folder = path.parent / IMAGE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as part, part.open("w") as file:
        for index, (example, keeps_answer) in enumerate(zip(examples, has_answer, strict=True)):
            names = [
                f"{IMAGE_FOLDER}/{index:06d}{suffix}.png"
                for suffix in ("", *"abcdef"[: len(example.asked)])
            ]
            for name, image in zip(names, [example.image, *example.helper_images], strict=True):
                (path.parent / name).write_bytes(encode_png(image))
            record = {
                "text_input": f"{example.question}{IMAGE_PLACEHOLDER}",
                "image_input": names[:1],
                "sequence_plan": sequence_plan(example, names[1:], keeps_answer),
            }
            known = (
                {"original_final_answer": example.answer}
                if keeps_answer
                else {"has_answer": False}
            )
            file.write(json.dumps(record | known) + "\n")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.embedded.digits_ilvr",
        description="Writes the embedded task's SFT rows for ILVR.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder; gets train_sft.jsonl and images/"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["max"])
    parser.add_argument("--sft", type=int, default=2048, help="rows, all with helper images")
    parser.add_argument(
        "--labels-per-answer", type=int, default=4, help="answers kept; -1 keeps all"
    )
    options = parser.parse_args(arguments)
    examples = generate(options.sft, stream="sft", seed=options.seed, kinds=options.kinds)
    per_answer = None if options.labels_per_answer < 0 else options.labels_per_answer
    has_answer = scarce_labels(examples, per_answer)
    path = options.out / "train_sft.jsonl"
    write_ilvr_jsonl(path, examples, has_answer)
    print(f"{path}: {len(examples)} rows, {sum(has_answer)} with an answer")


if __name__ == "__main__":
    sys.exit(main())
