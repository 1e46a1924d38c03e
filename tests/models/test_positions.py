"""Positions by hand numbers: text, mRoPE, 1d, padding on all sides, verl's components."""

import pytest
import torch
from latent_cases import case

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.positions import (
    count_on,
    extend_positions,
    next_positions,
    plain_positions,
    text_row,
    with_components,
)

SIDES = {"left": (3, 0), "right": (0, 3), "both": (2, 1)}


def padded(ids, side):
    """One row of `ids` with three padding columns: (ids, validity, where the row stands)."""
    before, after = SIDES[side]
    place = slice(before, before + len(ids))
    ids_BT = torch.zeros(1, before + len(ids) + after, dtype=torch.long)
    valid_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    ids_BT[0, place], valid_BT[0, place] = ids, True
    return ids_BT, valid_BT, place


@pytest.mark.parametrize("side", SIDES)
def test_text_counts_valid_positions(side):
    ids_BT, valid_BT, place = padded(torch.arange(1, 5), side)
    assert plain_positions(valid_BT)[0, place].tolist() == [0, 1, 2, 3]
    assert plain_positions(valid_BT).min() == 0
    position_ids = case("qwen2").adapter.position_ids(ids_BT, valid_BT, None)
    assert position_ids[0, place].tolist() == [0, 1, 2, 3] and next_positions(
        position_ids
    ).tolist() == [4]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mechanism", ["lvr", "coconut"])
def test_an_image_parts_the_components_unless_positions_are_1d(side, mechanism):
    # <im_start> <vision_start> 2 x 3 image tokens <vision_end> ? <im_end>
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7]
    row = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7]
    column = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7]
    c = case("qwen2_5_vl")
    mechanism = c.mechanism(mechanism)
    if mechanism.positions == "1d":
        time = row = column = list(range(11))
    images = c.images(1, size=(28, 42))
    request = c.request("?", images, image_first=True)
    assert len(request.prompt_ids) == 11
    ids_BT, valid_BT, place = padded(request.prompt_ids, side)
    position_ids = ModelAdapter(c.model, mechanism).position_ids(ids_BT, valid_BT, images)
    assert position_ids[:, 0, place].tolist() == [time, row, column]
    assert next_positions(position_ids).tolist() == [time[-1] + 1]


def test_the_next_position_is_after_the_largest_of_any_component():
    # a prompt that ends with an image: its largest position is a column of the image, not the last
    # one's time
    ids_C1P = torch.tensor([[[0, 1, 1]], [[0, 1, 1]], [[0, 2, 3]]])
    assert next_positions(ids_C1P).tolist() == [4]
    assert next_positions(torch.tensor([[0, 0, 1], [0, 1, 2]])).tolist() == [2, 3]


def test_what_follows_counts_used_positions_only():
    valid = torch.tensor([[False, True, True, False], [True, True, True, True]])
    positions = count_on(torch.tensor([4, 7]), valid)
    assert positions[0, 1:3].tolist() == [4, 5] and positions[1].tolist() == [7, 8, 9, 10]
    assert with_components(positions, False) is positions
    assert with_components(positions, True).tolist() == [positions.tolist()] * 3


def test_rows_of_verl_count_on_from_the_prompt():
    assert extend_positions(torch.tensor([0, 1, 2]), 2).tolist() == [0, 1, 2, 3, 4]
    prompt = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 2, 3]])
    assert extend_positions(prompt, 2).tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 1, 4, 5],
        [0, 1, 2, 4, 5],
        [0, 2, 3, 4, 5],
    ]
    assert extend_positions(prompt, 0).tolist() == [[0, 1, 2], [0, 1, 1], [0, 1, 2], [0, 2, 3]]
    assert text_row(torch.tensor([0, 1])).tolist() == [[0, 1]] * 4
