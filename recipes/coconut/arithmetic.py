"""The text-only task: chains of additions and subtractions modulo 5, with their running totals as the rationale.

    3 + 4 - 1 + 4 ?      steps  3 + 4 is 2 | 2 - 1 is 1 | 1 + 4 is 0      answer  0

Questions are split by a hash: training and held-out ones are disjoint. Also writes the model that SFT starts from, a tiny
Qwen3 with random weights.

python recipes/coconut/arithmetic.py --out outputs/coconut/data --model outputs/coconut/base --seed 0
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo_latent.data.rows import verl_row, write_verl_parquet
from grpo_latent.models.tiny import TinySizes, tiny_qwen3

DATA_SOURCE = "arithmetic"
WORDS = ("+", "-", "is", "?")
SIZES = TinySizes(hidden=96, layers=3, heads=4, kv_heads=2, intermediate=256)
EVAL_SEED = 4242  # of dev and held-out rows, whatever the run's seed
# purpose -> (index in the seed sequence, whether it draws from the training questions)
STREAMS = {"sft": (0, True), "rl": (1, True), "dev": (2, False), "heldout": (3, False)}
MODULUS = 5
HELDOUT_SHARE = 10  # one question in so many


@dataclass(frozen=True)
class Chain:
    """`numbers` has one entry more than `signs`, whose entries are 1 and -1."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def totals(self) -> list[int]:
        totals = [self.numbers[0]]
        for sign, number in zip(self.signs, self.numbers[1:], strict=True):
            totals.append((totals[-1] + sign * number) % MODULUS)
        return totals

    @property
    def question(self) -> str:
        pairs = zip(self.signs, self.numbers[1:], strict=True)
        return " ".join(
            [str(self.numbers[0]), *(f"{'+' if sign > 0 else '-'} {number}" for sign, number in pairs), "?"]
        )

    @property
    def steps(self) -> list[str]:
        totals = self.totals
        return [
            f"{before} {'+' if sign > 0 else '-'} {number} is {after}"
            for before, sign, number, after in zip(totals, self.signs, self.numbers[1:], totals[1:], strict=False)
        ]

    @property
    def answer(self) -> str:
        return str(self.totals[-1])

    @property
    def is_heldout(self) -> bool:
        return zlib.crc32(self.question.encode()) % HELDOUT_SHARE == 0


def generate(num: int, *, stream: str, seed: int, num_steps: int) -> list[Chain]:
    """`num` chains of the stream's questions, the same for the same arguments."""
    index, is_training = STREAMS[stream]
    rng = np.random.default_rng(np.random.SeedSequence([index, seed]))
    chains: list[Chain] = []
    while len(chains) < num:
        numbers, signs = rng.integers(MODULUS, size=num_steps + 1), rng.choice([1, -1], size=num_steps)
        chain = Chain(tuple(numbers.tolist()), tuple(signs.tolist()))
        if chain.is_heldout != is_training:
            chains.append(chain)
    return chains


def to_rows(chains: list[Chain], split: str, steps: bool = True) -> list[dict]:
    """verl rows; `steps` False leaves the rationale out: the control that answers directly."""
    return [
        verl_row(
            data_source=DATA_SOURCE,
            prompt=chain.question,
            images=(),
            answer=chain.answer,
            index=index,
            split=split,
            steps=chain.steps if steps else [],
        )
        for index, chain in enumerate(chains)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder; gets train_sft, train_direct, train_rl, dev, heldout"
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3, help="operations of a question")
    parser.add_argument("--sft", type=int, default=2048)
    parser.add_argument("--rl", type=int, default=1920)
    parser.add_argument("--dev", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=1024)
    options = parser.parse_args()
    for stream, (_, is_training) in STREAMS.items():
        seed = options.seed if is_training else EVAL_SEED
        chains = generate(getattr(options, stream), stream=stream, seed=seed, num_steps=options.steps)
        path = options.out / (f"train_{stream}.parquet" if is_training else f"{stream}.parquet")
        print(f"{path}: {write_verl_parquet(path, to_rows(chains, stream))} rows")
        if stream == "sft":
            write_verl_parquet(options.out / "train_direct.parquet", to_rows(chains, stream, steps=False))
    model, tokenizer, _ = tiny_qwen3(WORDS, SIZES, seed=options.seed, latent_tokens=())
    model.save_pretrained(options.model)
    tokenizer.save_pretrained(options.model)


if __name__ == "__main__":
    main()
