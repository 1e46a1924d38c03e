"""The text-only task: sums and products modulo 7, their running totals as the rationale.

    3 +4 *2 +6 *5 ?      steps  0 | 0 | 6 | 2      answer  2

Sums and products do not commute, so the totals have to be made one after the other; each takes a
table of 91 entries. Every operation is a bijection: guessing scores 1/7. Questions are split by a
hash: training and held-out ones are disjoint.

Also writes the model that SFT starts from, a tiny Qwen3 with random weights. Its embeddings are
tied, as those of Qwen3-0.6B, and have the norm of its hidden states: what a slot is fed is then
like what a token is fed. Untied ones drift apart in stage 0, and slots were learned by luck.

python recipes/coconut/arithmetic.py --out outputs/coconut/data --model outputs/coconut/base --seed
0
"""

from __future__ import annotations

import argparse
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grpo_latent.common.manifest import write_model_manifest
from grpo_latent.data.rows import verl_row, write_verl_parquet
from grpo_latent.models.tiny import TinySizes, tiny_qwen3

DATA_SOURCE = "arithmetic"
MODULUS = 7
OPERATIONS = tuple(f"+{n}" for n in range(MODULUS)) + tuple(f"*{n}" for n in range(1, MODULUS))
WORDS = (*OPERATIONS, "?")
SIZES = TinySizes(hidden=96, layers=3, heads=4, kv_heads=2, intermediate=256)
LARGEST_LOGIT = 8.0  # at the start: of a token whose embedding is h
EVAL_SEED = 4242  # of dev and held-out rows, whatever the run's seed
# purpose -> (index in the seed sequence, whether it draws from the training questions)
STREAMS = {"sft": (0, True), "rl": (1, True), "dev": (2, False), "heldout": (3, False)}
HELDOUT_SHARE = 10  # one question in so many


@dataclass(frozen=True)
class Chain:
    """A first number, and operations such as `+4` and `*2`."""

    start: int
    operations: tuple[str, ...]

    @property
    def totals(self) -> list[int]:
        """After each operation."""
        totals = []
        total = self.start
        for operation in self.operations:
            number = int(operation[1:])
            total = (total + number if operation[0] == "+" else total * number) % MODULUS
            totals.append(total)
        return totals

    @property
    def question(self) -> str:
        return " ".join([str(self.start), *self.operations, "?"])

    @property
    def steps(self) -> list[str]:
        return [str(total) for total in self.totals]

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
        chain = Chain(
            int(rng.integers(MODULUS)), tuple(rng.choice(OPERATIONS, size=num_steps).tolist())
        )
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


def write_model(folder: Path, seed: int) -> None:
    model, tokenizer, _ = tiny_qwen3(WORDS, SIZES, seed=seed, latent_tokens=())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    scale = math.sqrt(LARGEST_LOGIT / SIZES.hidden)  # of an entry of an embedding, and of h
    with torch.no_grad():
        embeddings = model.get_input_embeddings().get_parameter("weight")
        embeddings.mul_(scale / model.config.initializer_range)
        model.model.norm.weight.fill_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_model_manifest(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder; gets train_sft, train_direct, train_rl, dev, heldout",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="operations of a question")
    parser.add_argument("--sft", type=int, default=4096)
    parser.add_argument("--rl", type=int, default=1920)
    parser.add_argument("--dev", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=1024)
    options = parser.parse_args()
    for stream, (_, is_training) in STREAMS.items():
        seed = options.seed if is_training else EVAL_SEED
        chains = generate(
            getattr(options, stream), stream=stream, seed=seed, num_steps=options.steps
        )
        path = options.out / (f"train_{stream}.parquet" if is_training else f"{stream}.parquet")
        print(f"{path}: {write_verl_parquet(path, to_rows(chains, stream))} rows")
        if stream == "sft":
            write_verl_parquet(
                options.out / "train_direct.parquet", to_rows(chains, stream, steps=False)
            )
    write_model(options.model, options.seed)


if __name__ == "__main__":
    main()
