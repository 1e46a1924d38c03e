"""The noun of this package: a completion as a list of typed positions.

A trajectory of LVR with two latent steps, prompt left out:

    position      0        1         2         3       4       5       6
    token         <start>  <latent>  <latent>  <end>   ans     7       <eos>
    kind          START    LATENT    LATENT    FORCED  TEXT    TEXT    TEXT
    input vector  e(start) z_0       z_1       e(end)  e(ans)  e(7)    -
    action        yes      no        no        no      yes     yes     yes

Masks, replay and rewards derive from `kinds`, never from token ids: the id at a latent position is
a placeholder that may be any id at all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_latent import recorded_fields
from grpo_latent.errors import LatentMismatchError
from grpo_latent.recorded_fields import Field, Wire


class PositionKind(IntEnum):
    """What a position of a sequence is.

    `PROMPT` and `VISION` occur in prompts, the others in completions.
    """

    # not told by ids: a trained model's most probable token at a latent position is often the
    # span's end, so masks that look for tokens would change inside a span
    PROMPT = 0  # text of the prompt
    VISION = 1  # image placeholders of the prompt and their delimiters
    TEXT = 2  # sampled token, fed as its embedding
    START = 3  # sampled token that opens a latent span, fed as its embedding
    LATENT = 4  # latent step: the input is a recorded vector
    FORCED = 5  # token that the mechanism appended, such as the end of a span
    SELECTED = 6  # latent step whose vector is an image embedding that attention chose (IVT-LR)
    MIXED = 7  # sampled token, fed as a mix of its embedding and a recorded vector (HRPO's gate)
    END = 8  # sampled token that closes a latent span, fed as its embedding (published LVR)
    FED_START = (
        9  # sampled token that opens a latent span, fed as that span's first latent (Monet)
    )


COMPLETION_KINDS = frozenset(int(kind) for kind in PositionKind if kind >= PositionKind.TEXT)
# kinds of planned positions at which a mechanism puts a token of its own
PLACED_KINDS = (PositionKind.LATENT, PositionKind.FORCED, PositionKind.START)
STOP_REASONS = ("eos", "length")
_POSITIONS_OF = {
    "": "trajectory, which has one number of it",
    "T": "completion positions",
    "N": "latent positions",
    "M": "positions whose vectors a hidden state made",
    "S": "SELECTED positions",
}
_SIZES = {"H": "hidden"}


@dataclass(frozen=True)
class LatentSpan:
    """Consecutive latent steps: `start` and `length` in completion coordinates."""

    start: int
    length: int


@dataclass(frozen=True)
class Trajectory:
    """One completion with all that replaying it needs.

    P prompt positions, T completion positions, N of them with a recorded vector, M of these made
    by a hidden state, H hidden size, A aux. `grpo_latent.recorded_fields` says what each field is
    aligned to and where it travels; a field declared there that is no attribute here is an entry
    of `extra`.

    Attributes:
        prompt_ids: int64 [P].
        token_ids: int64 [T]; a placeholder at latent positions.
        kinds: int64 [T], values of `PositionKind`.
        latents: float32 [N, H], the recorded vectors (`recorded_mask`), in order of position: at
            latent steps as they were fed, at MIXED positions what the token's embedding was
            composed with.
        rollout_log_probs: float32 [T], nats; log-density of each sampled token under the *full*
            distribution at the sampling temperature, the one that a replay can recompute, hence
            the one that enters ratios; 0 where nothing was sampled. At LATENT positions it is the
            latent log-density, where the RL treatment gives them one.
        sampling_log_probs: float32 [T], nats; the same under the distribution actually drawn from
            (after top-k, top-p and banned ids). Its gap to `rollout_log_probs` measures what
            truncation hides from the ratio.
        stop_reason: "eos" or "length".
        group_id: of the prompt row.
        seed: the trajectory's sampling seed.
        policy_version: training step of the weights that acted.
        selected_idx: int64, one per SELECTED position, in order: which of the prompt's image
            positions, from 0.
        latent_aux: float32 [M, A], one row per position whose vector a hidden state made, in
            order: what the RL treatment recorded beside the vector (`latent.treatments`); A is 0
            for most.
    """

    prompt_ids: Tensor
    token_ids: Tensor
    kinds: Tensor
    latents: Tensor
    rollout_log_probs: Tensor
    sampling_log_probs: Tensor
    stop_reason: str
    group_id: str = ""
    seed: int = 0
    policy_version: int = 0
    extra: dict = field(default_factory=dict)
    selected_idx: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    latent_aux: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __post_init__(self) -> None:
        fields = recorded_fields.of_trajectory()
        present = {f.name: self.value(f) for f in fields if f.dims[:1] == "T"}
        lengths = {name: values.shape[0] for name, values in present.items() if values is not None}
        if len(set(lengths.values())) != 1:
            raise LatentMismatchError(
                "fields of a trajectory differ in length", got=lengths, expected="one length T"
            )
        # counted on the host: masks and sums of tensors this small cost twice as much as all the
        # rest of a trajectory, and a rollout makes hundreds at once
        num_of_kind = Counter(self.kinds.tolist())
        unknown = num_of_kind.keys() - COMPLETION_KINDS
        if unknown or self.stop_reason not in STOP_REASONS:
            raise LatentMismatchError(
                "not a completion",
                where=f"trajectory of group {self.group_id!r}",
                got=f"kinds {sorted(unknown)}, stop_reason {self.stop_reason!r}",
                expected=f"kinds in {sorted(COMPLETION_KINDS)}, stop_reason in {STOP_REASONS}",
            )
        counts = {
            letter: sum(num_of_kind[kind] for kind in kinds)
            for letter, kinds in _completion_kinds_of().items()
        }
        counts["P"] = self.prompt_ids.shape[0]
        for field_ in fields:
            self._check(field_, [counts[field_.dims[0]]] if field_.dims else [])

    @classmethod
    def of_fields(cls, fields: dict[str, Tensor | None], **changes: Any) -> Trajectory:
        """A trajectory of its recorded fields by name, whether attributes or entries of `extra`.

        Args:
            fields: None counts as absent.
            changes: the attributes that no wire carries as tensors, such as `stop_reason`.
        """
        known = {field_.name for field_ in dataclasses.fields(cls)}
        present = {name: values for name, values in fields.items() if values is not None}
        attributes: dict[str, Any] = {n: values for n, values in present.items() if n in known}
        extra = {name: values for name, values in present.items() if name not in known}
        if extra:
            attributes["extra"] = extra
        return cls(**attributes, **changes)

    def _check(self, field_: Field, count: list[int]) -> None:
        """Raises `LatentMismatchError` at another shape; `count` of rows, empty for a number."""
        values = self.value(field_)
        if values is None and field_.is_optional:
            return
        dims = field_.dims
        if values is None or values.ndim != len(dims) or list(values.shape[:1]) != count:
            expected = ", ".join([*map(str, count), *(_SIZES.get(d, d) for d in dims[1:])])
            raise LatentMismatchError(
                f"recorded {field_.name} does not match the "
                f"{_POSITIONS_OF.get(dims[:1], 'prompt')}",
                where=f"trajectory of group {self.group_id!r}",
                got="nothing"
                if values is None
                else f"{field_.name} of shape {tuple(values.shape)}",
                expected=f"[{expected}]",
            )

    def value(self, field_: Field) -> Tensor | None:
        """What was recorded under a field; None where the trajectory lacks an optional one."""
        values = vars(self).get(field_.name, self.extra.get(field_.name))
        is_empty = (
            values is not None and values.ndim == len(field_.dims) > 1 and values.shape[-1] == 0
        )
        return None if is_empty and field_.is_optional else values

    def columns(self, prompt_kinds: Tensor) -> dict[str, Tensor]:
        """What TransferQueue gets of this trajectory beside what verl makes of it, by column.

        Args:
            prompt_kinds: int64 [P].
        """
        kinds_L = torch.cat([prompt_kinds, self.kinds])
        columns = {}
        for field_ in recorded_fields.of_trajectory():
            values = self.value(field_)
            if field_.is_verls or values is None or not field_.wires & {Wire.WORKER, Wire.DUMP}:
                continue
            columns[field_.column] = (
                kinds_L if field_.name == "kinds" else to_column(field_, values, kinds_L)
            )
        return columns

    def __getstate__(self) -> dict:
        """The attributes as numpy arrays, which pickle ten times as fast as tensors."""
        # worth it: a training step moves thousands of them
        return _as_arrays(vars(self)) | {"extra": _as_arrays(self.extra)}

    def __setstate__(self, state: dict) -> None:
        for name, value in _as_tensors(state | {"extra": _as_tensors(state["extra"])}).items():
            object.__setattr__(self, name, value)

    @property
    def latent_mask(self) -> Tensor:
        """bool [T], True at latent positions."""
        return latent_mask(self.kinds)

    @property
    def recorded_mask(self) -> Tensor:
        """bool [T], True where `latents` holds a vector."""
        return recorded_mask(self.kinds)

    def response_mask(self, start_is_action: bool = True, end_is_action: bool = True) -> Tensor:
        """bool [T], True where the policy acted."""
        return response_mask(self.kinds, start_is_action, end_is_action)

    @property
    def spans(self) -> list[LatentSpan]:
        return latent_spans(self.kinds)

    @property
    def text_ids(self) -> list[int]:
        """Ids outside latent spans and their delimiters: what a reward may see."""
        return self.token_ids[is_text(self.kinds)].tolist()

    @property
    def num_forced_ends(self) -> int:
        return int((self.kinds == PositionKind.FORCED).sum())


def _as_arrays(values: dict) -> dict:
    return {
        name: value.numpy() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _as_tensors(values: dict) -> dict:
    # a copy: what Ray hands out is read-only
    return {
        name: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v
        for name, v in values.items()
    }


def positions_of(kinds: Tensor, letter: str) -> Tensor:
    """bool, True at the positions that a shape letter of `grpo_latent.recorded_fields` counts.

    Args:
        kinds: integer tensor of any shape, values of `PositionKind`.
        letter: P, T, L, N, M or S.
    """
    if letter == "N":
        return recorded_mask(kinds)
    if letter == "M":
        return made_mask(kinds)
    if letter == "S":
        return kinds == PositionKind.SELECTED
    is_completion = kinds >= PositionKind.TEXT
    return {"T": is_completion, "P": ~is_completion, "L": torch.ones_like(is_completion)}[letter]


@cache
def _completion_kinds_of() -> dict[str, tuple[int, ...]]:
    """The kinds that each letter of a completion counts: `positions_of`, asked once."""
    kinds_K = torch.tensor(sorted(COMPLETION_KINDS))
    return {letter: tuple(kinds_K[positions_of(kinds_K, letter)].tolist()) for letter in "TNMS"}


def to_column(field_: Field, values: Tensor, kinds_L: Tensor) -> Tensor:
    """A field's values as its column has them.

    As they are or, with a `column_fill`, one a position [L]; a number as a row of one.
    """
    if field_.column_fill is None:
        return values.reshape(1) if field_.is_number else values  # ragged columns have a dimension
    column_L = torch.full(kinds_L.shape, field_.column_fill, dtype=values.dtype)
    column_L[positions_of(kinds_L, field_.dims[0])] = values
    return column_L


def from_column(field_: Field, column: Tensor, kinds_L: Tensor) -> Tensor:
    """Inverse of `to_column`, of one row or of several end to end; numbers are one a row, [B]."""
    return column if field_.column_fill is None else column[positions_of(kinds_L, field_.dims[0])]


def latent_mask(kinds: Tensor) -> Tensor:
    """bool, True at latent steps, where no token stands: LATENT and SELECTED.

    Args:
        kinds: integer tensor of any shape, values of `PositionKind`.
    """
    return (kinds == PositionKind.LATENT) | (kinds == PositionKind.SELECTED)


def fed_mask(kinds: Tensor) -> Tensor:
    """bool, True where a recorded vector is fed as it is: latent steps and FED_START."""
    return latent_mask(kinds) | (kinds == PositionKind.FED_START)


def made_mask(kinds: Tensor) -> Tensor:
    """bool, True where a hidden state made the recorded vector: LATENT, MIXED and FED_START."""
    is_own = (kinds == PositionKind.LATENT) | (kinds == PositionKind.FED_START)
    return is_own | (kinds == PositionKind.MIXED)


def recorded_mask(kinds: Tensor) -> Tensor:
    """bool, True where a vector is recorded: LATENT, SELECTED, FED_START and MIXED.

    The first three are fed as they are, the last is composed with the token's embedding.
    """
    return fed_mask(kinds) | (kinds == PositionKind.MIXED)


def is_text(kinds: Tensor) -> Tensor:
    """bool, True at sampled tokens that are text: TEXT and MIXED."""
    return (kinds == PositionKind.TEXT) | (kinds == PositionKind.MIXED)


def is_start(kinds: Tensor) -> Tensor:
    """bool, True at tokens that open a span: START and FED_START."""
    return (kinds == PositionKind.START) | (kinds == PositionKind.FED_START)


def is_sampled_delimiter(kinds: Tensor) -> Tensor:
    """bool, True at sampled tokens that open or close a span: START, FED_START and END."""
    return is_start(kinds) | (kinds == PositionKind.END)


def response_mask(
    kinds: Tensor, start_is_action: bool = True, end_is_action: bool = True
) -> Tensor:
    """bool, True where the policy acted: at sampled text, and at sampled delimiters if asked.

    Args:
        kinds: integer tensor of any shape, values of `PositionKind`.
        start_is_action: whether emitting the token that opens a span counts.
        end_is_action: whether a sampled token that closes one does.
    """
    acted = is_text(kinds)
    acted = acted | is_start(kinds) if start_is_action else acted
    return acted | (kinds == PositionKind.END) if end_is_action else acted


def latent_spans(kinds: Tensor) -> list[LatentSpan]:
    """Maximal runs of vectors that are fed as they are, of one sequence, `kinds` [T].

    >>> K = PositionKind
    >>> latent_spans(torch.tensor([K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT]))
    [LatentSpan(start=1, length=2)]
    """
    is_latent = torch.nn.functional.pad(fed_mask(kinds).long(), (1, 1))
    edges = is_latent.diff()
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [LatentSpan(s, e - s) for s, e in zip(starts, ends, strict=True)]


def prompt_kinds(input_ids: Tensor, vision_ids: frozenset[int] | set[int]) -> Tensor:
    """int64, same shape: `VISION` at image placeholders and delimiters, `PROMPT` elsewhere."""
    is_vision = torch.isin(
        input_ids, torch.tensor(sorted(vision_ids), dtype=input_ids.dtype, device=input_ids.device)
    )
    return torch.where(is_vision, int(PositionKind.VISION), int(PositionKind.PROMPT))
