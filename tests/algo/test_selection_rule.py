"""The choice of K positions and the log-probability of a random choice."""

import itertools
import math

import pytest
import torch

from grpo_latent.algo.selection import (
    NOT_CHOSEN,
    gumbel_noise,
    sample_candidates,
    selection_log_probs,
    top_k_candidates,
)
from grpo_latent.errors import LatentMismatchError


def by_hand(scores, candidates, num):
    ranked = sorted(
        (s for s, is_candidate in enumerate(candidates) if is_candidate),
        key=lambda s: (-scores[s], s),
    )
    return ranked[:num]


@pytest.mark.parametrize("num", [1, 3, 8])
def test_top_k_equals_sorting_by_hand_with_many_ties(num):
    generator = torch.Generator().manual_seed(0)
    scores_BS = torch.randint(
        0, 3, (50, 300), generator=generator
    ).float()  # long rows: topk's ties would differ
    candidates_BS = (
        torch.rand(50, 300, generator=generator) < torch.linspace(0, 1, 50)[:, None] ** 3
    )
    chosen_BK = top_k_candidates(scores_BS, candidates_BS, num)
    for scores, candidates, chosen in zip(
        scores_BS.tolist(), candidates_BS.tolist(), chosen_BK.tolist(), strict=True
    ):
        expected = by_hand(scores, candidates, num)
        assert chosen == expected + [NOT_CHOSEN] * (num - len(expected))


def test_no_row_has_a_candidate():
    assert top_k_candidates(torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.bool), 3).shape == (
        2,
        0,
    )


def test_probabilities_of_all_ordered_choices_sum_to_one_and_equal_the_products():
    weights = [1.0, 2.0, 5.0, 0.5]
    log_weights_1S, total = torch.tensor([weights], dtype=torch.float64).log(), 0.0
    candidates_1S = torch.tensor([[True, True, False, True]])
    for first, second in itertools.permutations([0, 1, 3], 2):
        log_prob = selection_log_probs(
            log_weights_1S, candidates_1S, torch.tensor([[first, second]])
        ).sum()
        expected = weights[first] / 3.5 * weights[second] / (3.5 - weights[first])
        assert math.exp(log_prob) == pytest.approx(expected, rel=1e-12)
        total += math.exp(log_prob)
    assert total == pytest.approx(1, rel=1e-12)


def test_log_prob_gradient_is_numerically_right():
    """A full row, a row with fewer candidates than places, a row with none."""
    log_weights_BS = torch.randn(
        3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    candidates_BS = torch.tensor(
        [[True] * 6, [False, True, False, False, True, False], [False] * 6]
    )
    chosen_BK = torch.tensor([[4, 0, 5], [NOT_CHOSEN, 4, 1], [NOT_CHOSEN] * 3])
    assert torch.autograd.gradcheck(
        lambda w: selection_log_probs(w, candidates_BS, chosen_BK), log_weights_BS
    )
    selection_log_probs(log_weights_BS, candidates_BS, chosen_BK).sum().backward()
    assert torch.isfinite(log_weights_BS.grad).all()
    assert (log_weights_BS.grad[~candidates_BS] == 0).all() and log_weights_BS.grad[
        0
    ].abs().min() > 0


def test_gumbel_top_k_draws_with_the_stated_probability():
    num_draws = 20_000
    log_weights_1S = torch.tensor([[0.3, -0.5, 1.0, 9.0]], dtype=torch.float64)
    candidates_1S = torch.tensor([[True, True, True, False]])
    uniforms_BS = torch.rand(
        num_draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    chosen_BK = sample_candidates(
        log_weights_1S.expand(num_draws, -1), candidates_1S.expand(num_draws, -1), 2, uniforms_BS
    )
    for pair in itertools.permutations([0, 1, 2], 2):
        frequency = float((chosen_BK == torch.tensor(pair)).all(-1).double().mean())
        expected = float(
            selection_log_probs(log_weights_1S, candidates_1S, torch.tensor([pair])).sum().exp()
        )
        assert frequency == pytest.approx(expected, abs=4 * math.sqrt(expected / num_draws))


def test_noise_is_finite_at_zero():
    assert torch.isfinite(gumbel_noise(torch.tensor([0.0, 0.5]))).all()


@pytest.mark.parametrize("chosen", [[1, 1], [2, 0]])
def test_choices_that_no_draw_can_make_are_errors(chosen):
    with pytest.raises(LatentMismatchError, match="no candidate, or is chosen twice"):
        selection_log_probs(
            torch.zeros(1, 3), torch.tensor([[True, True, False]]), torch.tensor([chosen])
        )
