"""Replay: a forward that feeds recorded latents, and `recompute_latents`: a forward that makes the current model's own.

    trajectories ──collate──▶ ReplayBatch ──replay──▶ log_probs [B, T], hidden [B, T, H]

Everything is label-aligned: `log_probs_BT[b, t]` scores the token at position t given those before it, and the latent at
position t is made of the hidden state before it (through the head). `models.shift` makes the shift.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.head import feedback
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.shift import is_source, last_hidden, token_sources
from grpo_latent.models.visibility import attention_bias
from grpo_latent.trajectory import PositionKind, Trajectory, latent_mask, response_mask


@dataclass(frozen=True)
class ReplayBatch:
    """Whole sequences, prompt and completion, padded to one length T.

    Attributes:
        input_ids_BT: int64 [B, T].
        kinds_BT: int64 [B, T], `PositionKind`.
        valid_BT: bool [B, T], False at padding.
        latents_NH: float [N, H], row-major over the latent positions.
        images: pixels of all rows in order, or None.
        selected_idx_M: int64, row-major over the SELECTED positions: which image position of its row, from 0; None where
            there are none.
        latent_aux_MA: float32, row-major over the LATENT positions, as recorded; None where nothing was.
    """

    input_ids_BT: Tensor
    kinds_BT: Tensor
    valid_BT: Tensor
    latents_NH: Tensor
    images: ImageInputs | None = None
    selected_idx_M: Tensor | None = None
    latent_aux_MA: Tensor | None = None

    def __post_init__(self):
        num_latents = int(self.latent_mask_BT.sum())
        if self.latents_NH.ndim != 2 or self.latents_NH.shape[0] != num_latents:
            raise LatentMismatchError(
                "recorded latents do not match the latent positions",
                where="ReplayBatch",
                got=f"latents of shape {tuple(self.latents_NH.shape)}",
                expected=f"[{num_latents}, hidden]",
            )

    @property
    def latent_mask_BT(self) -> Tensor:
        return latent_mask(self.kinds_BT) & self.valid_BT

    @property
    def fed_ids_BT(self) -> Tensor:
        """`input_ids_BT` as a model may read them: 0 at latent positions, where a recorded placeholder may be any id,
        an image placeholder or one outside the vocabulary included."""
        return self.input_ids_BT.masked_fill(self.latent_mask_BT, 0)

    def action_mask_BT(self, start_is_action: bool = True) -> Tensor:
        """bool [B, T], positions whose log-prob counts."""
        return response_mask(self.kinds_BT, start_is_action) & self.valid_BT


def collate(
    trajectories: list[Trajectory], images: list[ImageInputs | None], adapter: ModelAdapter, padding_side: str = "right"
) -> ReplayBatch:
    """Pads trajectories to one batch on the adapter's device.

    Args:
        images: of each trajectory's prompt, as in its request.
        padding_side: `right`, `left`, or `both`: prompts padded left and completions right, so that all completions
            begin in one column.
    """
    if padding_side not in ("left", "right", "both"):
        raise ConfigError("unknown value", where="padding_side", got=padding_side, expected="left, right or both")
    if not trajectories or len(trajectories) != len(images):
        got = f"{len(trajectories)} trajectories, {len(images)} entries of images"
        raise LatentMismatchError(
            "nothing to collate", where="collate", got=got, expected="one entry each, at least one"
        )
    for row, (trajectory, pixels) in enumerate(zip(trajectories, images, strict=True)):
        adapter.check_prompt(trajectory.prompt_ids, pixels, f"trajectory {row} (group {trajectory.group_id!r})")
    lengths = [len(t.prompt_ids) + len(t.token_ids) for t in trajectories]
    longest_prompt = max(len(t.prompt_ids) for t in trajectories)
    length = max(lengths)
    if padding_side == "both":
        length = longest_prompt + max(len(t.token_ids) for t in trajectories)
    starts = {
        "left": [length - n for n in lengths],
        "right": [0] * len(lengths),
        "both": [longest_prompt - len(t.prompt_ids) for t in trajectories],
    }[padding_side]
    input_ids_BT = torch.zeros(len(trajectories), length, dtype=torch.long)
    kinds_BT = torch.zeros_like(input_ids_BT)
    valid_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for row, trajectory in enumerate(trajectories):
        ids = torch.cat([trajectory.prompt_ids, trajectory.token_ids])
        where = slice(starts[row], starts[row] + len(ids))
        input_ids_BT[row, where] = ids
        kinds_BT[row, where] = torch.cat([adapter.prompt_kinds(trajectory.prompt_ids), trajectory.kinds])
        valid_BT[row, where] = True
    device = adapter.device
    latents_NH = torch.cat([t.latents for t in trajectories]).to(device)
    pixels = ImageInputs.concat(images)
    if pixels is not None:
        pixels = pixels.to(device)
    selected_idx_M = torch.cat([t.selected_idx for t in trajectories]).to(device)
    aux = [t.latent_aux for t in trajectories if t.latent_aux.shape[1]]
    return ReplayBatch(
        input_ids_BT.to(device),
        kinds_BT.to(device),
        valid_BT.to(device),
        latents_NH,
        pixels,
        selected_idx_M if selected_idx_M.numel() else None,
        torch.cat(aux).to(device) if aux else None,
    )


def replay_hidden(adapter: ModelAdapter, batch: ReplayBatch, visibility: str) -> Tensor:
    """Hidden states [B, T, H] of the recorded sequences, latents as recorded. Gradients flow, into the latents too."""
    input_ids_BT = batch.fed_ids_BT
    position_ids = adapter.position_ids(input_ids_BT, batch.valid_BT, batch.images)
    # `full` leaves the mask to the model, which may then use its fastest causal kernel
    mask = (
        batch.valid_BT.long()
        if visibility == "full"
        else attention_bias(batch.kinds_BT, batch.valid_BT, visibility, adapter.dtype)
    )
    injector = LatentInjector.install(adapter.model)
    with injector.inject(batch.latent_mask_BT, batch.latents_NH):
        return adapter.forward_hidden(input_ids_BT, mask, position_ids, batch.images)


def token_log_probs(
    adapter: ModelAdapter, batch: ReplayBatch, hidden_BTH: Tensor, temperature: float, mask_BT: Tensor
) -> Tensor:
    """log softmax(logits / temperature) of each token at the True positions of `mask_BT`, 0 elsewhere; float32 [B, T].

    Logits are made at those positions only.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError("not a temperature", where="replay", got=temperature, expected="finite, > 0")
    logits_MV = adapter.logits(hidden_BTH[token_sources(mask_BT)]).float() / temperature
    picked_M = logits_MV.log_softmax(-1).gather(1, batch.input_ids_BT[mask_BT][:, None])[:, 0]
    return torch.zeros(mask_BT.shape, device=picked_M.device).masked_scatter(mask_BT, picked_M)


def replay(
    adapter: ModelAdapter,
    batch: ReplayBatch,
    visibility: str,
    temperature: float = 1.0,
    start_is_action: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T] of the actions (0 elsewhere) and hidden states [B, T, H] of the recorded sequences."""
    hidden_BTH = replay_hidden(adapter, batch, visibility)
    mask_BT = batch.action_mask_BT(start_is_action)
    return token_log_probs(adapter, batch, hidden_BTH, temperature, mask_BT), hidden_BTH


def recompute_latents(adapter: ModelAdapter, batch: ReplayBatch, visibility: str, gradient: bool = False) -> Tensor:
    """The latents [N, H] that the current model would feed at the recorded latent positions, tokens as recorded.

    LVR's RL makes them so, without a gradient (2509.24251 section 3.3); with `gradient=True` it flows through the whole
    chain. Columns with a latent step are decoded one at a time, over a cache; what stands between them in one piece.
    SELECTED vectors, which no hidden state makes, stay as recorded.
    """
    columns = batch.latent_mask_BT.any(0).nonzero()[:, 0]
    if columns.numel() == 0:
        return batch.latents_NH
    first, last = int(columns[0]), int(columns[-1])
    if bool((batch.kinds_BT[:, first:] == PositionKind.VISION).any()):
        raise LatentMismatchError(
            "an image stands after the first latent column",
            where="recompute_latents",
            expected="completions aligned to one column",
            fix="Collate with padding_side='both'.",
        )
    input_ids_BT = batch.fed_ids_BT
    position_ids = adapter.position_ids(input_ids_BT, batch.valid_BT, batch.images)
    bias = attention_bias(batch.kinds_BT, batch.valid_BT, visibility, adapter.dtype)
    cache = DynamicCache(config=adapter.text_config)
    is_own_BT = (batch.kinds_BT == PositionKind.LATENT) & batch.valid_BT
    is_source_BT = is_source(batch.kinds_BT, batch.valid_BT)
    recorded_BTH = torch.zeros(*batch.kinds_BT.shape, batch.latents_NH.shape[-1], device=adapter.device)
    recorded_BTH = recorded_BTH.to(adapter.dtype).masked_scatter(
        batch.latent_mask_BT[..., None], batch.latents_NH.to(adapter.dtype)
    )
    fed: list[Tensor] = []
    with nullcontext() if gradient else torch.no_grad(), caching_layers(adapter.model):
        source_BH = adapter.forward_hidden(
            input_ids_BT[:, :first],
            bias[:, :, :first, :first],
            position_ids[..., :first],
            batch.images,
            cache,
        )[:, -1]
        for start, end in _decoding_pieces(is_own_BT[:, : last + 1].any(0).tolist(), first):
            piece = slice(start, end)
            latents_BLH = feedback(adapter.model, source_BH)[:, None].expand(-1, end - start, -1)
            embeds_BLH = torch.where(
                batch.latent_mask_BT[:, piece, None], recorded_BTH[:, piece], adapter.embed(input_ids_BT[:, piece])
            )
            embeds_BLH = torch.where(is_own_BT[:, piece, None], latents_BLH, embeds_BLH)
            fed.append(embeds_BLH)
            hidden_BLH = adapter.decoder(
                inputs_embeds=embeds_BLH,
                attention_mask=bias[:, :, piece, :end],
                position_ids=position_ids[..., piece],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            source_BH = last_hidden(hidden_BLH, is_source_BT[:, piece], source_BH)
    return torch.cat(fed, 1)[batch.latent_mask_BT[:, first : last + 1]]


def _decoding_pieces(has_latent_T: list[bool], first: int) -> list[tuple[int, int]]:
    """Columns from `first` on as (start, end): each with a latent step alone, those between in one piece."""
    pieces: list[tuple[int, int]] = []
    for column in range(first, len(has_latent_T)):
        joins = pieces and not has_latent_T[column] and not has_latent_T[column - 1]
        start = pieces.pop()[0] if joins else column
        pieces.append((start, column + 1))
    return pieces


@contextmanager
def caching_layers(model: nn.Module):
    """Switches gradient checkpointing off within the block: in training, transformers drops the cache of a checkpointed
    layer with no more than a warning."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def with_latents(batch: ReplayBatch, latents_NH: Tensor) -> ReplayBatch:
    """The same sequences with other vectors at the latent positions."""
    return replace(batch, latents_NH=latents_NH)
