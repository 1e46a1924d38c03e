"""Tensors that share their first dimension, as one struct: rows are dropped in one place."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

Rows = TypeVar("Rows", bound="RowTensors")


@dataclasses.dataclass
class RowTensors:
    """Base of dataclasses whose fields are tensors [N, …], N the rows of a batch.

    A field is None where a batch has no such thing.

    >>> import torch
    >>> @dataclasses.dataclass
    ... class Scores(RowTensors):
    ...     scores_N: Tensor
    ...     masks_NT: Tensor | None = None
    >>> Scores(torch.tensor([3, 4, 5])).keep(torch.tensor([2, 0]))
    Scores(scores_N=tensor([5, 3]), masks_NT=None)
    """

    def keep(self: Rows, rows_M: Tensor) -> Rows:
        """The rows `rows_M`, int64, in this order; a row may be named more than once."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(
            **{name: None if value is None else value[rows_M] for name, value in values.items()}
        )
