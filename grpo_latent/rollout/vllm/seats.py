"""What `table` keeps of each seat, on the CPU and on the device.

Legend: S seats, L positions, C latents of a seat, H hidden, A numbers of aux a latent, D columns
of state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class HostSeats:
    """What the scheduler's announcements say of each seat, on the CPU.

    Attributes:
        sampling_S: index of its way of drawing text.
        num_chosen_S: positions that it has chosen.
        draws_SL: the uniform number of each position.
    """

    sampling_S: np.ndarray
    num_chosen_S: np.ndarray
    draws_SL: np.ndarray

    def doubled(self) -> HostSeats:
        """The same with as many seats once more, all zero."""
        return HostSeats(
            *(np.concatenate([array, np.zeros_like(array)]) for array in vars(self).values())
        )


@dataclass
class DeviceSeats:
    """What each seat has recorded, on the device.

    Attributes:
        steps_S: int64, latent steps a span.
        state_SLD: int32, the state before each position.
        log_probs_SL2: float32, under the full distribution and under the one drawn from.
        latents_SCH: recorded vectors; the last one of a seat is scratch.
        aux_SCA: float32, what the treatment records beside them.
        seeds_S: int64, `seed_bits` of the trajectory's seed.
    """

    steps_S: Tensor
    state_SLD: Tensor
    log_probs_SL2: Tensor
    latents_SCH: Tensor
    aux_SCA: Tensor
    seeds_S: Tensor

    def doubled(self) -> DeviceSeats:
        """The same with as many seats once more, all zero."""
        return DeviceSeats(
            *(torch.cat([tensor, torch.zeros_like(tensor)]) for tensor in vars(self).values())
        )
