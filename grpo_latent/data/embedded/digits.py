"""The embedded task: handwritten digits, coloured, on a noisy grid; questions for one or two.

An image has 4 x 4 cells of 14 pixels and six digits of different colours. A 14-pixel cell is one
merged visual token of a model with 7-pixel patches, so the box of an object is exactly one token.
Training and held-out images use disjoint scikit-learn digits (1297 and 500). One example serves
LVR (boxes), ILVR (helper images) and IVT-LR (step texts):

    question  read red ?                      answer  7
    boxes     [(0.518, 0.25, 0.732, 0.464)]   steps   ["red at r1 c2 is 7"]

    python -m grpo_latent.data.embedded.digits --out data --seed 0

With `--wrong-boxes 3` SFT's boxes for three colours are those of the next colour in the image; no
answer and no other file's box changes; `extra_info.box_is_wrong` marks what asks for the three.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo_latent.common.command import command
from grpo_latent.common.settings import check_choice
from grpo_latent.data.embedded.drawing import (
    CELL,
    COLOR_NAMES,
    COLORS,
    DIGIT_SIZE,
    GRID,
    IMAGE_SIZE,
    JITTER,
    NO_COLOR,
    NO_DIGIT,
    NUM_CELLS,
    compose,
    digit_images,
)
from grpo_latent.data.examples import response_template
from grpo_latent.data.rows import encode_png, verl_row, write_verl_parquet

DATA_SOURCE = "digits"
# kind -> (number of objects asked for, answer from their digits)
KINDS: dict[str, tuple[int, Callable[[Sequence[int]], int]]] = {
    "read": (1, lambda digits: digits[0]),
    "sum": (2, sum),
    "max": (2, max),
}
# all words of questions and step texts; numbers and answer tags are the tokenizer's own
WORDS = (
    *KINDS,
    "?",
    *COLOR_NAMES,
    "at",
    "is",
    *(f"r{row}" for row in range(GRID)),
    *(f"c{column}" for column in range(GRID)),
)

# purpose -> (index in the seed sequence, whether it draws from the training digits)
STREAMS = {
    "sft": (0, True),
    "rl": (1, True),
    "pretrain": (2, True),
    "dev": (3, False),
    "heldout": (4, False),
}
NUM_OBJECTS = 6  # of different colours, those that the question asks for among them
FORMS = ("latent", "direct", "text_boxes")
WRONG_BOX = "box_is_wrong"  # mark of rows
EVAL_SEED = 4242  # of dev and held-out rows, whatever the run's seed: runs stay comparable


@dataclass(frozen=True)
class DigitObject:
    """One digit; `box` in pixels (x0, y0, x1, y1), x1 and y1 exclusive."""

    color: str
    digit: int
    row: int
    column: int
    box: tuple[int, int, int, int]

    @property
    def box_normalised(self) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = self.box
        return x0 / IMAGE_SIZE, y0 / IMAGE_SIZE, x1 / IMAGE_SIZE, y1 / IMAGE_SIZE

    @property
    def step(self) -> str:
        return f"{self.color} at r{self.row} c{self.column} is {self.digit}"

    @property
    def short_step(self) -> str:
        return f"{self.color} is {self.digit}"


@dataclass(frozen=True, eq=False)
class DigitExample:
    """An image with a question.

    Attributes:
        image: uint8 [56, 56, 3].
        objects: those that the question asks for come first.
    """

    image: np.ndarray
    kind: str
    objects: tuple[DigitObject, ...]

    @property
    def asked(self) -> tuple[DigitObject, ...]:
        return self.objects[: KINDS[self.kind][0]]

    @property
    def question(self) -> str:
        return " ".join([self.kind, *(item.color for item in self.asked), "?"])

    @property
    def answer(self) -> str:
        return str(KINDS[self.kind][1]([item.digit for item in self.asked]))

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Normalised boxes of the objects asked for."""
        return [item.box_normalised for item in self.asked]

    def boxed(self, wrong_colors: Sequence[str]) -> list[DigitObject]:
        """As `asked`; for an object of a wrong colour, that of the next colour in the image."""
        return [self._next(item) if item.color in wrong_colors else item for item in self.asked]

    def _next(self, asked: DigitObject) -> DigitObject:
        """The object whose colour follows in `COLOR_NAMES`, the first one after the last."""
        others = [item for item in self.objects if item is not asked]
        start = COLOR_NAMES.index(asked.color)
        return min(others, key=lambda item: (COLOR_NAMES.index(item.color) - start) % len(COLORS))

    @property
    def steps(self) -> list[str]:
        return [item.step for item in self.asked]

    @property
    def helper_images(self) -> list[np.ndarray]:
        """Cells of the objects asked for, uint8 [14, 14, 3].

        Each is one merged visual token, close to the image's own there.
        """
        corners = [(item.row * CELL, item.column * CELL) for item in self.asked]
        return [self.image[y : y + CELL, x : x + CELL] for y, x in corners]


def stream_rng(stream: str, seed: int) -> np.random.Generator:
    """Makes the generator of one purpose; two streams of one seed are independent."""
    return np.random.default_rng(np.random.SeedSequence([STREAMS[stream][0], seed]))


def digit_pool(stream: str) -> np.ndarray:
    """Returns the indices of the scikit-learn digits that a stream may draw."""
    _, _, train, heldout = digit_images()
    return train if STREAMS[stream][1] else heldout


def generate(
    num: int, *, stream: str, seed: int, kinds: Sequence[str] = ("read",)
) -> list[DigitExample]:
    """Makes `num` examples, the same for the same arguments.

    Args:
        stream: key of `STREAMS`; decides whether training or held-out digits are drawn.
        kinds: drawn uniformly; keys of `KINDS`.

    Raises:
        ConfigError: unknown stream or kind.
    """
    choices: list[tuple[str, str, Collection[str]]] = [
        ("stream", stream, STREAMS),
        *(("kinds", kind, KINDS) for kind in kinds),
    ]
    for name, value, allowed in choices:
        check_choice(value, allowed, f"digits.{name}")
    rng = stream_rng(stream, seed)
    labels = digit_images()[1]
    rows_N1 = np.arange(num)[:, None]
    cells_NK = rng.random((num, NUM_CELLS)).argsort(axis=1)[:, :NUM_OBJECTS]
    colors_NK = rng.random((num, len(COLORS))).argsort(axis=1)[:, :NUM_OBJECTS]
    images_NK = rng.choice(digit_pool(stream), (num, NUM_OBJECTS))
    offsets_NK2 = (
        rng.integers(0, 2 * JITTER + 1, (num, NUM_OBJECTS, 2)) + (CELL - DIGIT_SIZE) // 2 - JITTER
    )
    kinds_N = rng.choice(np.array(kinds), num)

    digit_NC = np.zeros((num, NUM_CELLS), int)
    color_NC = np.full((num, NUM_CELLS), NO_COLOR)
    offset_NC2 = np.zeros((num, NUM_CELLS, 2), int)
    digit_NC[rows_N1, cells_NK] = images_NK
    color_NC[rows_N1, cells_NK] = colors_NK
    offset_NC2[rows_N1, cells_NK] = offsets_NK2
    images = compose(digit_NC, color_NC, offset_NC2, rng)

    def objects(n: int) -> tuple[DigitObject, ...]:
        found = []
        for k in range(NUM_OBJECTS):
            row, column = divmod(int(cells_NK[n, k]), GRID)
            y0, x0 = (
                int(cell * CELL + offset)
                for cell, offset in zip((row, column), offsets_NK2[n, k], strict=True)
            )
            box = (x0, y0, x0 + DIGIT_SIZE, y0 + DIGIT_SIZE)
            found.append(
                DigitObject(
                    COLOR_NAMES[colors_NK[n, k]], int(labels[images_NK[n, k]]), row, column, box
                )
            )
        return tuple(found)

    return [DigitExample(images[n], str(kinds_N[n]), objects(n)) for n in range(num)]


def generate_dense(
    num: int, rng: np.random.Generator, stream: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes images in which each cell holds a digit with probability 0.6, for vision pretraining.

    Returns:
        images uint8 [num, 56, 56, 3], digits int64 [num, 16], colours int64 [num, 16]; cells are
        row-major, as visual tokens are; `NO_DIGIT` and `NO_COLOR` at empty ones.
    """
    shape = (num, NUM_CELLS)
    present_NC = rng.random(shape) < 0.6
    digit_NC = rng.choice(digit_pool(stream), shape)
    color_NC = np.where(present_NC, rng.integers(len(COLORS), size=shape), NO_COLOR)
    offset_NC2 = rng.integers(0, 2 * JITTER + 1, (*shape, 2)) + (CELL - DIGIT_SIZE) // 2 - JITTER
    images = compose(digit_NC, color_NC, offset_NC2, rng)
    return images, np.where(present_NC, digit_images()[1][digit_NC], NO_DIGIT), color_NC


def scarce_labels(examples: Sequence[DigitExample], per_answer: int | None) -> list[bool]:
    """Says which examples keep their answer: the first `per_answer` of each (kind, answer).

    None keeps all.
    """
    seen: dict[tuple[str, str], int] = {}
    keep = []
    for example in examples:
        label = (example.kind, example.answer)
        seen[label] = seen.get(label, 0) + 1
        keep.append(per_answer is None or seen[label] <= per_answer)
    return keep


def text_response(example: DigitExample, has_answer: bool, misled: Sequence[str] = ()) -> str:
    """Writes the response that says its boxes in words, as far as it is known.

    >>> (example,) = generate(1, stream="sft", seed=0)
    >>> text_response(example, True), text_response(example, False)
    ('r2 c3 <answer> 0 </answer>', 'r2 c3 <answer>')
    """
    words = [f"r{item.row} c{item.column}" for item in example.boxed(misled)]
    if len(words) == 1:
        return f"{words[0]} {response_template(0, example.answer if has_answer else None)}"
    # two digits lead to one answer: labels say them too, as ILVR's do
    digits = [str(item.digit) for item in example.asked]
    return " ".join(
        [*words, *digits, response_template(0, example.answer)] if has_answer else words
    )


# rationale -> its steps
STEPS = {
    "full": lambda example: example.steps,
    "short": lambda example: [item.short_step for item in example.asked],
    "none": lambda example: [],
}


def to_rows(
    examples: Sequence[DigitExample],
    split: str,
    has_answer: Sequence[bool] | None = None,
    form: str = "latent",
    steps: str = "full",
    wrong_colors: Sequence[str] = (),
) -> list[dict]:
    """Makes verl rows; one without its answer has no ground truth that a stage could read.

    Args:
        form: of the response: `latent` (a span for each box), or, for controls without latents,
            `direct` (the answer alone) or `text_boxes` (row and column in words, then the answer).
        steps: of the rationale: `full`, `short` (no places), or `none` (the control that answers
            directly).
        wrong_colors: rows that ask for one of them are marked, and get its wrong box in split
            `sft`; empty marks none.
    """
    check_choice(form, FORMS, "digits.form")
    has_answer = [True] * len(examples) if has_answer is None else has_answer
    misled = wrong_colors if split == "sft" else ()
    return [
        verl_row(
            data_source=DATA_SOURCE,
            prompt=f"{example.question}<image>",
            images=[encode_png(example.image)],
            answer=example.answer if keeps_answer else None,
            bboxes=[item.box_normalised for item in example.boxed(misled)]
            if form == "latent"
            else [],
            response=text_response(example, keeps_answer, misled)
            if form == "text_boxes"
            else None,
            index=index,
            split=split,
            kind=example.kind,
            steps=STEPS[steps](example) if keeps_answer else None,
            marks={WRONG_BOX: any(item.color in wrong_colors for item in example.asked)}
            if wrong_colors
            else None,
        )
        for index, (example, keeps_answer) in enumerate(zip(examples, has_answer, strict=True))
    ]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.embedded.digits", description="Writes the embedded task."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder; gets train_sft, train_rl, dev, heldout .parquet",
    )
    parser.add_argument("--seed", type=int, default=0, help="of train_sft and train_rl")
    parser.add_argument("--eval-seed", type=int, default=EVAL_SEED, help="of dev and heldout")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["read"])
    parser.add_argument(
        "--sft", type=int, default=4096, help="rows of train_sft, all with boxes; 0 writes none"
    )
    parser.add_argument(
        "--labels-per-answer", type=int, default=1, help="answers kept in train_sft; -1 keeps all"
    )
    parser.add_argument("--rl", type=int, default=1920)
    parser.add_argument("--dev", type=int, default=512, help="rows for choosing and for curves")
    parser.add_argument("--heldout", type=int, default=1024, help="rows for reporting")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="latent",
        help="of responses; the others make controls in text",
    )
    parser.add_argument(
        "--steps",
        choices=list(STEPS),
        default="full",
        help="rationales: with places, without, none",
    )
    parser.add_argument(
        "--wrong-boxes",
        type=int,
        choices=range(len(COLOR_NAMES) + 1),
        default=0,
        help="colours whose boxes are another object's in train_sft; rows of all files are marked",
    )
    options = parser.parse_args(arguments)
    wrong_colors = COLOR_NAMES[: options.wrong_boxes]
    sizes = {"sft": options.sft, "rl": options.rl, "dev": options.dev, "heldout": options.heldout}
    for stream, num in sizes.items():
        if num == 0:
            continue
        training = STREAMS[stream][1]
        seed = options.seed if training else options.eval_seed
        examples = generate(num, stream=stream, seed=seed, kinds=options.kinds)
        per_answer = (
            None if stream != "sft" or options.labels_per_answer < 0 else options.labels_per_answer
        )
        has_answer = scarce_labels(examples, per_answer)
        path = options.out / (f"train_{stream}.parquet" if training else f"{stream}.parquet")
        write_verl_parquet(
            path,
            to_rows(examples, stream, has_answer, options.form, options.steps, wrong_colors),
            marks=(WRONG_BOX,) if wrong_colors else (),
        )
        print(f"{path}: {num} rows, {sum(has_answer)} with an answer")


if __name__ == "__main__":
    sys.exit(main())
