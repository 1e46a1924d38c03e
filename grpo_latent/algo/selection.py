"""Choosing K image positions by their attention: by IVT-LR's rule, or at random (Plackett–Luce).

    scores, candidates ──top_k_candidates──▶ the K best, best first       (2510.12603 section 3)
    log-weights + Gumbel noise ──same rule──▶ K draws without replacement (Kool et al. 2019)

Random selection makes the choice an action: its log-probability is a pure function of log-weights
and chosen indices, so that a replay under other weights can score the recorded choice.

Legend: B rows, S positions, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError

NOT_CHOSEN = -1  # fills the places of a row that has fewer than K candidates


def top_k_candidates(scores_BS: Tensor, candidates_BS: Tensor, num: int) -> Tensor:
    """Positions of the `num` largest scores among the candidates, best first.

    Equal scores stand in order of position. A row with fewer candidates than `num` gets all of
    them, then `NOT_CHOSEN`.

    Args:
        scores_BS: float, finite at the candidates.
        candidates_BS: bool.

    Returns:
        int64 [B, K], K = `num`, or less where no row has as many candidates.

    >>> scores = torch.tensor([[0.1, 0.3, 0.3, 0.2], [0.1, 0.3, 0.3, 0.2]])
    >>> may_be = torch.tensor([[True] * 4, [False, False, True, False]])
    >>> top_k_candidates(scores, may_be, 2).tolist()
    [[1, 2], [2, -1]]
    """
    counts_B = candidates_BS.sum(-1).clamp(max=num)
    longest = int(counts_B.max()) if counts_B.numel() else 0
    # topk breaks ties as it likes, and differently on other devices
    order_BS = (
        scores_BS.masked_fill(~candidates_BS, -torch.inf)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    places_K = torch.arange(longest, device=scores_BS.device)
    return order_BS[:, :longest].masked_fill(places_K >= counts_B[:, None], NOT_CHOSEN)


def gumbel_noise(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u) of uniforms u in [0, 1).

    A u of 0 counts as the smallest positive number.
    """
    return -(-uniforms.clamp(min=torch.finfo(uniforms.dtype).tiny).log()).log()


def sample_candidates(
    log_weights_BS: Tensor, candidates_BS: Tensor, num: int, uniforms_BS: Tensor
) -> Tensor:
    """`num` draws without replacement, each in proportion to exp(log-weight), as they were drawn.

    Shape, dtype and `NOT_CHOSEN` as in `top_k_candidates`. Source: the Gumbel top-k trick (Kool et
    al. 2019, 1903.06059).
    """
    perturbed_BS = log_weights_BS.to(uniforms_BS.dtype) + gumbel_noise(uniforms_BS)
    return top_k_candidates(perturbed_BS, candidates_BS, num)


def selection_log_probs(
    log_weights_BS: Tensor, candidates_BS: Tensor, chosen_BK: Tensor
) -> Tensor:
    """Plackett–Luce log-probability of each place of an ordered choice.

        log P(c_k | c_1..c_{k-1}) = w(c_k) - log sum over candidates not in c_1..c_{k-1} of exp w

    The choice's own is the sum over its places. The gradient flows to the log-weights.

    Args:
        candidates_BS: bool, what could be chosen before the first draw.
        chosen_BK: int64, distinct candidates in order; `NOT_CHOSEN` anywhere is a place without a
            draw.

    Returns:
        float [B, K], nats, 0 at `NOT_CHOSEN`.

    Raises:
        LatentMismatchError: a chosen position is no candidate, or is chosen twice.

    >>> candidates = torch.ones(1, 3, dtype=torch.bool)
    >>> weights, chosen = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0]])
    >>> selection_log_probs(weights.log(), candidates, chosen).exp()  # 3/6, 1/3
    tensor([[0.5000, 0.3333]])
    """
    is_chosen_BK = chosen_BK != NOT_CHOSEN
    index_BK = chosen_BK.clamp(min=0)
    num_places = chosen_BK.shape[1]
    times_BS = torch.zeros_like(candidates_BS, dtype=torch.long).scatter_add_(
        1, index_BK, is_chosen_BK.long()
    )
    if bool((times_BS > candidates_BS.long()).any()):
        raise LatentMismatchError(
            "a chosen position is no candidate, or is chosen twice",
            where="selection",
            got=chosen_BK.tolist(),
            expected="distinct candidates",
        )
    places_K = torch.arange(num_places, device=chosen_BK.device)
    # the place at which each position was chosen: until then it could have been chosen instead
    place_BS = torch.full_like(times_BS, num_places)
    place_BS.scatter_reduce_(
        1, index_BK, places_K.expand_as(index_BK).masked_fill(~is_chosen_BK, num_places), "amin"
    )
    left_BKS = candidates_BS[:, None] & (place_BS[:, None] >= places_K[:, None])
    # finite everywhere: a row of -inf only would turn its (unused) gradient into NaN
    minimum = torch.finfo(log_weights_BS.dtype).min
    log_probs_BKS = log_weights_BS[:, None].masked_fill(~left_BKS, minimum).log_softmax(-1)
    return log_probs_BKS.gather(2, index_BK[..., None])[..., 0].masked_fill(~is_chosen_BK, 0.0)
