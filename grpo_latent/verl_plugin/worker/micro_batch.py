"""verl's micro-batch with names and types: what was recorded of its rows, what the loss reads.

    TensorDict, ragged rows ──MicroBatch.of──▶ engine, TreatedForward, ChoiceForward, LatentLoss

Nothing else in the worker says the name of a column: `grpo_latent.recorded_fields` has ours,
verl's are read here.

Legend: B rows, L prompt and completion of all rows end to end, T completion columns, N latent
positions, S SELECTED and M LATENT positions, all in order of row and position; H hidden size, A
what a treatment records beside a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from torch import Tensor
from verl.utils import tensordict_utils as tu

from grpo_latent import recorded_fields
from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.groups import check_groups, first_rows
from grpo_latent.models.positions import text_row
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.models.shift import score_columns
from grpo_latent.trajectory import PositionKind, from_column, latent_mask, made_mask, recorded_mask
from grpo_latent.verl_plugin.boot.compat import offsets_of
from grpo_latent.verl_plugin.worker.finite import GROUPS

IMAGES = recorded_fields.field("multi_modal_inputs").column


@dataclass(frozen=True)
class MicroBatch:
    """Ragged rows of verl's, read by field.

    Attributes:
        data: verl's; the loss gets its mini-batch as one, too. Read lazily: a field is unpacked
            when it is asked for.
    """

    data: TensorDict

    @classmethod
    def of(cls, data: TensorDict) -> MicroBatch:
        """With all rows checked, as the engine needs them before it feeds anything.

        Raises:
            LatentMismatchError: kinds or latents are missing, or a row's counts disagree.
        """
        batch = cls(data)
        names = [recorded_fields.field(name).column for name in ("kinds", "latents")]
        for name in names:
            if name not in data.keys():
                raise LatentMismatchError(
                    "batch without recorded latents",
                    where="latent engine",
                    got=f"no {name} among {sorted(data.keys())}",
                    expected=f"{' and '.join(names)}, as agent loop latent_agent writes them",
                    fix="Set actor_rollout_ref.rollout.agent.default_agent_loop=latent_agent.",
                )
        lengths = data["input_ids"].offsets().diff().tolist()
        num_vectors = [row.shape[0] for row in data[names[1]].unbind()]
        for row, (kinds, length, found) in enumerate(
            zip(batch.kinds_rows, lengths, num_vectors, strict=True)
        ):
            num_latents = int(recorded_mask(kinds).sum())
            if kinds.shape[0] != length or found != num_latents:
                raise LatentMismatchError(
                    "recorded latents do not fit the sequence",
                    where=f"latent engine, row {row} of the micro-batch",
                    got=f"{length} ids, {kinds.shape[0]} kinds with {num_latents} latents, "
                    f"{found} vectors",
                    expected="one kind an id, one vector a latent",
                    fix="The three fields of a row must come from one recorded trajectory.",
                )
        return batch

    def recorded(self, name: str) -> Tensor | None:
        """The field `name` of all rows end to end, as trajectories have it; None if absent."""
        field = recorded_fields.field(name)
        if field.column not in self.data.keys():
            return None
        return from_column(field, torch.cat(self.data[field.column].unbind()), self.kinds_L)

    # ---- what was recorded ----------------------------------------------------------------------

    @cached_property
    def kinds_rows(self) -> list[Tensor]:
        """int64 [L] of each row, values of `PositionKind`."""
        return list(self.data[recorded_fields.field("kinds").column].unbind())

    @cached_property
    def kinds_L(self) -> Tensor:
        """int64 [L] of all rows."""
        return torch.cat(self.kinds_rows)

    @cached_property
    def latents_NH(self) -> Tensor:
        """float [N, H], the recorded vectors."""
        latents_NH = self.recorded("latents")
        assert latents_NH is not None, "`of` has checked that the column is there"
        return latents_NH

    @cached_property
    def selected_idx_S(self) -> Tensor:
        """int64 [S], which image position of its row each SELECTED position took.

        Raises:
            LatentMismatchError: the batch has no such column.
        """
        selected_idx_S = self.recorded("selected_idx")
        if selected_idx_S is None:
            raise LatentMismatchError(
                "batch without the chosen image positions",
                where="latent engine",
                got=sorted(self.data.keys()),
                expected=f"{recorded_fields.field('selected_idx').column}, as agent loop "
                "latent_agent writes it",
            )
        return selected_idx_S

    def latent_aux_MA(self, width: int) -> Tensor:
        """float [M, A], what the treatment recorded beside each LATENT vector.

        Raises:
            LatentMismatchError: there are not as many rows as LATENT positions, or not `width`
                numbers in each.
        """
        aux_MA = self.recorded("latent_aux")
        expected = (sum(self.num_own), width)
        if aux_MA is None or tuple(aux_MA.shape) != expected:
            raise LatentMismatchError(
                "recorded aux does not fit the latents",
                where="latent engine, "
                f"{recorded_fields.field('latent_aux').column} of the micro-batch",
                got=(0, 0) if aux_MA is None else tuple(aux_MA.shape),
                expected=str(expected),
                fix="Rollout and training must run the same latent.treatment.",
            )
        return aux_MA

    @cached_property
    def num_own(self) -> list[int]:
        """Positions of each row whose vectors a hidden state made."""
        return [int(made_mask(kinds).sum()) for kinds in self.kinds_rows]

    @property
    def ids(self) -> Tensor:
        """int64 [B, (L)], ragged."""
        return self.data["input_ids"]

    @cached_property
    def groups(self) -> tuple[int, ...] | None:
        """The number of each row's group; None where the trainer has not said it.

        Raises:
            LatentMismatchError: rows of one group have different prompts.
        """
        if GROUPS not in self.data.keys():
            return None
        groups = tuple(torch.stack(list(self.data[GROUPS].unbind())).tolist())
        check_groups(self.data["prompts"].unbind(), groups, "latent engine, micro-batch")
        return groups

    @property
    def is_packed(self) -> bool:
        """Whether the model gets all rows end to end, as one."""
        return tu.get_non_tensor_data(self.data, "use_remove_padding", True)

    # ---- what is written back -------------------------------------------------------------------

    def cover_latents(self, placeholder_id: int) -> None:
        """Overwrites the ids at latent positions: no image placeholder or EOS there counts."""
        values = self.ids.values().masked_fill(latent_mask(self.kinds_L), placeholder_id)
        self.data["input_ids"] = torch.nested.nested_tensor_from_jagged(
            values, offsets=offsets_of(self.ids)
        )

    def keep_images_once(self, groups: tuple[int, ...], placeholder_id: int) -> None:
        """Leaves a group's images to its first row, whose prompt is the one that is run.

        Their placeholders in the other rows become a token: the model counts placeholders.
        """
        if IMAGES not in self.data.keys():
            return
        first_R, _ = first_rows(groups)
        is_first_B = torch.zeros(len(groups), dtype=torch.bool)
        is_first_B[first_R] = True
        inputs = [getattr(each, "data", each) for each in self.data[IMAGES]]
        kept = [each if first else {} for each, first in zip(inputs, is_first_B, strict=True)]
        self.data[IMAGES] = NonTensorStack(*kept)
        lengths = torch.tensor([len(kinds) for kinds in self.kinds_rows])
        is_other_L = (~is_first_B).repeat_interleave(lengths).to(self.kinds_L.device)
        is_covered_L = is_other_L & (self.kinds_L == PositionKind.VISION)
        values = self.ids.values().masked_fill(is_covered_L, placeholder_id)
        self.data["input_ids"] = torch.nested.nested_tensor_from_jagged(
            values, offsets=offsets_of(self.ids)
        )

    def is_token_BT(self, token_id: int | None, length: int) -> Tensor:
        """bool [B, T], where prompts have a token, whatever stands in its place by now."""
        rows = [prompt == token_id for prompt in self.data["prompts"].unbind()]
        is_token_BP = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.nn.functional.pad(is_token_BP, (0, length - is_token_BP.shape[1]))

    def expand_positions(self) -> None:
        """Gives text-only rows of a vision model four position components where they have one."""
        position_ids = self.data["position_ids"]
        if position_ids.dim() == 2:
            rows = [text_row(row) for row in position_ids.unbind()]
            self.data["position_ids"] = tu.nested_tensor_from_tensor_list(rows, ragged_idx=2)

    def by_row(self, values_MA: Tensor) -> Tensor:
        """Values of all LATENT positions as ragged rows [B, (m), A]."""
        offsets = torch.tensor([0, *accumulate(self.num_own)], device=values_MA.device)
        return torch.nested.nested_tensor_from_jagged(values_MA, offsets)

    def with_scores(self, log_probs: Tensor, kind: int, values: Tensor) -> Tensor:
        """verl's ragged `log_probs`, with `values` where they score the positions of `kind`."""
        columns = score_columns(self.kinds_L == kind)
        values_L = log_probs.values().index_copy(0, columns, values.to(log_probs.dtype))
        return torch.nested.nested_tensor_from_jagged(values_L, offsets_of(log_probs))

    # ---- what a loss reads: completions, padded right -------------------------------------------

    @cached_property
    def response_kinds_BT(self) -> Tensor:
        """int64 [B, T], padded with PROMPT."""
        lengths = self.data["responses"].offsets().diff().tolist()
        rows = [
            kinds[len(kinds) - length :]
            for kinds, length in zip(self.kinds_rows, lengths, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=int(PositionKind.PROMPT)
        )

    @cached_property
    def response_mask_BT(self) -> Tensor:
        """bool [B, T]."""
        return padded(self.data["response_mask"]).bool()

    @cached_property
    def is_live_B(self) -> Tensor:
        """bool [B]: rows that act at all.

        A dropped trajectory acts at its latents no more than in its text.
        """
        return self.response_mask_BT.any(-1)

    @cached_property
    def advantages_B(self) -> Tensor:
        """float [B]: the advantage at each trajectory's first action, 0 without any.

        A group baseline gives all actions of a trajectory the same.
        """
        first_B1 = self.response_mask_BT.int().argmax(-1, keepdim=True)
        return padded(self.data["advantages"]).gather(1, first_B1)[:, 0] * self.is_live_B

    @property
    def old_log_probs_BT(self) -> Tensor:
        """float [B, T]."""
        return padded(self.data["old_log_probs"])

    @property
    def ref_log_probs_BT(self) -> Tensor | None:
        """float [B, T]; None without a reference."""
        column = recorded_fields.field("ref_log_probs").column
        return padded(self.data[column]) if column in self.data.keys() else None

    @property
    def ref_latent_means_MH(self) -> Tensor | None:
        """float [M, H], the reference's predictions of the latents; None without a reference.

        Where a treatment has its own `statistics`, they stand in the place of the predictions.
        """
        column = recorded_fields.field("ref_latent_means").column
        return torch.cat(self.data[column].unbind()) if column in self.data.keys() else None


def padded(rows: Tensor) -> Tensor:
    """[B, T] of ragged rows [B, (T)], zeros on the right; T is the longest row's."""
    # to_padded_tensor pads to the sum of lengths where a nested tensor does not know its longest
    # row
    return torch.nn.utils.rnn.pad_sequence(list(rows.unbind()), batch_first=True)


def engine_sequences(
    model_inputs: dict,
    batch: MicroBatch,
    visibility: str,
    groups: tuple[int, ...] | None = None,
) -> LatentSequences:
    """The rows as verl laid them out, padded right or packed, latents as recorded.

    They have no images: verl feeds the pixels.
    """
    input_ids_BT, mask_BT = model_inputs["input_ids"], model_inputs["attention_mask"]
    return LatentSequences(
        input_ids_BT,
        kinds_BT=pad_rows(
            [batch.kinds_L] if batch.is_packed else batch.kinds_rows, input_ids_BT.shape
        ),
        valid_BT=torch.ones_like(input_ids_BT, dtype=torch.bool)
        if batch.is_packed
        else mask_BT.bool(),
        latents_NH=batch.latents_NH,
        position_ids=model_inputs["position_ids"],
        visibility=visibility,
        is_packed=batch.is_packed,
        groups=groups,
    )


def pad_rows(rows: list[Tensor], shape: torch.Size) -> Tensor:
    """int64 [B, T] of `shape`, rows padded right with PROMPT."""
    padded = torch.full(shape, int(PositionKind.PROMPT), dtype=torch.long, device=rows[0].device)
    for row, values in enumerate(rows):
        padded[row, : values.shape[0]] = values
    return padded
