"""Times `rollout.sampling.sample` against one cumulative sum in float64 over the vocabulary.

    python benchmarks/sampling.py [--rows 256] [--vocabulary 151936] [--device cpu] [--json out.json]

The other way is the plain one, two log-softmaxes and `cumsum` of doubles: what `sample` did until
November 2026. Both ban the same 23 tokens. Seconds are of the CPU (`time.process_time`), of the
device behind a synchronisation on CUDA; medians of repeats that interleave the two. Beside them
for each how many draws are other than those of float64 throughout, which only rounding at a
boundary may do, and how far the log-probs are from it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from result_file import write_result
from torch import Tensor

from grpo_latent.rollout.sampling import Bans, sample

NUM_BANNED = 23


def plain(logits_NV: Tensor, uniforms_N: Tensor, bans: Bans) -> tuple[Tensor, ...]:
    """`sample`'s results, without truncation, in the plain way."""
    scaled_NV = logits_NV.float()
    full_NV = scaled_NV.log_softmax(-1)
    drawn_NV = bans.without(scaled_NV).log_softmax(-1)
    cumulative_NV = drawn_NV.double().exp().cumsum(-1)
    targets_N1 = uniforms_N[:, None] * cumulative_NV[:, -1:]
    tokens_N1 = torch.searchsorted(cumulative_NV, targets_N1, right=True)
    return tokens_N1[:, 0], full_NV.gather(1, tokens_N1)[:, 0], drawn_NV.gather(1, tokens_N1)[:, 0]


def seconds(way: Callable[..., tuple], device: torch.device, *arguments) -> tuple[float, tuple]:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    result = way(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started, result


def sample_at_one(logits_NV: Tensor, uniforms_N: Tensor, bans: Bans) -> tuple[Tensor, ...]:
    return sample(logits_NV, uniforms_N, 1.0, bans=bans)


WAYS = {"plain": plain, "sample": sample_at_one}


def measure(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, repeats: int):
    """By way: median seconds, other draws than in float64, the largest gap of the full log-prob."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
    ids = range(vocabulary - 10 * NUM_BANNED, vocabulary - 9 * NUM_BANNED)
    bans = Bans.build(ids, (), device).rows(torch.zeros(1, dtype=torch.long, device=device))
    full_NV = logits_NV.double().log_softmax(-1)
    exact_NV = bans.without(logits_NV.double()).softmax(-1).cumsum(-1)
    found: dict[str, dict[str, Any]] = {}
    for name in WAYS:
        found[name] = {"seconds": [], "other_draws": 0, "log_prob_gap": 0.0}
    for _ in range(repeats):
        uniforms_N = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
        targets_N1 = uniforms_N[:, None] * exact_NV[:, -1:]
        exact_N = torch.searchsorted(exact_NV, targets_N1, right=True)[:, 0]
        for name, way in WAYS.items():
            spent, (tokens_N, log_probs_N, _) = seconds(way, device, logits_NV, uniforms_N, bans)
            gaps_N = log_probs_N - full_NV.gather(1, tokens_N[:, None])[:, 0]
            row = found[name]
            row["seconds"].append(spent)
            row["other_draws"] += int((tokens_N != exact_N).sum())
            row["log_prob_gap"] = max(row["log_prob_gap"], float(gaps_N.abs().max()))
    for row in found.values():
        row["seconds"] = statistics.median(row["seconds"])
    ratio = found["sample"]["seconds"] / found["plain"]["seconds"]
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, **found, "ratio": ratio, "draws": rows * repeats}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        row = measure(arguments.rows, arguments.vocabulary, dtype, device, arguments.repeats)
        found.append(row)
        print(f"[{arguments.rows}, {arguments.vocabulary}] {row['dtype']}: {row['ratio']:.2f}")
        for name in WAYS:
            print(
                f"  {name}: {1e3 * row[name]['seconds']:.0f} ms, {row[name]['other_draws']} of "
                f"{row['draws']} draws are not float64's, log-probs off by at most "
                f"{row[name]['log_prob_gap']:.1e}"
            )
    write_result(arguments.json, {"device": str(device), "sampling": found}, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
