"""What the host knows of a batch that decodes: which rows go on, and which vectors were made.

    Progress       asks at once, which costs nothing where host and device are one
    LateProgress   asks for the step before: by the time that the host has issued a step, a device
                   that works behind it has long made the flags of that one

A row that has stopped idles along until the host knows of it; a vector is recorded when it does.

Legend: N rows, M vectors of a step, H hidden, A numbers of aux a latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.rollout.chosen_rows import ChosenRows
from grpo_latent.rollout.recorder import Recorder


@dataclass(frozen=True)
class MadeVectors:
    """What one step has made.

    Attributes:
        rows: for which it was made.
        record_N: int64, the record row of each row.
        latents_MH: as fed and recorded.
        aux_MA: what the treatment records beside each; None for nothing.
        densities_M: float32, their log-densities; None where the policy does not act at them.
    """

    rows: ChosenRows
    record_N: Tensor
    latents_MH: Tensor
    aux_MA: Tensor | None
    densities_M: Tensor | None


class Progress:
    """Asks the device at each step.

    Args:
        recorder: gets the vectors.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def tell(self, done_N: Tensor, made: MadeVectors | None) -> bool:
        """Takes a step's flags and vectors; returns whether a row goes on."""
        if made is not None:
            self._recorder.add_latents(made.rows.take(made.record_N), made.latents_MH, made.aux_MA)
        self._done_N = done_N
        self._num_active = int((~done_N).sum())
        return self._num_active > 0

    def rows_to_keep(self) -> Tensor | None:
        """int64, the rows to go on with, where half of the batch has stopped; else None."""
        # dropping rows copies the keys and values of all that stay, so not at every stop
        if self._num_active * 2 > self._done_N.shape[0]:
            return None
        return (~self._done_N).nonzero()[:, 0]

    def finish(self) -> None:
        """Takes in what is still under way."""


class LateProgress:
    """Asks for the step before; otherwise as `Progress`.

    The number of rows that go on is a power of two, rows that have stopped among them, so that few
    shapes occur.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._under_way: tuple[LateFlags, MadeVectors | None] | None = None
        self._kept: list[int] | None = None  # since the flags that are under way
        self._active: list[int] = []

    def tell(self, done_N: Tensor, made: MadeVectors | None) -> bool:
        is_made_N = torch.zeros_like(done_N) if made is None else made.rows.mask_N
        before, self._under_way = (
            self._under_way,
            (LateFlags(torch.stack([done_N, is_made_N])), made),
        )
        self._num_rows, self._device = done_N.shape[0], done_N.device
        is_done = [False] * self._num_rows
        if before is not None:
            is_done = self._take(*before)
            if self._kept is not None:
                is_done = [is_done[row] for row in self._kept]
        self._kept = None
        self._active = [row for row, done in enumerate(is_done) if not done]
        self._stopped = [row for row, done in enumerate(is_done) if done]
        return bool(self._active)

    def rows_to_keep(self) -> Tensor | None:
        num_active = len(self._active)
        num_kept = 1 << max(0, num_active - 1).bit_length()
        if num_active * 2 > self._num_rows or num_kept >= self._num_rows:
            return None
        self._kept = sorted(self._active + self._stopped[: num_kept - num_active])
        return _on_device(self._kept, self._device)

    def finish(self) -> None:
        if self._under_way is not None:
            self._take(*self._under_way)
        self._under_way = None

    def _take(self, flags: LateFlags, made: MadeVectors | None) -> list[bool]:
        """Records a step's vectors, now that their number is known; its rows that had stopped."""
        is_done, is_made = flags.read()
        rows = [row for row, is_one in enumerate(is_made) if is_one]
        if rows and made is not None:
            rows_M = _on_device(rows, made.record_N.device)
            aux_MA = None if made.aux_MA is None else made.aux_MA[rows_M]
            self._recorder.add_latents(made.record_N[rows_M], made.latents_MH[rows_M], aux_MA)
        return is_done


class LateFlags:
    """Flags on their way to the host."""

    def __init__(self, flags: Tensor):
        self._event = None
        if flags.device.type != "cuda":
            self._flags = flags
            return
        self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[list[bool]]:
        """The flags; waits for them only."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()


def _on_device(rows: list[int], device: torch.device) -> Tensor:
    """int64 [M], sent without a wait."""
    index_M = torch.tensor(rows)
    if device.type == "cuda":
        index_M = index_M.pin_memory()
    return index_M.to(device, non_blocking=True)
