"""Kinds, masks and spans against hand tables and itertools."""

import itertools
import pickle
import random

import pytest
import torch

from grpo_latent.errors import LatentMismatchError
from grpo_latent.trajectory import (
    LatentSpan,
    Trajectory,
    latent_spans,
    prompt_kinds,
    response_mask,
)
from grpo_latent.trajectory import PositionKind as K

KINDS = [K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT, K.TEXT, K.TEXT]


def trajectory(kinds=KINDS, num_latents=None, **changes):
    kinds = torch.tensor(kinds)
    num_latents = int((kinds == K.LATENT).sum()) if num_latents is None else num_latents
    fields = dict(
        prompt_ids=torch.arange(3),
        token_ids=torch.arange(len(kinds)) + 10,
        kinds=kinds,
        latents=torch.zeros(num_latents, 4),
        rollout_log_probs=torch.zeros(len(kinds)),
        sampling_log_probs=torch.zeros(len(kinds)),
        stop_reason="eos",
    )
    return Trajectory(**(fields | changes))


def test_the_modules_example():
    t = trajectory()
    assert t.latent_mask.tolist() == [False, True, True, False, False, False, False]
    assert t.response_mask().tolist() == [True, False, False, False, True, True, True]
    assert t.response_mask(start_is_action=False).tolist() == [False] * 4 + [True] * 3
    assert t.spans == [LatentSpan(1, 2)] and t.text_ids == [14, 15, 16] and t.num_forced_ends == 1


def test_masks_follow_kinds_never_ids():
    """Any ids at all, delimiters' too, give the same masks, spans and text."""
    for token_id in (0, 7, 8, 9, -1):
        t = trajectory(token_ids=torch.full((7,), token_id))
        assert torch.equal(t.response_mask(), trajectory().response_mask()) and t.spans == [
            LatentSpan(1, 2)
        ]
        assert t.text_ids == [token_id] * 3


def test_response_mask_of_every_kind_and_any_shape():
    kinds = torch.arange(6).reshape(2, 3)
    assert response_mask(kinds).tolist() == [[False, False, True], [True, False, False]]
    assert response_mask(kinds, start_is_action=False).tolist() == [
        [False, False, True],
        [False, False, False],
    ]


def test_spans_of_random_sequences_equal_groupby():
    generator = random.Random(0)
    for _ in range(200):
        kinds = [generator.choice([K.TEXT, K.LATENT]) for _ in range(generator.randint(0, 12))]
        pairs = itertools.groupby(enumerate(kinds), key=lambda pair: pair[1])
        runs = [[idx for idx, _ in run] for kind, run in pairs if kind == K.LATENT]
        expected = [LatentSpan(run[0], len(run)) for run in runs]
        assert latent_spans(torch.tensor(kinds, dtype=torch.long)) == expected


def test_prompt_kinds():
    ids = torch.tensor([[1, 5, 6, 6, 7, 2], [1, 1, 2, 2, 2, 5]])
    vision, prompt = int(K.VISION), int(K.PROMPT)
    assert prompt_kinds(ids, {5, 6, 7}).tolist() == [
        [prompt, vision, vision, vision, vision, prompt],
        [prompt] * 5 + [vision],
    ]
    assert (prompt_kinds(ids, frozenset()) == prompt).all()


def test_a_trajectory_may_be_empty_of_latents_or_cut_inside_a_span():
    assert trajectory([K.TEXT]).spans == [] and trajectory([K.START, K.LATENT]).spans == [
        LatentSpan(1, 1)
    ]


@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_number_of_latents_must_fit(num_latents):
    with pytest.raises(LatentMismatchError, match=r"\[2, hidden\]"):
        trajectory(num_latents=num_latents)


def test_pickling_keeps_every_field_to_the_bit():
    before = trajectory(latents=torch.randn(2, 4), group_id="g", seed=3, extra={"note": "x"})
    after = pickle.loads(pickle.dumps(before))
    for name, value in vars(before).items():
        same = (
            torch.equal(getattr(after, name), value)
            if isinstance(value, torch.Tensor)
            else value == vars(after)[name]
        )
        assert same, name
    after.latents.add_(1)  # its own memory, and writable
