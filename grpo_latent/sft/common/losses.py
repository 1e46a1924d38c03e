"""What the losses of all methods have in common: cross-entropy over the labelled positions.

Every loss term of SFT is a *sum*, and the trainer owns the denominator: under gradient
accumulation and data parallelism that is the number of labels, or of latents, of the whole
optimizer step.

Legend: B rows, T positions, M labelled positions, H hidden states, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.shift import token_sources
from grpo_latent.sft.common.rows import IGNORED


def cross_entropy_sum(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Sums -log softmax(logits)[label] over M labels, a float32 scalar."""
    return F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")


def labels_cross_entropy(adapter: ModelAdapter, hidden_BTH: Tensor, labels_BT: Tensor) -> Tensor:
    """Sums the cross-entropy over the positions of a batch that have a label, a float32 scalar.

    Args:
        hidden_BTH: last hidden states of the batch's forward.
        labels_BT: int64, label-aligned, `IGNORED` where nothing is scored.
    """
    is_label_BT = labels_BT != IGNORED
    # of labelled positions only: logits of a prompt with an image would take most of the memory
    logits_MV = adapter.logits(hidden_BTH[token_sources(is_label_BT)])
    return cross_entropy_sum(logits_MV, labels_BT[is_label_BT])
