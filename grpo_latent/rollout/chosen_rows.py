"""Some rows of a batch that decodes, picked by index or by mask.

    by index   only these rows are computed; the host must know how many they are, so that it
               waits for the device
    by mask    all rows are computed, and what the others give is thrown away: nothing waits, and
               every step has the same shapes

Legend: N rows, M of them that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChosenRows:
    """Rows where `mask_N` is True.

    Attributes:
        mask_N: bool.
        index_M: int64, these rows; None where all are computed, M = N.
    """

    mask_N: Tensor
    index_M: Tensor | None

    @staticmethod
    def of(mask_N: Tensor, is_static: bool) -> ChosenRows:
        """By mask if `is_static`, else by index."""
        return ChosenRows(mask_N, None if is_static else mask_N.nonzero()[:, 0])

    @property
    def is_none(self) -> bool:
        """Whether there are known to be none."""
        return self.index_M is not None and self.index_M.numel() == 0

    @property
    def is_all(self) -> bool:
        """Whether they are known to be all."""
        return self.index_M is not None and self.index_M.numel() == self.mask_N.numel()

    @property
    def rows_M(self) -> Tensor:
        """int64, the rows that are computed."""
        if self.index_M is not None:
            return self.index_M
        return torch.arange(self.mask_N.shape[0], device=self.mask_N.device)

    @property
    def is_chosen_M(self) -> Tensor:
        """bool, which of the rows that are computed are meant."""
        return self.take(self.mask_N)

    def take(self, values_N: Tensor) -> Tensor:
        """What `values_N` [N, …] has for the rows that are computed."""
        return values_N if self.index_M is None else values_N[self.index_M]

    def put(self, target_N: Tensor, values_M: Tensor) -> Tensor:
        """A copy of `target_N` [N, …] with `values_M` [M, …] in these rows."""
        if self.index_M is not None:
            return target_N.index_copy(0, self.index_M, values_M)
        mask = self.mask_N.view(-1, *[1] * (target_N.ndim - 1))
        return torch.where(mask, values_M, target_N)

    def join(
        self, values_M: Tensor, other: ChosenRows, others_M: Tensor
    ) -> tuple[ChosenRows, Tensor]:
        """These and other rows, with the values of both."""
        mask_N = self.mask_N | other.mask_N
        if self.index_M is None or other.index_M is None:
            return ChosenRows(mask_N, None), other.put(values_M, others_M)
        index_M = torch.cat([self.index_M, other.index_M])
        return ChosenRows(mask_N, index_M), torch.cat([values_M, others_M])
