"""A group's prompt runs through the decoder once; whoever calls the model sees ordinary rows.

    ids [B, T] ─ embedding, latents, images ─▶ [B, T, H] ─pack─▶ [1, S, H]
                                                                   │ layers, `shared_sdpa`
    head, sources, losses as ever ◀─ [B, T, H] ◀──────spread───────┘

The hooks stand around the decoder, behind all that writes into its inputs and in front of all that
reads its output, so that neither knows of the layout. The gradient of a prompt is the sum over its
rows, by `spread`'s own backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import ConfigError
from grpo_latent.models.attention import SHARED_SDPA
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.shared_rows import SharedRows

ROWS = "shared_rows"


class SharedPrompt:
    """Owns the hooks of one model's decoder. Does nothing until it is armed."""

    _ATTRIBUTE = "_grpo_latent_shared_prompt"

    def __init__(self) -> None:
        self._sequences: LatentSequences | None = None
        self._rows: dict[int, SharedRows] = {}

    @classmethod
    def install(cls, model: PreTrainedModel) -> SharedPrompt:
        """The model's hooks; installs them the first time, before any FSDP wrapping.

        Raises:
            ConfigError: the model's attention is no `sdpa`.
        """
        backbone = backbone_of(model)
        decoder = backbone.decoder
        shared = getattr(decoder, cls._ATTRIBUTE, None)
        if shared is None:
            configured = backbone.text_config._attn_implementation
            if configured != "sdpa":
                raise ConfigError(
                    "a prompt is shared by one attention function",
                    where="attn_implementation",
                    got=configured,
                    expected="sdpa",
                    fix="Load the model with attn_implementation=sdpa, or set "
                    "latent.share_prompt=false.",
                )
            backbone.text_config._attn_implementation = SHARED_SDPA
            shared = cls()
            decoder.register_forward_pre_hook(shared._before, with_kwargs=True)
            decoder.register_forward_hook(shared._after, with_kwargs=True)
            object.__setattr__(decoder, cls._ATTRIBUTE, shared)
        return shared

    def arm(self, sequences: LatentSequences) -> None:
        """Until `disarm`, forwards over `sequences`, or their first columns, are shared."""
        self._sequences = sequences

    @contextmanager
    def share(self, sequences: LatentSequences) -> Iterator[None]:
        """`arm` for the forwards of a block."""
        self.arm(sequences)
        try:
            yield
        finally:
            self.disarm()

    def disarm(self) -> None:
        """Lets forwards run row by row again."""
        self._sequences = None
        self._rows = {}

    def _before(
        self, module: PreTrainedModel, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if self._sequences is None:
            return None
        embeds_BTH = kwargs.get("inputs_embeds")
        # a text model's decoder is its base, which gets the ids
        if embeds_BTH is None:
            embeds_BTH = module.get_input_embeddings()(kwargs["input_ids"])
        rows = self._rows_of(embeds_BTH.shape[1])
        position_ids = kwargs["position_ids"]
        packed: dict[str, Any] = {
            "input_ids": None,
            "inputs_embeds": rows.pack(embeds_BTH),
            "position_ids": rows.pack(position_ids, position_ids.ndim - 2),
            # four dimensions: transformers takes it for a mask that is made, and makes none
            "attention_mask": embeds_BTH.new_zeros(1, 1, 1, 1),
            ROWS: rows,
        }
        is_visual_BT = kwargs.get("visual_pos_masks")
        if is_visual_BT is not None:
            packed |= _packed_deepstack(rows, is_visual_BT, kwargs["deepstack_visual_embeds"])
        return args, kwargs | packed

    def _after(
        self, module: nn.Module, args: tuple, kwargs: dict, output: BaseModelOutputWithPast
    ) -> BaseModelOutputWithPast | None:
        rows = kwargs.get(ROWS)
        if rows is None:
            return None
        output.last_hidden_state = rows.spread(output.last_hidden_state)
        return output

    def _rows_of(self, length: int) -> SharedRows:
        assert self._sequences is not None
        # recompute also runs the first columns only
        if length not in self._rows:
            self._rows[length] = SharedRows(self._sequences.first_columns(length))
        return self._rows[length]


def _packed_deepstack(
    rows: SharedRows, is_visual_BT: Tensor, features: list[Tensor]
) -> dict[str, Any]:
    """What Qwen3-VL adds to image positions behind its first layers, each image's once."""
    is_visual_S = is_visual_BT.flatten()[rows.index_S]
    order_S = (is_visual_BT.flatten().cumsum(0) - 1)[rows.index_S]
    kept_M = order_S[is_visual_S]
    return {
        "visual_pos_masks": is_visual_S[None],
        "deepstack_visual_embeds": [each_MH.index_select(0, kept_M) for each_MH in features],
    }
