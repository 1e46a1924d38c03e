"""`LatentSequences`: whole sequences as every forward takes them, built once and handed on.

    prompts         ──prompt_sequences──▶ ┐                    ┌─▶ rollout: prompts' keys, values
    trajectories    ──collate───────────▶ ├─ LatentSequences ──┼─▶ replay, recompute
    SFT's rows      ──build─────────────▶ │                    ├─▶ SFT's losses
    verl's rows     ──worker.engine─────▶ ┘                    └─▶ verl's forward

Positions are those of `models.positions`, visibility that of `models.visibility`, sources those of
the mechanism.

Legend: B sequences, T positions, N recorded vectors, M of them that a hidden state made, H hidden,
A aux, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.common.settings import check_choice
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.groups import check_groups, number_groups
from grpo_latent.models.visibility import attention_bias, check_visibility
from grpo_latent.trajectory import Trajectory, latent_mask, made_mask, recorded_mask, response_mask

PADDING_SIDES = ("left", "right", "both")


@dataclass(frozen=True)
class LatentSequences:
    """Sequences padded to one length T, or packed: one row, B = 1, of one after the other.

    Attributes:
        input_ids_BT: int64 [B, T]; any id at all at latent positions.
        kinds_BT: int64 [B, T], `PositionKind`.
        valid_BT: bool [B, T], False at padding.
        latents_NH: float [N, H], row-major over the recorded positions.
        position_ids: int64 [B, T] or [C, B, T], as the model takes them.
        visibility: `full` or `latents_only`.
        images: pixels of all sequences in order; None where there are none, or where others feed
            them (verl).
        selected_idx_M: int64, row-major over the SELECTED positions: which image position of its
            sequence, from 0; None where there are none.
        latent_aux_MA: float32, row-major over the LATENT positions, as recorded; None where
            nothing was.
        is_packed: the layout; only `full` can be packed, and the model then tells the sequences
            apart by their positions.
        following_kinds_B: int64, kinds of the column behind the last, where these are the first
            columns of longer sequences: what a position sees depends on what follows it. None
            where nothing does.
        groups: a number a sequence; those of one number have one prompt and its images, so that
            `SharedPrompt` may run it once. None where nothing is known of that.
    """

    input_ids_BT: Tensor
    kinds_BT: Tensor
    valid_BT: Tensor
    latents_NH: Tensor
    position_ids: Tensor
    visibility: str
    images: ImageInputs | None = None
    selected_idx_M: Tensor | None = None
    latent_aux_MA: Tensor | None = None
    is_packed: bool = False
    following_kinds_B: Tensor | None = None
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_visibility(self.visibility)
        num_recorded = int(self.recorded_mask_BT.sum())
        if self.latents_NH.ndim != 2 or self.latents_NH.shape[0] != num_recorded:
            raise LatentMismatchError(
                "recorded latents do not match the latent positions",
                where="LatentSequences",
                got=f"latents of shape {tuple(self.latents_NH.shape)}",
                expected=f"[{num_recorded}, hidden]",
            )

    @staticmethod
    def build(
        adapter: ModelAdapter,
        input_ids_BT: Tensor,
        kinds_BT: Tensor,
        valid_BT: Tensor,
        latents_NH: Tensor,
        visibility: str,
        images: ImageInputs | None = None,
        selected_idx_M: Tensor | None = None,
        latent_aux_MA: Tensor | None = None,
        groups: tuple[int, ...] | None = None,
    ) -> LatentSequences:
        """Sequences with the adapter's positions, whatever ids stand at latent positions."""
        # an image's id at a latent position would be numbered as an image
        ids_BT = input_ids_BT.masked_fill(latent_mask(kinds_BT), 0)
        position_ids = adapter.position_ids(ids_BT, valid_BT, images)
        return LatentSequences(
            input_ids_BT,
            kinds_BT,
            valid_BT,
            latents_NH,
            position_ids,
            visibility,
            images,
            selected_idx_M,
            latent_aux_MA,
            groups=groups,
        )

    @property
    def latent_mask_BT(self) -> Tensor:
        """bool [B, T], True at latent steps, where any id may stand."""
        return latent_mask(self.kinds_BT) & self.valid_BT

    @property
    def recorded_mask_BT(self) -> Tensor:
        """bool [B, T], True where `latents_NH` has a vector."""
        return recorded_mask(self.kinds_BT) & self.valid_BT

    @property
    def is_made_N(self) -> Tensor:
        """bool [N]: recorded vectors that a hidden state made."""
        return made_mask(self.kinds_BT)[self.recorded_mask_BT]

    def sources(self, mechanism: Mechanism) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the hidden states that made them, each int64 [M]."""
        return mechanism.sources(self.kinds_BT, self.valid_BT)

    @property
    def fed_ids_BT(self) -> Tensor:
        """`input_ids_BT` as a model may read them: 0 at latent positions.

        A recorded placeholder may be any id, an image's or one outside the vocabulary included.
        """
        return self.input_ids_BT.masked_fill(self.latent_mask_BT, 0)

    def action_mask_BT(self, start_is_action: bool = True, end_is_action: bool = True) -> Tensor:
        """bool [B, T], positions whose log-prob counts."""
        return response_mask(self.kinds_BT, start_is_action, end_is_action) & self.valid_BT

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, T], for whoever runs some of the columns or records attention."""
        return attention_bias(
            self.kinds_BT,
            self.valid_BT,
            self.visibility,
            dtype,
            following_kinds_B=self.following_kinds_B,
        )

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """What a model's own forward takes.

        With `full` it is the validity alone, int64 [B, T]: the model makes its causal mask, and
        may use its fastest kernel.
        """
        return self.valid_BT.long() if self.visibility == "full" else self.attention_bias(dtype)

    def with_latents(self, latents_NH: Tensor) -> LatentSequences:
        """The same sequences with other vectors at the recorded positions."""
        return replace(self, latents_NH=latents_NH)

    def first_columns(self, length: int) -> LatentSequences:
        """The first `length` columns; images must stand among them.

        `selected_idx_M` and `latent_aux_MA` stay behind.
        """
        is_in_N = self.recorded_mask_BT.nonzero()[:, 1] < length
        return replace(
            self,
            input_ids_BT=self.input_ids_BT[:, :length],
            kinds_BT=self.kinds_BT[:, :length],
            valid_BT=self.valid_BT[:, :length],
            latents_NH=self.latents_NH[is_in_N],
            position_ids=self.position_ids[..., :length],
            selected_idx_M=None,
            latent_aux_MA=None,
            following_kinds_B=self.kinds_BT[:, length]
            if length < self.kinds_BT.shape[1]
            else self.following_kinds_B,
        )


def collate(
    trajectories: list[Trajectory],
    images: list[ImageInputs | None],
    adapter: ModelAdapter,
    visibility: str = "full",
    padding_side: str = "right",
    shares_prompts: bool = False,
) -> LatentSequences:
    """Trajectories with their prompts, on the adapter's device.

    Args:
        images: of each trajectory's prompt, as in its request.
        padding_side: `right`, `left`, or `both`: prompts padded left and completions right, so
            that all completions begin in one column.
        shares_prompts: forwards run the prompt of trajectories with one `group_id` once.

    Raises:
        ConfigError: another `padding_side`.
        LatentMismatchError: nothing to collate, or an entry of images too many or too few.
        RolloutError: a prompt that does not fit its images.
    """
    check_choice(padding_side, PADDING_SIDES, "padding_side")
    if not trajectories or len(trajectories) != len(images):
        got = f"{len(trajectories)} trajectories, {len(images)} entries of images"
        raise LatentMismatchError(
            "nothing to collate", where="collate", got=got, expected="one entry each, at least one"
        )
    for row, (trajectory, pixels) in enumerate(zip(trajectories, images, strict=True)):
        adapter.check_prompt(
            trajectory.prompt_ids, pixels, f"trajectory {row} (group {trajectory.group_id!r})"
        )
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
    ids_rows = [torch.cat([t.prompt_ids, t.token_ids]) for t in trajectories]
    kinds_rows = [torch.cat([adapter.prompt_kinds(t.prompt_ids), t.kinds]) for t in trajectories]
    selected_idx_M = torch.cat([t.selected_idx for t in trajectories]).to(adapter.device)
    aux = [t.latent_aux for t in trajectories if t.latent_aux.shape[1]]
    return LatentSequences.build(
        adapter,
        *_padded(ids_rows, kinds_rows, starts, length, adapter.device),
        torch.cat([t.latents for t in trajectories]).to(adapter.device),
        visibility,
        _on_device(images, adapter.device),
        selected_idx_M=selected_idx_M if selected_idx_M.numel() else None,
        latent_aux_MA=torch.cat(aux).to(adapter.device) if aux else None,
        groups=_groups_of(trajectories) if shares_prompts else None,
    )


def _groups_of(trajectories: list[Trajectory]) -> tuple[int, ...]:
    groups = number_groups([t.group_id for t in trajectories])
    check_groups([t.prompt_ids for t in trajectories], groups, "collate")
    return groups


def prompt_sequences(
    prompts: Sequence[Tensor],
    images: Sequence[ImageInputs | None],
    adapter: ModelAdapter,
    visibility: str,
) -> LatentSequences:
    """Prompts, each ids [P], padded on the left, on the adapter's device.

    All completions then begin in one column.
    """
    length = max(ids.shape[0] for ids in prompts)
    starts = [length - ids.shape[0] for ids in prompts]
    kinds_rows = [adapter.prompt_kinds(ids) for ids in prompts]
    nothing_NH = torch.zeros(0, adapter.hidden_size, dtype=adapter.dtype, device=adapter.device)
    padded = _padded(prompts, kinds_rows, starts, length, adapter.device)
    return LatentSequences.build(
        adapter, *padded, nothing_NH, visibility, _on_device(images, adapter.device)
    )


def _padded(
    ids_rows: Sequence[Tensor],
    kinds_rows: Sequence[Tensor],
    starts: Sequence[int],
    length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, kinds and validity [B, T] of rows from `starts` on; padding is id 0, kind PROMPT."""
    # filled on the host: a device would launch three kernels a row
    input_ids_BT = torch.zeros(len(ids_rows), length, dtype=torch.long)
    kinds_BT = torch.zeros_like(input_ids_BT)
    valid_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for row, (ids, kinds, start) in enumerate(zip(ids_rows, kinds_rows, starts, strict=True)):
        place = slice(start, start + ids.shape[0])
        input_ids_BT[row, place] = ids
        kinds_BT[row, place] = kinds
        valid_BT[row, place] = True
    return input_ids_BT.to(device), kinds_BT.to(device), valid_BT.to(device)


def _on_device(images: Sequence[ImageInputs | None], device: torch.device) -> ImageInputs | None:
    pixels = ImageInputs.concat(images)
    return None if pixels is None else pixels.to(device)
