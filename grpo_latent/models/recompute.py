"""Latents of the current model at recorded positions, and three ways for a gradient through them.

    cut       z is a constant:                    loss(θ, z₀)
    one_hop   z is made by one forward over z₀:   loss(θ, z(θ, z₀))      Monet's depth (2511.21395)
    bptt      z is made by the whole chain:       loss(θ, z(θ))          ILVR's stage 2, Coconut

z₀ are the current model's own latents as constants, so that all three have the same value and
differ in gradient only. LVR's RL makes them so, cut (2509.24251 section 3.3). SELECTED vectors,
which no hidden state makes, stay as recorded.

The chain runs in one of two ways, with equal values and gradients:

    over a cache   `recompute_latents`   each position once, a latent column at a time
    by passes      `latents_by_passes`   the whole forward once a latent: for a forward that is
                                         somebody else's, as under FSDP, whose parameters exist
                                         within the forward of its root only

Legend: B sequences, T positions, L of one piece, N recorded vectors, M of them that a hidden state
made, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments import GRADIENTS
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.kv_cache import caching_layers
from grpo_latent.models.positions import with_components
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.trajectory import PositionKind, made_mask

# of the ranks' numbers the largest; all of them call it
MostOfRanks: TypeAlias = Callable[[int, torch.device], int]


def recompute_latents(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    gradient: str = "cut",
    most_of_ranks: MostOfRanks | None = None,
) -> Tensor:
    """Latents [N, H] as the current model makes them for the recorded tokens.

    What `sequences` hold there is not read.

    Args:
        sequences: completions aligned to one column (`padding_side='both'`), or no image behind
            the first latent.
        gradient: `cut`, `one_hop` or `bptt`.
        most_of_ranks: of a model that ranks share (`sft.common.sharding`): one whose chain is
            shorter runs idle forwards of its decoder after it.
    """

    def made_from(latents_NH: Tensor) -> Tensor:
        hidden_BTH = replay_hidden(adapter, sequences.with_latents(latents_NH))
        return _with_made(
            sequences, latents_NH, adapter.make(hidden_BTH[sequences.sources(adapter.mechanism)])
        )

    def chain() -> Tensor:
        num_idle = 0
        if most_of_ranks is not None:  # asked before the chain, within which ranks meet elsewhere
            num_own = num_chain_forwards(sequences)
            num_idle = most_of_ranks(num_own, adapter.device) - num_own
        latents_NH = _chain_over_cache(adapter, sequences)
        _idle(adapter, num_idle)
        return latents_NH

    return _with_gradient(gradient, chain, made_from)


def latents_by_passes(
    sequences: LatentSequences,
    mechanism: Mechanism,
    num_passes: int,
    gradient: str,
    make: Callable[[LatentSequences, Tensor, Tensor], Tensor],
) -> Tensor:
    """As `recompute_latents`, through any forward.

    Each pass makes all latents anew from those of the pass before. A sequence's k-th latent
    depends on the earlier ones only, so it is exact after k passes, whatever the recorded ones
    were; so is its gradient, if all passes carry one.

    Args:
        sequences: padded on the right, or packed.
        num_passes: at least the most latents of a sequence. Ranks whose forwards meet in
            collectives need one number.
        make: a forward over sequences, those columns of them that the passes need: what is fed of
            its hidden states at (rows, columns), in that order, [M, H].
    """
    if num_passes == 0:
        return sequences.latents_NH
    rows_M, columns_M = sequences.sources(mechanism)
    length = _num_needed_columns(sequences, columns_M)
    needed = sequences.first_columns(length)
    is_fed_N = sequences.recorded_mask_BT.nonzero()[:, 1] < length

    def made_from(latents_NH: Tensor) -> Tensor:
        made_MH = make(needed.with_latents(latents_NH[is_fed_N]), rows_M, columns_M)
        return _with_made(sequences, latents_NH, made_MH)

    def chain() -> Tensor:
        latents_NH = sequences.latents_NH
        for _ in range(num_passes):
            latents_NH = made_from(latents_NH)
        return latents_NH

    return _with_gradient(gradient, chain, made_from)


def _with_gradient(
    gradient: str, chain: Callable[[], Tensor], made_from: Callable[[Tensor], Tensor]
) -> Tensor:
    """Runs the chain in one of the three modes.

    Args:
        chain: makes the current model's latents [N, H].
        made_from: makes each of them anew from given ones before it, by one forward.
    """
    check_choice(gradient, GRADIENTS, "latent gradient")
    with nullcontext() if gradient == "bptt" else torch.no_grad():
        latents_NH = chain()
    # without any latents, too: under FSDP every rank must run the forward that another rank runs
    return made_from(latents_NH) if gradient == "one_hop" else latents_NH


def _with_made(sequences: LatentSequences, latents_NH: Tensor, made_MH: Tensor) -> Tensor:
    """`latents_NH` with other vectors where a hidden state made them."""
    return latents_NH.index_copy(
        0, sequences.is_made_N.nonzero()[:, 0], made_MH.to(latents_NH.dtype)
    )


def _num_needed_columns(sequences: LatentSequences, columns_M: Tensor) -> int:
    """Columns up to the last source, all images among them; all where there is no source.

    Packed sequences end one after the other: nothing can be cut.
    """
    if sequences.is_packed or columns_M.numel() == 0:
        return sequences.kinds_BT.shape[1]
    images = (sequences.kinds_BT == PositionKind.VISION).any(0).nonzero()
    return max(int(columns_M.max()), int(images.max()) if images.numel() else 0) + 1


def num_chain_forwards(sequences: LatentSequences) -> int:
    """Counts the decoder's forwards of a chain over a cache: what is before it, and its pieces."""
    columns = sequences.recorded_mask_BT.any(0).nonzero()[:, 0].tolist()
    if not columns:
        return 0
    is_made_BT = made_mask(sequences.kinds_BT) & sequences.valid_BT
    made = is_made_BT[:, : columns[-1] + 1].any(0).tolist()
    return 1 + len(_decoding_pieces(made, columns[0]))


def _idle(adapter: ModelAdapter, num_forwards: int) -> None:
    """Runs forwards of the decoder that nothing reads, each of one position."""
    position = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    with caching_layers(adapter.model):
        for _ in range(num_forwards):
            embeds_11H = torch.zeros(
                1, 1, adapter.hidden_size, dtype=adapter.dtype, device=adapter.device
            )
            adapter.decoder(
                inputs_embeds=embeds_11H,
                attention_mask=embeds_11H.new_zeros(1, 1, 1, 1),
                position_ids=with_components(position, adapter.has_mrope),
                use_cache=False,
            )


def _chain_over_cache(adapter: ModelAdapter, sequences: LatentSequences) -> Tensor:
    """Decodes each column that a hidden state makes alone, what stands between them in one piece.

    Raises:
        LatentMismatchError: an image behind the first recorded column.
    """
    recorded_BT = sequences.recorded_mask_BT
    kinds_BT = sequences.kinds_BT
    columns = recorded_BT.any(0).nonzero()[:, 0]
    if columns.numel() == 0:
        return sequences.latents_NH
    first, last = int(columns[0]), int(columns[-1])
    if bool((kinds_BT[:, first:] == PositionKind.VISION).any()):
        raise LatentMismatchError(
            "an image stands after the first latent column",
            where="recompute_latents",
            expected="completions aligned to one column",
            fix="Collate with padding_side='both'.",
        )
    input_ids_BT = sequences.fed_ids_BT
    position_ids = sequences.position_ids
    bias = sequences.attention_bias(adapter.dtype)
    cache = DynamicCache(config=adapter.text_config)
    is_made_BT = made_mask(kinds_BT) & sequences.valid_BT
    # column 0 stands in for the source of positions that have none: what it makes is not read
    source_BT = torch.zeros_like(kinds_BT)
    source_BT[is_made_BT] = sequences.sources(adapter.mechanism)[1]
    rows_B = torch.arange(kinds_BT.shape[0], device=kinds_BT.device)
    recorded_BTH = torch.zeros(
        *kinds_BT.shape, sequences.latents_NH.shape[-1], device=adapter.device
    )
    recorded_BTH = recorded_BTH.to(adapter.dtype).masked_scatter(
        recorded_BT[..., None], sequences.latents_NH.to(adapter.dtype)
    )
    vectors: list[Tensor] = []
    with caching_layers(adapter.model):
        # all hidden states are kept: which of them makes a latent is the mechanism's matter
        hidden_BTH = adapter.forward_hidden(
            input_ids_BT[:, :first],
            bias[:, :, :first, :first],
            position_ids[..., :first],
            sequences.images,
            cache,
        )
        for start, end in _decoding_pieces(is_made_BT[:, : last + 1].any(0).tolist(), first):
            piece = slice(start, end)
            tokens_BLH = adapter.embed(input_ids_BT[:, piece])
            vectors_BLH = torch.where(
                recorded_BT[:, piece, None], recorded_BTH[:, piece], tokens_BLH
            )
            if bool(is_made_BT[:, start].any()):
                made_B1H = adapter.make(hidden_BTH[rows_B, source_BT[:, start]])[:, None]
                vectors_BLH = torch.where(is_made_BT[:, piece, None], made_B1H, vectors_BLH)
            vectors.append(vectors_BLH)
            embeds_BLH = vectors_BLH
            if adapter.mechanism.composes:
                composed_MH = adapter.mechanism.compose(
                    adapter.model, tokens_BLH.flatten(0, 1), vectors_BLH.flatten(0, 1)
                )
                composed_BLH = composed_MH.view_as(tokens_BLH)
                embeds_BLH = torch.where(
                    recorded_BT[:, piece, None], composed_BLH.to(tokens_BLH.dtype), tokens_BLH
                )
            hidden_BLH = adapter.decoder(
                inputs_embeds=embeds_BLH,
                attention_mask=bias[:, :, piece, :end],
                position_ids=position_ids[..., piece],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            hidden_BTH = torch.cat([hidden_BTH, hidden_BLH], 1)
    return torch.cat(vectors, 1)[recorded_BT[:, first : last + 1]]


def _decoding_pieces(has_latent_T: list[bool], first: int) -> list[tuple[int, int]]:
    """Columns from `first` on as (start, end): latent ones alone, those between in one piece."""
    pieces: list[tuple[int, int]] = []
    for column in range(first, len(has_latent_T)):
        joins = pieces and not has_latent_T[column] and not has_latent_T[column - 1]
        start = pieces.pop()[0] if joins else column
        pieces.append((start, column + 1))
    return pieces
