"""The attention bias against hand tables and against the rule applied pair by pair."""

import pytest
import slow_reading
import torch

from grpo_latent.errors import ConfigError
from grpo_latent.models.visibility import GrowingVisibility, attention_bias
from grpo_latent.trajectory import PositionKind as K

P, V, T, S, Z, F = (int(k) for k in (K.PROMPT, K.VISION, K.TEXT, K.START, K.LATENT, K.FORCED))
MINIMUM = torch.finfo(torch.float32).min


def seen(kinds, visibility, valid=None, query_start=0):
    kinds_BT = torch.tensor([kinds])
    valid_BT = (
        torch.ones_like(kinds_BT, dtype=torch.bool) if valid is None else torch.tensor([valid])
    )
    bias = attention_bias(kinds_BT, valid_BT, visibility, torch.float32, query_start)
    assert set(bias.unique().tolist()) <= {0.0, MINIMUM} and bias.shape[:2] == (1, 1)
    return ["".join("x" if value == 0 else "." for value in row) for row in bias[0, 0].tolist()]


def test_one_latent_a_span_by_hand():
    """question, image, question, start, latent (its span's last: blind), end, answer."""
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
        assert seen(kinds, visibility) == [
            "".join("x" if v == 0 else "." for v in row) for row in expected.tolist()
        ]


def test_query_start_returns_the_last_rows_and_rows_are_independent():
    kinds_BT, valid_BT = torch.randint(0, 6, (3, 9)), torch.rand(3, 9) > 0.2
    whole = attention_bias(kinds_BT, valid_BT, "latents_only", torch.float32)
    assert torch.equal(
        attention_bias(kinds_BT, valid_BT, "latents_only", torch.float32, 6), whole[:, :, 6:]
    )
    for row in range(3):
        alone = attention_bias(
            kinds_BT[row : row + 1], valid_BT[row : row + 1], "latents_only", torch.float32
        )
        assert torch.equal(alone[0], whole[row])


def test_bias_has_the_dtype_and_its_minimum():
    bias = attention_bias(
        torch.zeros(1, 2, dtype=torch.long),
        torch.ones(1, 2, dtype=torch.bool),
        "full",
        torch.bfloat16,
    )
    assert bias.dtype == torch.bfloat16 and bias.min() == torch.finfo(torch.bfloat16).min


def test_unknown_visibility_is_refused():
    with pytest.raises(ConfigError, match="latent.visibility.*'half'|half"):
        attention_bias(
            torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), "half", torch.float32
        )
    with pytest.raises(ConfigError, match="half"):
        GrowingVisibility(
            torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 4, "half", torch.float32
        )


def grown(kinds_NT, valid_NT, visibility, first, keep_at=None, keep=None):
    """Rows from `first` on, as `GrowingVisibility` gives them one by one.

    From `keep_at` on of the rows `keep` only.
    """
    is_latent = kinds_NT == K.LATENT
    before_latent_NT = torch.nn.functional.pad(is_latent[:, 1:], (0, 1))
    rows = torch.arange(len(kinds_NT))
    growing = GrowingVisibility(
        kinds_NT[:, :first], valid_NT[:, :first], kinds_NT.shape[1] + 2, visibility, torch.float32
    )
    for column in range(first, kinds_NT.shape[1]):
        if column == keep_at:
            growing.keep_rows(keep)
            rows = rows[keep]
        yield column, rows, growing.see(kinds_NT[rows, column], before_latent_NT[rows, column])


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_the_row_form_is_the_matrix_form(visibility):
    """Random kinds of completions after random prompts, padded on the left.

    Some rows stop on the way.
    """
    generator = torch.Generator().manual_seed(3)
    keep, num_compared = torch.tensor([0, 2, 5]), 0
    for _ in range(20):
        prompt_NP = torch.randint(0, 2, (6, 5), generator=generator)
        completion_NT = torch.randint(2, 7, (6, 9), generator=generator)
        kinds_NT, valid_NT = (
            torch.cat([prompt_NP, completion_NT], 1),
            torch.ones(6, 14, dtype=torch.bool),
        )
        valid_NT[:, :2] = torch.rand(6, 2, generator=generator) > 0.5
        matrix = attention_bias(kinds_NT, valid_NT, visibility, torch.float32)[:, 0]
        for column, rows, bias_NS in grown(
            kinds_NT, valid_NT, visibility, 5, keep_at=9, keep=keep
        ):
            assert torch.equal(bias_NS, matrix[rows, column, : column + 1])
            num_compared += len(rows)
    assert num_compared == 20 * (4 * 6 + 5 * 3)


def test_the_ablation_hides_images_from_the_rows_that_it_names():
    kinds_NP, valid_NP = (
        torch.tensor([[P, V, P], [P, V, P]]),
        torch.tensor([[False, True, True], [True] * 3]),
    )
    growing = GrowingVisibility(kinds_NP, valid_NP, 6, "full", torch.float32, may_blind=True)
    see = [
        growing.see(torch.tensor([S, T]), is_blind_N=torch.tensor([False, False])),
        growing.see(torch.tensor([Z, F]), is_blind_N=torch.tensor([False, True])),
        growing.see(torch.tensor([F, T]), is_blind_N=torch.tensor([True, False])),
    ]
    text = [
        ["".join("x" if value == 0 else "." for value in row) for row in bias.tolist()]
        for bias in see
    ]
    assert text == [[".xxx", "xxxx"], [".xxxx", "x.xxx"], ["..xxxx", "xxxxxx"]]
