"""Draws tokens by nothing but a trajectory's own seed and position.

Each draw inverts the distribution's cumulative sum at one uniform number, which a counter-based
hash makes from (trajectory seed, position). So a resumed run, another number of workers or another
batch composition draws the same numbers, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LATENT_STREAM = 1 << 40  # counters of latents begin here, far beyond those of text positions
_SLOT_STREAM = 1 << 50  # counters of slots, beyond those of everything else
_BLOCK = 256  # tokens that are summed at once in float32
_BELOW_ONE = 1 - 2.0**-52
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


def latent_uniforms(seeds_M: Tensor, positions: int | Tensor, count: int) -> Tensor:
    """float64 [M, count] in (0, 1), a stream of its own: what latents draw by.

    The numbers of `uniforms`, made where the seeds are: an engine need not know on the CPU which
    rows have latents.

    Args:
        seeds_M: int64, the 64 bits of each trajectory's seed (`seed_bits`).
        positions: of the completion; int, or int64 [M].
    """
    columns = torch.arange(count, device=seeds_M.device)
    # a number stays one: made a tensor, it would be sent to the device, and waited for
    first = (positions.reshape(-1, 1) if isinstance(positions, Tensor) else positions) * count
    # int64 wraps around as uint64 does; of its shift, the copies of the sign are masked
    x = seeds_M[:, None] + (first + columns + (_LATENT_STREAM + 1)) * _signed(int(_GOLDEN))
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    x = x ^ ((x >> 31) & (1 << 33) - 1)
    # half a step up from 0: quantiles of the normal and the Gumbel distribution are infinite there
    return ((x >> 11) & (1 << 53) - 1).double() * 2.0**-53 + 2.0**-54


def seed_bits(seeds: list[int]) -> Tensor:
    """Seeds in [0, 2**64) as int64 of the same bits.

    >>> seed_bits([5, 2**64 - 1])
    tensor([ 5, -1])
    """
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits


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


@dataclass(frozen=True)
class Bans:
    """Tokens that must not be drawn.

    By id: a mask over the vocabulary would cost a pass over all logits, and their mass another.

    Attributes:
        ids_K: int64, distinct.
        is_banned_NK: bool [N, K], or [1, K] for all rows.
    """

    ids_K: Tensor
    is_banned_NK: Tensor

    @classmethod
    def build(cls, always: Iterable[int], sometimes: Iterable[int], device: torch.device) -> Bans:
        """Two rows to choose from: one bans `always`, the next `sometimes` besides."""
        banned = set(always)
        ids = sorted(banned | set(sometimes))
        is_always_K = torch.tensor([token_id in banned for token_id in ids], dtype=torch.bool)
        is_banned_2K = torch.stack((is_always_K, torch.ones_like(is_always_K)))
        return cls(torch.tensor(ids, dtype=torch.long, device=device), is_banned_2K.to(device))

    def of(self, logits_NV: Tensor) -> Tensor:
        """float [N, K]: the banned logits, -inf where a row bans no such token."""
        return logits_NV[:, self.ids_K].masked_fill(~self.is_banned_NK, -torch.inf)

    def without(self, logits_NV: Tensor) -> Tensor:
        """A copy of the logits with -inf at the banned."""
        kept_NK = logits_NV[:, self.ids_K].masked_fill(self.is_banned_NK, -torch.inf)
        return logits_NV.index_copy(1, self.ids_K, kept_NK)

    def rows(self, index_M: Tensor) -> Bans:
        """Those of a selection of rows."""
        if self.is_banned_NK.shape[0] == 1:
            return self
        return Bans(self.ids_K, self.is_banned_NK[index_M])


def invert(weights_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of each row's weights passes a share of its total.

    In two levels, blocks of the vocabulary and then one block, so that float64, which a rare
    token's share needs, is summed over V / 256 + 256 numbers and not over V.

    Args:
        weights_NV: float32 >= 0, any scale, a positive sum.
        uniforms_N: float64 in [0, 1), the shares.

    Returns:
        int64 [N], a position of positive weight; float64 [N], the total.
    """
    vocab_size = weights_NV.shape[-1]
    in_blocks = vocab_size - vocab_size % _BLOCK
    sums_NG = weights_NV[:, :in_blocks].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if in_blocks < vocab_size:
        rest_N1 = weights_NV[:, in_blocks:].sum(-1, keepdim=True)
        sums_NG = torch.cat((sums_NG, rest_N1), -1)
    ends_NG = sums_NG.double().cumsum(-1)
    total_N1 = ends_NG[:, -1:]
    # the product may round up to the total, where no block is left
    targets_N1 = (uniforms_N.to(total_N1.device)[:, None] * total_N1).minimum(
        total_N1 * _BELOW_ONE
    )
    # clamped for NaN, which is past every end: it is found by its log-prob, and must not be an
    # index out of bounds, which ends a CUDA process without a word on the cause
    blocks_N1 = torch.searchsorted(ends_NG, targets_N1, right=True).clamp_(
        max=sums_NG.shape[1] - 1
    )
    sum_N1 = sums_NG.gather(1, blocks_N1).double()
    share_N1 = (targets_N1 - (ends_NG.gather(1, blocks_N1) - sum_N1)) / sum_N1
    tokens_NB = blocks_N1 * _BLOCK + torch.arange(_BLOCK, device=weights_NV.device)
    inside_NB = weights_NV.gather(1, tokens_NB.clamp(max=vocab_size - 1)).double()
    inside_NB = inside_NB.masked_fill(tokens_NB >= vocab_size, 0.0).cumsum(-1)
    # a share, not a remainder: the block's sum was rounded to float32, its parts' is not
    within_N1 = torch.searchsorted(
        inside_NB, share_N1.clamp(0.0, _BELOW_ONE) * inside_NB[:, -1:], right=True
    )
    tokens_N1 = (blocks_N1 * _BLOCK + within_N1).clamp_(max=vocab_size - 1)
    return tokens_N1[:, 0], total_N1[:, 0]


def sample(
    logits_NV: Tensor,
    uniforms_N: Tensor,
    temperature: float,
    top_k: int = -1,
    top_p: float = 1.0,
    bans: Bans | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row; temperature 0 takes the arg-max of the allowed tokens.

    Args:
        logits_NV: float [N, V].
        uniforms_N: float64 [N] in [0, 1).

    Returns:
        token ids int64 [N]; log-probs float32 [N] under the full distribution at `temperature`
        (at 1 when greedy); log-probs float32 [N] under the distribution drawn from (0 when
        greedy). The full one knows no ban and no truncation: it is what a replay can recompute.
    """
    greedy = temperature == 0
    scaled_NV = logits_NV.float()
    if not greedy and temperature != 1:
        scaled_NV = scaled_NV / temperature
    allowed_NV = scaled_NV if bans is None else bans.without(scaled_NV)
    max_N1 = allowed_NV.amax(-1, keepdim=True)
    weights_NV = (allowed_NV - max_N1).exp_()
    truncates = not greedy and (0 < top_k < logits_NV.shape[-1] or top_p < 1)
    if greedy:
        tokens_N, total_N = allowed_NV.argmax(-1), weights_NV.sum(-1)
    elif truncates:  # drawn below, of fewer tokens
        total_N = weights_NV.sum(-1)
    else:
        tokens_N, total_N = invert(weights_NV, uniforms_N)
    max_N = max_N1[:, 0]
    allowed_N = max_N + total_N.log().float()
    full_N = allowed_N
    if bans is not None:
        full_N = torch.logaddexp(full_N, bans.of(scaled_NV).logsumexp(-1))
    if truncates:
        truncated_NV = truncate(allowed_NV, top_k, top_p)
        weights_NV.masked_fill_(truncated_NV == -torch.inf, 0.0)
        tokens_N, total_N = invert(weights_NV, uniforms_N)
    picked_N = scaled_NV.gather(1, tokens_N[:, None])[:, 0]
    if greedy:
        return tokens_N, picked_N - full_N, torch.zeros_like(picked_N)
    return tokens_N, picked_N - full_N, picked_N - (max_N + total_N.log().float())
