"""Draws tokens by nothing but a trajectory's own seed and position.

Each draw inverts the distribution's cumulative sum at one uniform number, which a counter-based
hash makes from (trajectory seed, position). So a resumed run, another number of workers or another
batch composition draws the same numbers, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LATENT_STREAM = 1 << 40  # counters of latents begin here, far beyond those of text positions
_SLOT_STREAM = 1 << 50  # counters of slots, beyond those of everything else
_MAX_IMAGE_POSITIONS = 1 << 32  # counters that one slot has to itself


def trajectory_seed(run_seed: int, step: int | str, row_id: str | int, trajectory_idx: int) -> int:
    """63-bit seed of one trajectory: equal arguments, equal seeds, on every machine."""
    # a digest, not `hash`, which Python salts anew in each process
    text = f"{run_seed}/{step}/{row_id}/{trajectory_idx}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniforms(seeds_N: np.ndarray, position: int | np.ndarray) -> Tensor:
    """float64 [N] in [0, 1): splitmix64 of seed + (position + 1) * golden ratio.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; its top 53 bits.
    """
    # uint64 wraps around, as the algorithm wants
    with np.errstate(over="ignore"):
        x = seeds_N.astype(np.uint64) + (np.asarray(position) + 1).astype(np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def latent_uniforms(seeds_M: np.ndarray, position: int, count: int) -> Tensor:
    """float64 [M, count] in (0, 1), a stream of its own: what a latent at `position` draws by."""
    counters = _LATENT_STREAM + position * count + np.arange(count)
    # half a step up from 0: quantiles of the normal and the Gumbel distribution are infinite there
    return uniforms(seeds_M[:, None], counters[None]) + 2.0**-54


def slot_uniforms(seeds_N: np.ndarray, slot: int, num_images: int) -> Tensor:
    """float64 [N, num_images] in [0, 1): what a prompt's slot draws each image position with."""
    counters = _SLOT_STREAM + slot * _MAX_IMAGE_POSITIONS + np.arange(num_images)
    return uniforms(seeds_N[:, None], counters)


def truncate(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with -inf outside the top-k and the top-p nucleus.

    `top_k` <= 0 and `top_p` >= 1 switch each off. Of equal logits at the k-th place all stay.
    """
    vocab_size = logits_NV.shape[-1]
    if 0 < top_k < vocab_size:
        kth_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, -torch.inf)
    if top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
        probs_NV = sorted_NV.softmax(-1)
        # a token stays while the mass before it is below top_p, so the first one always stays
        outside_NV = probs_NV.cumsum(-1) - probs_NV >= top_p
        logits_NV = logits_NV.masked_fill(outside_NV.scatter(1, order_NV, outside_NV), -torch.inf)
    return logits_NV


def sample(
    logits_NV: Tensor,
    uniforms_N: Tensor,
    temperature: float,
    top_k: int = -1,
    top_p: float = 1.0,
    banned_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row; temperature 0 takes the arg-max of the allowed tokens.

    Args:
        logits_NV: float [N, V].
        uniforms_N: float64 [N] in [0, 1).
        banned_NV: bool [N, V] or [1, V], tokens that must not be drawn.

    Returns:
        token ids int64 [N]; log-probs float32 [N] under the full distribution at `temperature`
        (at 1 when greedy); log-probs float32 [N] under the distribution drawn from (0 when
        greedy). The full one knows no ban and no truncation: it is what a replay can recompute.
    """
    greedy = temperature == 0
    scaled_NV = (
        logits_NV.float() if greedy or temperature == 1 else logits_NV.float() / temperature
    )
    full_NV = scaled_NV.log_softmax(-1)
    allowed_NV = scaled_NV if banned_NV is None else scaled_NV.masked_fill(banned_NV, -torch.inf)
    if greedy:
        tokens_N = allowed_NV.argmax(-1)
        return (
            tokens_N,
            full_NV.gather(1, tokens_N[:, None])[:, 0],
            torch.zeros_like(full_NV[:, 0]),
        )
    drawn_NV = truncate(allowed_NV, top_k, top_p).log_softmax(-1)
    # in float64: a float32 sum over the vocabulary would round a rare token's share away
    cumulative_NV = drawn_NV.double().exp().cumsum(-1)
    # rounding may leave the last cumulative value below 1: scale the uniform instead of running
    # past the end
    target_N1 = uniforms_N.to(cumulative_NV.device)[:, None] * cumulative_NV[:, -1:]
    tokens_N = torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0].clamp_(
        max=logits_NV.shape[-1] - 1
    )
    pick = tokens_N[:, None]
    return tokens_N, full_NV.gather(1, pick)[:, 0], drawn_NV.gather(1, pick)[:, 0]
