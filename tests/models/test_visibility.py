"""The attention bias against hand tables and against the rule applied pair by pair."""

import pytest
import slow_reading
import torch

from grpo_latent.errors import ConfigError
from grpo_latent.models.visibility import attention_bias
from grpo_latent.trajectory import PositionKind as K

P, V, T, S, Z, F = (int(k) for k in (K.PROMPT, K.VISION, K.TEXT, K.START, K.LATENT, K.FORCED))
MINIMUM = torch.finfo(torch.float32).min


def seen(kinds, visibility, valid=None, query_start=0):
    kinds_BT = torch.tensor([kinds])
    valid_BT = torch.ones_like(kinds_BT, dtype=torch.bool) if valid is None else torch.tensor([valid])
    bias = attention_bias(kinds_BT, valid_BT, visibility, torch.float32, query_start)
    assert set(bias.unique().tolist()) <= {0.0, MINIMUM} and bias.shape[:2] == (1, 1)
    return ["".join("x" if value == 0 else "." for value in row) for row in bias[0, 0].tolist()]


def test_one_latent_a_span_by_hand():
    """question, image, question, start, latent, end, answer; the latent is its span's last: blind."""
    assert seen([P, V, P, S, Z, F, T], "latents_only") == [
        "x......",  # question
        "xx.....",  # image
        "x.x....",  # question after the image: blind
        "xxxx...",  # start: sighted
        "x.x.x..",  # latent
        "x.x.xx.",  # end
        "x.x.xxx",  # answer
    ]


def test_two_latents_and_a_second_span_by_hand():
    assert seen([V, S, Z, Z, F, S, Z, F, T], "latents_only") == [
        "x........",
        "xx.......",
        "xxx......",  # followed by another latent: sighted
        "..xx.....",
        "..xxx....",
        "xxxxxx...",  # the second start sees all
        "..xxx.x..",
        "..xxx.xx.",
        "..xxx.xxx",
    ]


def test_padding_is_seen_by_itself_only():
    assert seen([P, P, V, T, P], "full", [False, True, True, True, False]) == [
        "x....",
        ".x...",
        ".xx..",
        ".xxx.",
        ".xxxx",
    ]


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_every_pair_of_random_sequences_follows_the_rule(visibility):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kinds = torch.randint(0, 6, (12,), generator=generator).tolist()
        expected = slow_reading.mask(kinds, visibility)[0, 0]
        assert seen(kinds, visibility) == ["".join("x" if v == 0 else "." for v in row) for row in expected.tolist()]


def test_query_start_returns_the_last_rows_and_rows_are_independent():
    kinds_BT, valid_BT = torch.randint(0, 6, (3, 9)), torch.rand(3, 9) > 0.2
    whole = attention_bias(kinds_BT, valid_BT, "latents_only", torch.float32)
    assert torch.equal(attention_bias(kinds_BT, valid_BT, "latents_only", torch.float32, 6), whole[:, :, 6:])
    for row in range(3):
        alone = attention_bias(kinds_BT[row : row + 1], valid_BT[row : row + 1], "latents_only", torch.float32)
        assert torch.equal(alone[0], whole[row])


def test_bias_has_the_dtype_and_its_minimum():
    bias = attention_bias(
        torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), "full", torch.bfloat16
    )
    assert bias.dtype == torch.bfloat16 and bias.min() == torch.finfo(torch.bfloat16).min


def test_unknown_visibility_is_refused():
    with pytest.raises(ConfigError, match="latent.visibility.*'half'|half"):
        attention_bias(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), "half", torch.float32)
