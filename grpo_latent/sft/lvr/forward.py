"""One SFT forward: teacher-forced latents in, the sums of all loss terms out.

    pixels ──vision, once──▶ visual [M, H] ──roi──▶ targets [N, H] ─┬─ inputs at latent positions
                                                                    └─ compared with fed-back h

Positions, masks and the injection are those of replay (`models.replay`): what SFT trains is what a
rollout runs. The vector at t is compared with what the hidden state at t - 1 would feed back.

Legend: B rows, T positions, N latents, M visual tokens, H hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import SpanMechanism
from grpo_latent.latent.mechanisms.lvr import end_vector
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.vision_cache import encoding_once
from grpo_latent.sft.common.images import batch_images, visual_embeddings
from grpo_latent.sft.common.losses import labels_cross_entropy
from grpo_latent.sft.lvr.losses import (
    LVRLossConfig,
    end_bce_sum,
    latent_distances,
    nearest_target_hits,
)
from grpo_latent.sft.lvr.rows import END_VECTOR
from grpo_latent.trajectory import PositionKind


def teacher_forced(visual_MH: Tensor, roi_N: Tensor, vector_H: Tensor | None) -> Tensor:
    """Looks up what stands at the latent positions, [N, H].

    The box's visual tokens, and the end vector where `roi` says so.

    Raises:
        LatentMismatchError: an index without a visual token.
    """
    lowest = 0 if vector_H is None else END_VECTOR
    if bool(((roi_N >= visual_MH.shape[0]) | (roi_N < lowest)).any()):
        raise LatentMismatchError(
            "a latent without a target",
            where="roi",
            got=roi_N.tolist(),
            expected=f"{lowest} <= index < {visual_MH.shape[0]} visual tokens",
        )
    if vector_H is None:
        return visual_MH[roi_N]
    return torch.where(
        (roi_N == END_VECTOR)[:, None], vector_H.to(visual_MH.dtype), visual_MH[roi_N.clamp(min=0)]
    )


def loss_sums(
    adapter: ModelAdapter,
    batch: dict[str, Tensor],
    mechanism: SpanMechanism,
    loss_config: LVRLossConfig,
    target_variance: float = 1.0,
    count_hits: bool = False,
) -> dict[str, Tensor]:
    """Sums the loss terms over a batch of `collate_rows`, float32 scalars.

    Args:
        target_variance: divides the latent distances.
        count_hits: also count predictions whose nearest visual token is their target.

    Returns:
        ce, latent, end: sums over labels, latents and latents.
        hits, num_targets: with `count_hits`, predictions that hit, and predictions that have a
            visual target.
    """
    images = batch_images(batch)
    uses_end_vector = loss_config.end == "latent_end"
    # targets and the forward's own images are the same features
    with encoding_once(adapter.backbone):
        visual_MH = visual_embeddings(adapter, images)
        vector_H = end_vector(adapter.model) if uses_end_vector else None
        inputs_NH = teacher_forced(visual_MH, batch["roi"], vector_H)
        if loss_config.inputs == "shuffled":
            inputs_NH = inputs_NH[torch.randperm(inputs_NH.shape[0]).to(inputs_NH.device)]
        sequences = LatentSequences.build(
            adapter,
            batch["input_ids"],
            batch["kinds"],
            batch["valid"],
            inputs_NH,
            mechanism.visibility,
            images,
        )
        hidden_BTH = replay_hidden(adapter, sequences)

    sums = {"ce": labels_cross_entropy(adapter, hidden_BTH, batch["labels"])}

    row_N, column_N = sequences.recorded_mask_BT.nonzero(as_tuple=True)
    predicted_NH = adapter.make(hidden_BTH[sequences.sources(adapter.mechanism)])
    # a target is a constant, except the end vector, which is learned from both sides
    targets_NH = teacher_forced(visual_MH.detach(), batch["roi"], vector_H)
    sums["latent"] = (
        latent_distances(predicted_NH, targets_NH, loss_config.latent_loss).sum() / target_variance
    )
    if loss_config.end == "mode_switch":
        # every span ends with its end token, so that there is a column behind each latent
        is_last_N = batch["kinds"][row_N, column_N + 1] != PositionKind.LATENT
        sums["end"] = end_bce_sum(
            adapter.logits(hidden_BTH[row_N, column_N]), is_last_N, mechanism.end_id
        )
    if count_hits:
        hits_N = nearest_target_hits(
            predicted_NH, batch["roi"], row_N, visual_MH, batch["num_visual_tokens"]
        )
        sums["hits"] = hits_N.sum().float()
        sums["num_targets"] = (batch["roi"] >= 0).sum().float()
    return sums
