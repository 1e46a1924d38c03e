"""What token ids and kinds mean while a batch decodes.

Legend: V vocabulary, K kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.rollout.sampling import Bans
from grpo_latent.trajectory import PositionKind, is_text, made_mask


@dataclass(frozen=True)
class TokenRules:
    """The rules of one engine.

    Attributes:
        bans_2: never sampled; the second row is for trajectories that may not open another span.
        is_eos_V: bool [V].
        placeholder_ids_K: int64, by `PositionKind`: the id that stands where nothing is sampled.
        is_text_K, is_made_K: bool, by `PositionKind`: a token is sampled there; a vector is made
            there.
    """

    bans_2: Bans
    is_eos_V: Tensor
    placeholder_ids_K: Tensor
    is_text_K: Tensor
    is_made_K: Tensor

    @classmethod
    def build(
        cls,
        mechanism: Mechanism,
        eos_ids: Iterable[int],
        banned_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> TokenRules:
        """The rules of a mechanism, whose `opening_ids` are banned where no span may open."""
        is_eos_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        is_eos_V[sorted(eos_ids)] = True
        kinds_K = torch.arange(len(PositionKind), device=device)
        placeholder_ids = [mechanism.placeholder_id(kind) for kind in PositionKind]
        return cls(
            Bans.build(banned_ids, mechanism.opening_ids, device),
            is_eos_V,
            torch.tensor(placeholder_ids, device=device),
            is_text(kinds_K),
            made_mask(kinds_K),
        )
