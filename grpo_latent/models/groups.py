"""Which rows of a batch are trajectories of one prompt.

Legend: B rows, R groups, P prompt positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError


def number_groups(names: Sequence[Hashable]) -> tuple[int, ...]:
    """A number a row, equal where the names are; from 0 in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in names)


def first_rows(groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(first row of each group [R], in order of appearance; its group among them, of each row).

    Both int64.
    """
    row_to_group = number_groups(groups)
    first_R = [row_to_group.index(group) for group in range(max(row_to_group) + 1)]
    return torch.tensor(first_R), torch.tensor(row_to_group)


def first_of_rows(groups: Sequence[int]) -> Tensor:
    """int64 [B], the first row of each row's group."""
    first_R, row_to_group_B = first_rows(groups)
    return first_R[row_to_group_B]


def check_groups(prompts: Sequence[Tensor], groups: Sequence[int], where: str) -> None:
    """Raises `LatentMismatchError` where rows of one group have not one prompt, ids [P] each."""
    first_B = first_of_rows(groups)
    ids_BP = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=-1)
    is_other_B = (ids_BP != ids_BP[first_B.to(ids_BP.device)]).any(-1)
    if not bool(is_other_B.any()):
        return
    row = int(is_other_B.nonzero()[0])
    first = int(first_B[row])
    raise LatentMismatchError(
        "trajectories of one group have different prompts",
        where=f"{where}, rows {first} and {row}, group {groups[row]}",
        got=f"{len(prompts[first])} and {len(prompts[row])} ids",
        expected="the same ids",
        fix="Number trajectories by their data row, or set latent.share_prompt=false.",
    )
