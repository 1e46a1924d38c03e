"""Log-probs and entropies made inside `lm_head`, in chunks, where a completion has a token.

    hidden [B, T, H] ─▶ rows that predict a completion's token [M, H] ─▶ chunks of logits [C, V]
                     ─▶ log-prob, entropy [M, 2] ─▶ scattered into [B, T, 2], which leaves the
                        model in place of its logits

verl makes logits of every position, prompts included, keeps them for the backward, and makes
log-probs and entropies of them, each a copy more: at a vocabulary of 152 k they are most of an
update's memory. Here one chunk's logits exist at a time; the backward makes them again.

It happens within the model's forward because `lm_head` belongs to the FSDP root, which has
gathered it only there; the root also gathers it again before the backward comes back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo_latent.errors import PluginError

CHUNK_ELEMENTS = 1 << 24  # logits that exist at once: 64 MiB of float32


@dataclass(frozen=True)
class Wanted:
    """What the next forward scores.

    Attributes:
        is_scored_BT: bool, True where a hidden state predicts a token that is asked for.
        targets_BT: int64, the token that each position predicts.
        temperatures_BT: float, of sampling; or [B, 1].
        has_entropy: entropies are asked for, too.
    """

    is_scored_BT: Tensor
    targets_BT: Tensor
    temperatures_BT: Tensor
    has_entropy: bool


class ScoredHead:
    """Replaces the forward of one model's output embeddings; does nothing unless armed."""

    def __init__(self, logits: Callable[[Tensor], Tensor], vocab_size: int):
        self._logits = logits
        self._vocab_size = vocab_size
        self._wanted: Wanted | None = None
        self._scores_BT2: Tensor | None = None

    @classmethod
    def install(cls, model: PreTrainedModel) -> ScoredHead:
        """To be called once, before any FSDP wrapping."""
        module = model.get_output_embeddings()
        head = cls(module.forward, module.weight.shape[0])
        module.forward = head._forward
        return head

    def arm(self, wanted: Wanted) -> None:
        """Makes the next forward score; pair with `take` or `disarm`."""
        self._wanted = wanted
        self._scores_BT2 = None

    def disarm(self) -> None:
        self._wanted = self._scores_BT2 = None

    def take(self, logits: Tensor) -> Tensor:
        """float32 [B, T, 2], log-prob and entropy at scored positions, 0 elsewhere; disarms.

        Args:
            logits: what the model returned under that name.

        Raises:
            PluginError: the model made something else of what its head returned.
        """
        scores_BT2 = self._scores_BT2
        self.disarm()
        if scores_BT2 is None or logits is not scores_BT2:
            raise PluginError(
                "the model changes its logits behind lm_head",
                where="latent.score_in_head",
                got="no call of lm_head" if scores_BT2 is None else tuple(logits.shape),
                expected="the head's own output as `logits`",
                fix="Set latent.score_in_head=false: verl then scores logits of all positions.",
            )
        return scores_BT2

    def _forward(self, hidden: Tensor) -> Tensor:
        wanted = self._wanted
        # the sources of latents ask for logits of their own, without a dimension of positions
        if wanted is None or hidden.shape[:-1] != wanted.is_scored_BT.shape:
            return self._logits(hidden)
        # one is always scored: without any the backward would not reach the decoder, and the
        # collectives of other ranks would wait for this one
        is_scored_BT = wanted.is_scored_BT.clone()
        is_scored_BT[0, 0] = True
        rows_M, columns_M = is_scored_BT.nonzero(as_tuple=True)
        hidden_MH = hidden[rows_M, columns_M]
        targets_M = wanted.targets_BT[rows_M, columns_M]
        temperatures_M = wanted.temperatures_BT.expand(is_scored_BT.shape)[rows_M, columns_M]
        scores_M2 = self._in_chunks(hidden_MH, targets_M, temperatures_M, wanted.has_entropy)
        scores_BT2 = scores_M2.new_zeros(*is_scored_BT.shape, 2)
        self._scores_BT2 = scores_BT2.index_put((rows_M, columns_M), scores_M2)
        return self._scores_BT2

    def _in_chunks(
        self, hidden_MH: Tensor, targets_M: Tensor, temperatures_M: Tensor, has_entropy: bool
    ) -> Tensor:
        size = max(1, CHUNK_ELEMENTS // self._vocab_size)
        chunks = zip(
            hidden_MH.split(size), targets_M.split(size), temperatures_M.split(size), strict=True
        )
        scores = []
        for chunk in chunks:
            if torch.is_grad_enabled():
                # without reentrance: hooks of FSDP stand around this backward
                scored: Tensor = checkpoint(self._score, *chunk, has_entropy, use_reentrant=False)
            else:
                scored = self._score(*chunk, has_entropy)
            scores.append(scored)
        return torch.cat(scores)

    def _score(
        self, hidden_CH: Tensor, targets_C: Tensor, temperatures_C: Tensor, has_entropy: bool
    ) -> Tensor:
        """float32 [C, 2]."""
        logits_CV = self._logits(hidden_CH).float() / temperatures_C[:, None]
        log_total_C = logits_CV.logsumexp(-1)
        log_probs_C = logits_CV.gather(-1, targets_C[:, None])[:, 0] - log_total_C
        entropies_C = torch.zeros_like(log_probs_C)
        if has_entropy:
            probs_CV = (logits_CV - log_total_C[:, None]).exp()
            entropies_C = log_total_C - (probs_CV * logits_CV).sum(-1)
        return torch.stack((log_probs_C, entropies_C), -1)
