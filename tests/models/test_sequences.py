"""`LatentSequences`: what each way to build them makes, by hand; invariants of their parts."""

import dataclasses

import pytest
import torch
from latent_cases import case

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.sequences import LatentSequences, collate, prompt_sequences
from grpo_latent.models.visibility import attention_bias
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

H = 32


def trajectory(prompt_ids, kinds, first=1.0):
    """Its latents are first, first + 1, … in all components."""
    kinds = torch.tensor([int(kind) for kind in kinds])
    num = int(((kinds == K.LATENT) | (kinds == K.SELECTED)).sum())
    return Trajectory(
        prompt_ids=prompt_ids,
        token_ids=torch.arange(len(kinds)) + 50,
        kinds=kinds,
        latents=(first + torch.arange(num))[:, None].expand(-1, H).float(),
        rollout_log_probs=torch.zeros(len(kinds)),
        sampling_log_probs=torch.zeros(len(kinds)),
        stop_reason="length",
        selected_idx=torch.arange(int((kinds == K.SELECTED).sum())),
    )


def two_rows(side="both", visibility="full"):
    """Prompts of 2 and 3 ids; completions of 4 (two latents) and 2 positions (one)."""
    rows = [
        trajectory(torch.tensor([10, 11]), [K.START, K.LATENT, K.LATENT, K.FORCED]),
        trajectory(torch.tensor([20, 21, 22]), [K.START, K.LATENT], first=5.0),
    ]
    return collate(rows, [None, None], case("qwen2").adapter, visibility, side)


@pytest.mark.parametrize(
    ("side", "ids", "positions"),
    [
        (
            "right",
            [[10, 11, 50, 51, 52, 53], [20, 21, 22, 50, 51, 0]],
            [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4]],
        ),
        (
            "left",
            [[10, 11, 50, 51, 52, 53], [0, 20, 21, 22, 50, 51]],
            [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]],
        ),
        (
            "both",
            [[0, 10, 11, 50, 51, 52, 53], [20, 21, 22, 50, 51, 0, 0]],
            [[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4, 4]],
        ),
    ],
)
def test_collate_by_hand(side, ids, positions):
    sequences = two_rows(side)
    assert sequences.input_ids_BT.tolist() == ids and sequences.position_ids.tolist() == positions
    assert sequences.valid_BT.tolist() == [[token_id != 0 for token_id in row] for row in ids]
    kinds = {0: K.PROMPT, 10: K.PROMPT, 50: K.START, 51: K.LATENT, 52: K.LATENT, 53: K.FORCED}
    assert sequences.kinds_BT.tolist() == [
        [kinds.get(token_id, K.PROMPT) for token_id in row] for row in ids
    ]
    assert sequences.latents_NH[:, 0].tolist() == [1.0, 2.0, 5.0]
    assert sequences.fed_ids_BT.tolist() == [
        [0 if i in (51, 52) else i for i in row] for row in ids
    ]
    assert sequences.action_mask_BT().nonzero().tolist() == [
        [0, ids[0].index(50)],
        [1, ids[1].index(50)],
    ]
    assert not sequences.action_mask_BT(start_is_action=False).any()
    assert sequences.sources(Mechanism())[0].tolist() == [0, 0, 1]
    assert sequences.sources(Mechanism())[1].tolist() == [
        ids[0].index(50),
        ids[0].index(51),
        ids[1].index(50),
    ]
    assert (
        sequences.is_made_N.all()
        and sequences.selected_idx_M is None
        and sequences.latent_aux_MA is None
    )


def test_prompts_stand_to_the_left_of_one_column():
    c = case("qwen2_5_vl")
    requests = [
        c.request("? red ? ? ? ? ? ? ? ? ?"),
        c.request("?", c.images(1), image_first=True),
    ]
    prompts = [request.prompt_ids for request in requests]
    sequences = prompt_sequences(
        prompts, [request.images for request in requests], c.adapter, "latents_only"
    )
    length = max(len(ids) for ids in prompts)
    for row, ids in enumerate(prompts):
        start = length - len(ids)
        assert sequences.input_ids_BT[row].tolist() == [0] * start + ids.tolist()
        assert sequences.valid_BT[row].tolist() == [False] * start + [True] * len(ids)
        assert torch.equal(sequences.kinds_BT[row, start:], c.adapter.prompt_kinds(ids))
    assert (sequences.kinds_BT[1] == K.VISION).sum() == 8 and sequences.latents_NH.shape == (
        0,
        c.adapter.hidden_size,
    )
    assert torch.equal(sequences.images.pixel_values, requests[1].images.pixel_values)


@pytest.mark.parametrize("placeholder", ["<|image_pad|>", 10**9])
def test_no_placeholder_moves_a_position(placeholder):
    c = case("qwen2_5_vl")
    request = c.request("?", c.images(1), image_first=True)
    given = trajectory(request.prompt_ids, [K.START, K.LATENT, K.TEXT])
    sequences = collate([given], [request.images], c.adapter, "full")
    token_id = c.token_id(placeholder) if isinstance(placeholder, str) else placeholder
    token_ids = given.token_ids.masked_fill(given.latent_mask, token_id)
    other = collate(
        [dataclasses.replace(given, token_ids=token_ids)], [request.images], c.adapter, "full"
    )
    assert torch.equal(other.position_ids, sequences.position_ids)
    assert sequences.position_ids[:, 0, -3:].tolist() == [[8, 9, 10]] * 3


def test_masks_follow_the_visibility():
    full, closed = two_rows(), two_rows(visibility="latents_only")
    assert full.attention_mask(torch.float32).tolist() == full.valid_BT.long().tolist()
    for sequences in (full, closed):
        expected = attention_bias(
            sequences.kinds_BT, sequences.valid_BT, sequences.visibility, torch.float32
        )
        assert torch.equal(sequences.attention_bias(torch.float32), expected)
    assert torch.equal(closed.attention_mask(torch.float32), closed.attention_bias(torch.float32))
    assert not torch.equal(
        full.attention_bias(torch.float32), closed.attention_bias(torch.float32)
    )


def test_selected_vectors_are_recorded_and_not_made():
    c = case("qwen2_5_vl")
    request = c.request("?", c.images(1), image_first=True)
    given = trajectory(request.prompt_ids, [K.SELECTED, K.SELECTED, K.LATENT, K.TEXT])
    sequences = collate([given], [request.images], c.adapter, "full")
    num = len(request.prompt_ids)
    assert sequences.is_made_N.tolist() == [
        False,
        False,
        True,
    ] and sequences.selected_idx_M.tolist() == [0, 1]
    assert [part.tolist() for part in sequences.sources(Mechanism())] == [[0], [num - 1]]


def test_the_first_columns_keep_the_vectors_that_stand_there():
    sequences = two_rows("both")
    # columns: . 10 11 START z1 | z2 FORCED      20 21 22 START z5 | .
    part = sequences.first_columns(5)
    assert part.latents_NH[:, 0].tolist() == [1.0, 5.0] and part.position_ids.shape == (2, 5)
    assert torch.equal(part.kinds_BT, sequences.kinds_BT[:, :5]) and part.valid_BT.shape == (2, 5)
    assert torch.equal(sequences.first_columns(7).latents_NH, sequences.latents_NH)


def test_the_first_columns_see_what_they_see_in_the_whole():
    """Column 4 is a latent that another follows, behind the cut: still sighted."""
    sequences = two_rows("both", "latents_only")
    whole = sequences.attention_bias(torch.float32)
    for length in range(1, 8):
        part = sequences.first_columns(length)
        assert torch.equal(part.attention_bias(torch.float32), whole[..., :length, :length])
        assert torch.equal(part.first_columns(1).attention_bias(torch.float32), whole[..., :1, :1])
    assert whole[0, 0, 4, 3] == 0 and whole[1, 0, 4, 3] < 0, "with a latent behind it, and without"


def test_what_is_refused():
    sequences = two_rows()
    with pytest.raises(LatentMismatchError, match=r"LatentSequences.*\(2, 32\).*\[3, hidden\]"):
        sequences.with_latents(sequences.latents_NH[:2])
    with pytest.raises(LatentMismatchError, match="recorded latents do not match"):
        sequences.with_latents(sequences.latents_NH[0])
    with pytest.raises(ConfigError, match="half"):
        dataclasses.replace(sequences, visibility="half")
    # a latent position at padding is none
    valid_BT = sequences.valid_BT.clone()
    valid_BT[1, 4] = False
    kept = dataclasses.replace(sequences, valid_BT=valid_BT, latents_NH=sequences.latents_NH[:2])
    assert isinstance(kept, LatentSequences) and kept.sources(Mechanism())[0].tolist() == [0, 0]
