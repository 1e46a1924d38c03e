"""Choosing K image positions by their attention: the deterministic rule of IVT-LR, and Plackett–Luce as its random form.

    scores, candidates ──top_k_candidates──▶ the K best, best first           (2510.12603 section 3)
    log-weights + Gumbel noise ──same rule──▶ K draws without replacement     (Plackett–Luce; Kool et al. 2019)

Random selection makes the choice an action: its log-probability is a pure function of log-weights and chosen indices, so
that a replay under other weights can score the recorded choice.

Legend: B rows, S positions, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError

NOT_CHOSEN = -1  # fills the places of a row that has fewer than K candidates


def top_k_candidates(scores_BS: Tensor, candidates_BS: Tensor, num: int) -> Tensor:
    """Positions of the `num` largest scores among the candidates, best first; equal scores in order of position.

    A row with fewer candidates than `num` gets all of them, then `NOT_CHOSEN`.

    Args:
        scores_BS: float, finite at the candidates.
        candidates_BS: bool.

    Returns:
        int64 [B, K], K = `num`, or less where no row has as many candidates.

    >>> scores = torch.tensor([[0.1, 0.3, 0.3, 0.2], [0.1, 0.3, 0.3, 0.2]])
    >>> top_k_candidates(scores, torch.tensor([[True] * 4, [False, False, True, False]]), 2).tolist()
    [[1, 2], [2, -1]]
    """
    counts_B = candidates_BS.sum(-1).clamp(max=num)
    longest = int(counts_B.max()) if counts_B.numel() else 0
    # topk breaks ties as it likes, and differently on other devices
    order_BS = scores_BS.masked_fill(~candidates_BS, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    places_K = torch.arange(longest, device=scores_BS.device)
    return order_BS[:, :longest].masked_fill(places_K >= counts_B[:, None], NOT_CHOSEN)


def gumbel_noise(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u) of uniforms in [0, 1); a u of 0 counts as the smallest positive number."""
    return -(-uniforms.clamp(min=torch.finfo(uniforms.dtype).tiny).log()).log()


def sample_candidates(log_weights_BS: Tensor, candidates_BS: Tensor, num: int, uniforms_BS: Tensor) -> Tensor:
    """`num` draws without replacement, each in proportion to exp(log-weight), in order of drawing; int64 [B, K].

    Shape and `NOT_CHOSEN` as in `top_k_candidates`. Source: the Gumbel top-k trick (Kool et al. 2019, 1903.06059).
    """
    perturbed_BS = log_weights_BS.to(uniforms_BS.dtype) + gumbel_noise(uniforms_BS)
    return top_k_candidates(perturbed_BS, candidates_BS, num)


def selection_log_prob(log_weights_BS: Tensor, candidates_BS: Tensor, chosen_BK: Tensor) -> Tensor:
    """Plackett–Luce log-probability of an ordered choice, nats, with gradient to the log-weights; float [B].

        log P = sum_k [ w(c_k) - log sum over candidates not in c_1..c_{k-1} of exp w ]

    Args:
        candidates_BS: bool, what could be chosen before the first draw.
        chosen_BK: int64, distinct candidates in order; `NOT_CHOSEN` only at the end of a row.

    Raises:
        LatentMismatchError: a chosen position is no candidate, or is chosen twice.

    >>> candidates = torch.ones(1, 3, dtype=torch.bool)
    >>> selection_log_prob(torch.tensor([[1.0, 2.0, 3.0]]).log(), candidates, torch.tensor([[2, 0]])).exp()  # 3/6 · 1/3
    tensor([0.1667])
    """
    left_BS = candidates_BS.clone()
    log_prob_B = torch.zeros(log_weights_BS.shape[0], dtype=log_weights_BS.dtype, device=log_weights_BS.device)
    for place, chosen_B in enumerate(chosen_BK.unbind(1)):
        is_chosen_B = chosen_B != NOT_CHOSEN
        index_B1 = chosen_B.clamp(min=0)[:, None]
        if not bool(left_BS.gather(1, index_B1)[:, 0][is_chosen_B].all()):
            raise LatentMismatchError(
                "a chosen position is no candidate, or was chosen before",
                where=f"place {place}",
                got=chosen_B.tolist(),
                expected="distinct candidates",
            )
        # finite everywhere: a row of -inf only would turn its (unused) gradient into NaN
        logits_BS = log_weights_BS.masked_fill(~left_BS, torch.finfo(log_weights_BS.dtype).min)
        term_B = logits_BS.log_softmax(-1).gather(1, index_B1)[:, 0]
        log_prob_B = log_prob_B + torch.where(is_chosen_B, term_B, 0.0)
        left_BS = left_BS.scatter(1, index_B1, left_BS.gather(1, index_B1) & ~is_chosen_B[:, None])
    return log_prob_B
