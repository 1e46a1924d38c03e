"""Loss terms against numbers worked out by hand."""

import math

import pytest
import torch

from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.losses import cross_entropy_sum
from grpo_latent.sft.lvr.losses import (
    LVRLossConfig,
    end_bce_sum,
    latent_distances,
    nearest_target_hits,
    target_variance,
)

PREDICTED = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
TARGET = torch.tensor([[1.0, 0.0], [4.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mse", [2.0, 12.5]), ("mae", [1.0, 3.5]), ("cosine", [1 - 1 / math.sqrt(5), 1.0])],
)
def test_distances(kind, expected):
    distances = latent_distances(PREDICTED, TARGET, kind)
    torch.testing.assert_close(distances, torch.tensor(expected))
    assert latent_distances(PREDICTED.bfloat16(), TARGET.bfloat16(), kind).dtype == torch.float32


def test_unknown_distance_is_refused():
    with pytest.raises(ConfigError, match="latent_loss"):
        latent_distances(PREDICTED, TARGET, "huber")


def test_cross_entropy_is_a_sum():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = -math.log(0.75) - math.log(0.5)
    assert cross_entropy_sum(logits, torch.tensor([1, 0])).item() == pytest.approx(expected)


def test_end_bce_reads_the_probability_of_end():
    # P(end) = 1/2 and 1/4; the second is the last latent
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(2.0), 0.0]])
    expected = -math.log(1 - 0.5) - math.log(0.25)
    assert end_bce_sum(logits, torch.tensor([False, True]), 0).item() == pytest.approx(expected)
    shifted = logits + torch.tensor(
        [[7.0], [-3.0]]
    )  # a softmax does not see it, a raw logit would
    assert end_bce_sum(shifted, torch.tensor([False, True]), 0).item() == pytest.approx(expected)


def test_variance_is_over_vectors_then_averaged_over_features():
    assert target_variance(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])) == pytest.approx(
        (4.0 + 0.0) / 2
    )
    with pytest.raises(ConfigError, match="too few"):
        target_variance(torch.zeros(1, 2))


def test_hits_compare_with_the_rows_own_visual_tokens():
    visual = torch.tensor([[0.0], [10.0], [1.0], [11.0]])  # rows of two tokens each
    predicted = torch.tensor(
        [[9.0], [9.0], [10.1], [0.9]]
    )  # the third is nearer to a token of the other row
    roi, rows = torch.tensor([1, 0, 3, -1]), torch.tensor([0, 0, 1, 1])
    hits = nearest_target_hits(predicted, roi, rows, visual, torch.tensor([2, 2]))
    assert hits.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latent_loss="l2"), "loss.latent_loss"),
        (dict(end="eos"), "loss.end"),
        (dict(latent_loss_norm="std"), "loss.latent_loss_norm"),
        (dict(latent_weight=-1.0), "latent_weight"),
        (dict(end_weight=float("nan")), "end_weight"),
        (dict(latent_loss="cosine", latent_loss_norm="variance"), "variance"),
    ],
)
def test_malformed_loss_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        LVRLossConfig(**change)
