"""ILVR's selective distillation as pure functions: which visual tokens a latent span aims at.

Section 3 of 2512.05665:

    helper image ──vision + merger──▶ tokens ──pool──▶ at most 256 candidates [M, H]
    question, text before the span, earlier choices ──mean──▶ query [H]
    cosine(query, candidates) ──softmax──▶ top-p and top-k ──▶ targets of a span's first latents

Legend: M image positions or candidates, G groups of them, N latents, A attention heads, Q question
positions, T text positions, D head dim, H hidden states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_latent.errors import LatentMismatchError

MAX_CANDIDATES = 256


def pool_candidates(tokens_MH: Tensor, max_candidates: int = MAX_CANDIDATES) -> Tensor:
    """Averages tokens in `max_candidates` contiguous groups; fewer tokens stay as they are.

    Where the number of tokens does not divide, groups differ by one token and stay disjoint.

    >>> pool_candidates(torch.arange(5.0)[:, None], 2)[:, 0]  # (0 + 1) / 2, (2 + 3 + 4) / 3
    tensor([0.5000, 3.0000])
    """
    num_tokens = tokens_MH.shape[0]
    if num_tokens <= max_candidates:
        return tokens_MH
    # the published code cuts groups of one size, and so drops the last M mod G tokens
    # group g holds the tokens from floor(g * M / G) on
    starts_G = (
        torch.arange(1, max_candidates, device=tokens_MH.device) * num_tokens // max_candidates
    )
    group_M = torch.bucketize(
        torch.arange(num_tokens, device=tokens_MH.device), starts_G, right=True
    )
    sums_GH = tokens_MH.new_zeros(max_candidates, tokens_MH.shape[1]).index_add_(
        0, group_M, tokens_MH
    )
    return sums_GH / torch.bincount(group_M, minlength=max_candidates)[:, None].to(sums_GH.dtype)


def question_weights(queries_AQD: Tensor, keys_AMD: Tensor, scaling: float) -> Tensor:
    """Says how much the question looks at each image position: float32 [M], which sums to 1.

    softmax over the M positions, averaged over heads and Q.

    From the last layer's queries and keys rather than from its attention map: causal attention
    would give an image that stands behind the question no weight at all.

    Args:
        keys_AMD: repeated to the query heads, or with fewer heads that consecutive groups of query
            heads share.
    """
    num_groups = queries_AQD.shape[0] // keys_AMD.shape[0]
    keys_AMD = keys_AMD.repeat_interleave(num_groups, 0)
    # of what the layer's attention read, positions included; the published code takes them of the
    # final hidden states, without rotary positions
    scores_AQM = torch.einsum("aqd,amd->aqm", queries_AQD.float(), keys_AMD.float()) * scaling
    return scores_AQM.softmax(-1).mean((0, 1))


def question_vector(
    text_hidden_QH: Tensor, image_hidden_MH: Tensor, weights_M: Tensor | None
) -> Tensor:
    """Makes u [H] of the question: the mean of r_txt and r_img, or r_txt alone without an image.

    r_txt is the mean h of the question's text, r_img = Σ weight · h of the image.
    """
    r_text_H = text_hidden_QH.float().mean(0)
    if weights_M is None:
        return r_text_H
    return (r_text_H + weights_M @ image_hidden_MH.float()) / 2


def span_query(question_H: Tensor, text_hidden_TH: Tensor, selected_NH: Tensor) -> Tensor:
    """Makes the query of a span [H]: the mean of those of these three that exist.

    Args:
        question_H: u.
        text_hidden_TH: h of the assistant's text between the span before and this one; may be
            empty.
        selected_NH: targets of all earlier spans; empty for the first.
    """
    means = [question_H.float()]
    means += [rows.float().mean(0) for rows in (text_hidden_TH, selected_NH) if rows.shape[0]]
    return torch.stack(means).mean(0)


def select_candidates(
    query_H: Tensor, candidates_MH: Tensor, top_k: int = 8, top_p: float = 0.9
) -> Tensor:
    """Picks the candidates nearest to the query, best first: int64 [K*], 1 <= K* <= `top_k`.

    softmax over the M cosines; a candidate stays if it is among the `top_k` most probable *and*
    the probability of those before it is below `top_p`. Equal ones stand in order of index.

    Raises:
        LatentMismatchError: there is no candidate.
    """
    if candidates_MH.shape[0] == 0:
        raise LatentMismatchError(
            "a helper image without visual tokens", got="0 candidates", expected="at least one"
        )
    cosines_M = F.cosine_similarity(query_H.float()[None], candidates_MH.float(), dim=-1)
    probs_M, order_M = cosines_M.softmax(-1).sort(descending=True, stable=True)
    # the mass *before* a candidate decides, so that the best one always stays
    in_nucleus_M = probs_M.cumsum(-1) - probs_M < top_p
    return order_M[in_nucleus_M][:top_k]


def noisy_cosine_distances(
    predicted_NH: Tensor,
    target_NH: Tensor,
    noise_std: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes 1 - cosine(predicted, target + noise_std · N(0, 1)), float32 [N].

    No gradient reaches the targets: they are the teacher's.
    """
    target_NH = target_NH.detach().float()
    noise_NH = torch.randn(target_NH.shape, generator=generator, device=target_NH.device)
    return 1 - F.cosine_similarity(predicted_NH.float(), target_NH + noise_std * noise_NH, dim=-1)
