"""Position ids of a sequence: the rule of rollout, replay, SFT and verl's engine.

    prompt        as the model numbers it: text 0, 1, 2, …; with mRoPE an image has three
                  components (time, row, column)
    completion    counts on from the largest position of its prompt, as text, latents included

A text token, an image of 1 × 2 tokens and two completion positions, with mRoPE and as verl's rows
have them:

    text      0  1  2  3  4      verl only: places of the sequence
    time      0  1  1  3  4
    row       0  1  1  3  4
    column    0  1  2  3  4

With positions `1d` an image counts as text, in all components.

Legend: B sequences, P prompt positions, T positions, L positions that follow, C components (mRoPE:
3).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ROPE_COMPONENTS = 3


def plain_positions(valid_BT: Tensor) -> Tensor:
    """int64 [B, T]: places among the valid positions.

    Padding, which may stand on either side, has some position >= 0.
    """
    return (valid_BT.long().cumsum(-1) - 1).clamp(min=0)


def with_components(positions_BT: Tensor, has_mrope: bool) -> Tensor:
    """Positions of text as a model takes them: [3, B, T], all equal, for mRoPE, else [B, T]."""
    return positions_BT[None].expand(NUM_ROPE_COMPONENTS, -1, -1) if has_mrope else positions_BT


def next_positions(position_ids: Tensor) -> Tensor:
    """int64 [B]: the position after each sequence's largest; of ids [B, P] or [C, B, P]."""
    largest_B = position_ids.amax(-1) if position_ids.ndim == 2 else position_ids.amax((0, -1))
    return largest_B + 1


def count_on(next_position_B: Tensor, valid_BL: Tensor) -> Tensor:
    """int64 [B, L]: positions of what follows, one a valid position from `next_position_B` on."""
    return next_position_B[:, None] + plain_positions(valid_BL)


def extend_positions(prompt_positions: Tensor, num_tokens: int) -> Tensor:
    """Positions of one prompt and its completion, as a row of verl's.

    Args:
        prompt_positions: int64 [P] or [3, P].

    Returns:
        int64 [P + T], or [4, P + T] with the places of the sequence first.
    """
    following_1T = count_on(
        next_positions(prompt_positions[..., None, :]), torch.ones(1, num_tokens)
    )
    if prompt_positions.ndim == 1:
        return torch.cat([prompt_positions, following_1T[0]])
    rope = torch.cat([prompt_positions, following_1T.expand(NUM_ROPE_COMPONENTS, -1)], dim=1)
    return torch.cat([torch.arange(rope.shape[1])[None], rope])


def text_row(positions_T: Tensor) -> Tensor:
    """A row of text alone, [T], among verl's rows of a vision model: int64 [4, T]."""
    return positions_T.expand(1 + NUM_ROPE_COMPONENTS, -1).contiguous()
