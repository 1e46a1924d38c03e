"""ILVR's selection against numbers worked out by hand."""

import math

import pytest
import torch

from grpo_latent.errors import LatentMismatchError
from grpo_latent.sft.ilvr.distillation import (
    noisy_cosine_distances,
    pool_candidates,
    question_vector,
    question_weights,
    select_candidates,
    span_query,
)


@pytest.mark.parametrize(
    "num_tokens, num_groups", [(8, 4), (7, 3), (300, 256), (512, 256), (257, 256)]
)
def test_pooling_equals_means_of_slices(num_tokens, num_groups):
    tokens_MH = torch.randn(num_tokens, 3, generator=torch.Generator().manual_seed(0))
    bounds = [group * num_tokens // num_groups for group in range(num_groups + 1)]
    expected = torch.stack(
        [tokens_MH[a:b].mean(0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    )
    torch.testing.assert_close(pool_candidates(tokens_MH, num_groups), expected)


@pytest.mark.parametrize("num_tokens", [1, 255, 256])
def test_few_tokens_are_not_pooled(num_tokens):
    tokens_MH = torch.randn(num_tokens, 2)
    assert pool_candidates(tokens_MH) is tokens_MH


def test_question_weights_by_hand_with_shared_keys():
    """Two query heads that share one key head, two question positions, scaling 1/2."""
    queries_AQD = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 0.0]]])
    keys_AMD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    e, e2 = math.e, math.e**2
    rows = [[e, 1, 1], [1, e, 1], [e2, 1, 1], [1, 1, 1]]
    expected = torch.tensor([[value / sum(row) for value in row] for row in rows]).mean(0)
    torch.testing.assert_close(question_weights(queries_AQD, keys_AMD, 0.5), expected)


def test_query_heads_share_keys_in_consecutive_groups():
    """Four query heads on two key heads, compared with one head at a time."""
    generator = torch.Generator().manual_seed(0)
    queries_AQD, keys_AMD = (
        torch.randn(4, 3, 5, generator=generator),
        torch.randn(2, 6, 5, generator=generator),
    )
    heads = [
        question_weights(queries_AQD[head, None], keys_AMD[head // 2, None], 0.7)
        for head in range(4)
    ]
    torch.testing.assert_close(
        question_weights(queries_AQD, keys_AMD, 0.7), torch.stack(heads).mean(0)
    )


def test_question_vector_and_span_query_by_hand():
    text_QH, image_MH = (
        torch.tensor([[1.0, 3.0], [3.0, 5.0]]),
        torch.tensor([[0.0, 8.0], [4.0, 0.0]]),
    )
    u = question_vector(text_QH, image_MH, torch.tensor([0.25, 0.75]))
    assert u.tolist() == [(2 + 3) / 2, (4 + 2) / 2]
    assert question_vector(text_QH, image_MH[:0], None).tolist() == [2, 4]
    nothing, text_TH, selected_NH = (
        torch.zeros(0, 2),
        torch.tensor([[1.0, 1.0], [2.0, 5.0]]),
        torch.tensor([[6.0, 9.0]]),
    )
    assert span_query(u, nothing, nothing).tolist() == [2.5, 3]
    assert span_query(u, text_TH, nothing).tolist() == [2, 3]
    assert span_query(u, nothing, selected_NH).tolist() == [4.25, 6]
    torch.testing.assert_close(span_query(u, text_TH, selected_NH), torch.tensor([10 / 3, 5]))


def cosine_candidates(cosines):
    """Unit vectors in the plane with these cosines to (1, 0), of different lengths."""
    return (
        torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])
        * torch.arange(1.0, len(cosines) + 1)[:, None]
    )


def test_selection_by_hand():
    """The softmax of (0.9, -0.5, 0.2) is about (0.5739, 0.1415, 0.2850).

    In order 0, 2, 1 with masses 0.574, 0.859, 1.
    """
    query_H, candidates_MH = torch.tensor([3.0, 0.0]), cosine_candidates([0.9, -0.5, 0.2])
    assert select_candidates(query_H, candidates_MH).tolist() == [0, 2, 1]
    assert select_candidates(query_H, candidates_MH, top_p=0.85).tolist() == [0, 2]
    assert select_candidates(query_H, candidates_MH, top_p=0.57).tolist() == [0]
    assert select_candidates(query_H, candidates_MH, top_k=2).tolist() == [0, 2]
    assert select_candidates(query_H, candidates_MH, top_k=1, top_p=0.99).tolist() == [0]


def test_selection_of_many_is_capped_and_ties_stand_in_order():
    assert select_candidates(torch.tensor([1.0, 0.0]), torch.ones(300, 2)).tolist() == list(
        range(8)
    )


def test_no_candidate_is_an_error():
    with pytest.raises(LatentMismatchError, match="without visual tokens"):
        select_candidates(torch.ones(2), torch.zeros(0, 2))


def test_cosine_distance_has_noise_on_the_target_and_gradient_on_the_prediction_only():
    generator = torch.Generator().manual_seed(0)
    predicted_NH = torch.randn(4, 6, generator=generator).requires_grad_()
    target_NH = torch.randn(4, 6, generator=generator).requires_grad_()
    noise_NH = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    distances_N = noisy_cosine_distances(
        predicted_NH, target_NH, 0.3, torch.Generator().manual_seed(5)
    )
    moved_NH = target_NH + 0.3 * noise_NH
    for predicted, moved, distance in zip(
        predicted_NH.tolist(), moved_NH.tolist(), distances_N.tolist(), strict=True
    ):
        dot = sum(a * b for a, b in zip(predicted, moved, strict=True))
        expected = 1 - dot / math.sqrt(sum(a * a for a in predicted) * sum(b * b for b in moved))
        assert distance == pytest.approx(expected, abs=1e-6)
    distances_N.sum().backward()
    assert target_NH.grad is None and predicted_NH.grad.abs().min() > 0
