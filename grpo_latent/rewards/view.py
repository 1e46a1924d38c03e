"""What a reward may see of a trajectory: its text without spans, and a summary of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from grpo_latent.trajectory import PositionKind, Trajectory, is_text


@dataclass(frozen=True)
class RewardView:
    """What a reward function is given of a trajectory.

    Attributes:
        solution_str: text of the completion; no latent, delimiter or EOS in it, whatever the
            tokenizer calls special.
        latent: {"num_spans", "num_steps", "num_forced_ends", "span_offsets", "stop_reason"}, the
            `extra_info["latent"]` of reward functions: a summary of what the text leaves out.
            `span_offsets` are characters of `solution_str`. MIXED tokens count nowhere: they are
            sampled text, all of it in `solution_str`, and so is the delimiter that ends them.
    """

    solution_str: str
    latent: dict


def reward_view(
    trajectory: Trajectory, decode: Callable[[Sequence[int]], str], eos_ids: Collection[int]
) -> RewardView:
    """Builds the view from position kinds, so no token id or special-token flag has a say.

    Args:
        decode: ids to text *without* skipping special tokens: `<answer>` may be one.
        eos_ids: dropped where they end the completion.
    """
    kinds = trajectory.kinds
    is_text_T = is_text(kinds)
    text_ids = trajectory.text_ids
    if text_ids and text_ids[-1] in eos_ids:
        text_ids = text_ids[:-1]
    solution_str = decode(text_ids) if text_ids else ""
    num_text_before = is_text_T.cumsum(0)
    offsets = []
    for span in trajectory.spans:
        prefix = text_ids[: int(num_text_before[span.start])]
        offsets.append(min(len(decode(prefix)) if prefix else 0, len(solution_str)))
    latent = {
        "num_spans": len(offsets),
        "num_steps": int(
            ((kinds == PositionKind.LATENT) | (kinds == PositionKind.FED_START)).sum()
        ),
        "num_forced_ends": trajectory.num_forced_ends,
        "span_offsets": offsets,
        "stop_reason": trajectory.stop_reason,
    }
    return RewardView(solution_str, latent)
