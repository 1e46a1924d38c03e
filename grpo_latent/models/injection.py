"""Latents enter a model through a forward hook on its input-embedding module.

Passing `inputs_embeds` would not do: verl's patched vision-language forward overwrites them, and
Hugging Face's own forward then cannot tell image positions from text. The hook sees what the
embedding module returns, padded or packed, and writes the recorded vectors over the latent
positions, or what the mechanism composes of them and the token embeddings; images are scattered in
afterwards, elsewhere. Image embeddings that prompt slots have chosen stand among those images
already: they enter behind that, in front of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import Mechanism

_ATTRIBUTE = "_grpo_latent_injector"


class LatentInjector:
    """Owns the hook of one model. Outside `inject(...)` it does nothing."""

    def __init__(self) -> None:
        self._mask_BT: Tensor | None = None
        self._latents_NH: Tensor | None = None
        self._num_uses = 0
        self._is_paused = False
        self._compose: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def install(cls, model: PreTrainedModel, mechanism: Mechanism | None = None) -> LatentInjector:
        """The model's injector; installs the hook the first time, before any FSDP wrapping.

        Args:
            mechanism: asked for what is fed of what was recorded; None feeds the recorded vectors.
        """
        embedding = model.get_input_embeddings()
        injector = getattr(embedding, _ATTRIBUTE, None)
        if injector is None:
            injector = cls()
            embedding.register_forward_hook(injector._hook)
            # object.__setattr__: the injector is no module state and must not enter state_dict
            object.__setattr__(embedding, _ATTRIBUTE, injector)
        if mechanism is not None:
            injector._compose = partial(mechanism.compose, model) if mechanism.composes else None
        return injector

    @contextmanager
    def inject(self, mask_BT: Tensor, latents_NH: Tensor) -> Iterator[LatentInjector]:
        """Within the block, the model's next forward reads `latents_NH` where `mask_BT` is True.

        Args:
            mask_BT: bool [B, T] (packed: [1, T]), the shape of the `input_ids` of the forward.
            latents_NH: [N, H], N = number of True positions, in row-major order. Gradients flow
                into it.

        Raises:
            LatentMismatchError: counts or shapes differ, or the block ran no forward of the
                embedding module.
        """
        self.arm(mask_BT, latents_NH)
        try:
            yield self
            self.check_used()
        finally:
            self.disarm()

    def arm(self, mask_BT: Tensor, latents_NH: Tensor) -> None:
        """`inject` without the block, for engines whose forward lies in code that is not ours.

        Pair with `disarm`.
        """
        num_positions = int(mask_BT.sum())
        if (
            mask_BT.dtype != torch.bool
            or latents_NH.ndim != 2
            or latents_NH.shape[0] != num_positions
        ):
            raise LatentMismatchError(
                "latents do not match the latent mask",
                got=f"mask {mask_BT.dtype} with {num_positions} positions, "
                f"latents {tuple(latents_NH.shape)}",
                expected=f"a bool mask and latents of shape [{num_positions}, hidden]",
                fix="The mask and the vectors must come from the same recorded trajectories.",
            )
        self._mask_BT = mask_BT
        self._latents_NH = latents_NH
        self._num_uses = 0

    def embed(self, module: nn.Module, token_ids: Tensor) -> Tensor:
        """Token embeddings of any ids by the hooked module itself, while latents may be armed."""
        self._is_paused = True
        try:
            return module(token_ids)
        finally:
            self._is_paused = False

    def check_used(self) -> None:
        """Raises `LatentMismatchError` if no forward has read the latents since `arm`."""
        if self._num_uses == 0:
            raise LatentMismatchError(
                "the forward did not read the latents",
                got="no call of the input-embedding module",
                expected="one forward with input_ids",
                fix="Call the model with input_ids, not with inputs_embeds.",
            )

    def disarm(self) -> None:
        """Lets forwards read token embeddings alone again."""
        self._mask_BT = self._latents_NH = None

    def _hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._mask_BT is None or self._latents_NH is None or self._is_paused:
            return None
        if (
            self._mask_BT.shape != output.shape[:-1]
            or self._latents_NH.shape[-1] != output.shape[-1]
        ):
            raise LatentMismatchError(
                "latents do not fit the embedded sequence",
                got=f"mask {tuple(self._mask_BT.shape)}, latents {tuple(self._latents_NH.shape)}",
                expected=f"mask {tuple(output.shape[:-1])}, hidden size {output.shape[-1]}",
            )
        self._num_uses += 1
        mask_BT = self._mask_BT.to(output.device)
        # mixed precision embeds in another dtype than was recorded
        fed_NH = self._latents_NH.to(output.device, output.dtype)
        if self._compose is not None:
            fed_NH = self._compose(output[mask_BT], fed_NH).to(output.dtype)
        return output.masked_scatter(mask_BT.unsqueeze(-1), fed_NH)


class SelectionInjector:
    """Replay by index: SELECTED positions read what the forward has at their image positions.

    Whatever was recorded, and with a gradient into a vision tower that trains. Does nothing until
    it is armed.
    """

    _ATTRIBUTE = "_grpo_latent_selection_injector"

    def __init__(self) -> None:
        self._places: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def install(cls, model: PreTrainedModel) -> SelectionInjector:
        """The model's injector; installs the hook the first time, before any FSDP wrapping."""
        decoder = backbone_of(model).decoder
        injector = getattr(decoder, cls._ATTRIBUTE, None)
        if injector is None:
            injector = cls()
            # in front of `SharedPrompt`, behind which rows are no longer where they are named
            decoder.register_forward_pre_hook(injector._hook, prepend=True, with_kwargs=True)
            object.__setattr__(decoder, cls._ATTRIBUTE, injector)
        return injector

    def arm(
        self, rows_M: Tensor, columns_M: Tensor, image_rows_M: Tensor, image_columns_M: Tensor
    ) -> None:
        """Until `disarm`, position (row, column) of any forward reads (image row, image column).

        Forwards over the first columns only are served, too: what lies behind is left out.
        """
        self._places = (rows_M, columns_M, image_rows_M, image_columns_M)

    def disarm(self) -> None:
        """Lets forwards read what they are given again."""
        self._places = None

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._places is None:
            return None
        embeds_BTH = kwargs["inputs_embeds"]
        is_in_M = self._places[1] < embeds_BTH.shape[1]
        rows_M, columns_M, image_rows_M, image_columns_M = (
            places_M[is_in_M] for places_M in self._places
        )
        chosen_MH = embeds_BTH[image_rows_M, image_columns_M]
        return args, kwargs | {
            "inputs_embeds": embeds_BTH.index_put((rows_M, columns_M), chosen_MH)
        }
