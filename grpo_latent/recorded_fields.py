"""What is recorded of a trajectory, each field declared once.

Every wire derives its columns and names from this table:

    rollout ─ Trajectory ─┬─ agent loop ─ TransferQueue ─┬─ worker   `MicroBatch`, of columns
                          │                              └─ dump     rollouts/step_<n> ─ inspector
                          └─ journal                                 batches of an evaluation

A mechanism or a treatment that records one thing more declares it beside its class, so that every
process that loads the class knows the field:

    recorded_fields.register(Field("gate", torch.float32, "MA", wires=ALL, is_optional=True))

and hands the values to `Trajectory.extra["gate"]`; no other module has to know.

Legend of `dims`; the first letter says what a row of the field stands for: P prompt positions, T
completion positions, L both, N positions with a recorded vector, M those of them that a hidden
state made (LATENT, MIXED, FED_START), S SELECTED positions; further ones are sizes: H hidden, A
aux. No letter at all: one number a trajectory, a tensor without dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from grpo_latent.errors import ConfigError


class Wire(StrEnum):
    """Where a field travels to."""

    WORKER = "worker"  # fetched by training workers; a column costs time for every trajectory
    DUMP = "dump"
    JOURNAL = "journal"
    INSPECTOR = "inspector"  # shown at its positions on the page; carried there by the dump


ALL = frozenset(Wire)
FILES = frozenset({Wire.DUMP, Wire.JOURNAL})
NOT_SELECTED = -1


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: in a trajectory: an attribute of `Trajectory`, or a key of its `extra`.
        dtype: on every wire.
        dims: shape letters, see the module.
        wires: which carry it.
        column: its name in TransferQueue, where that is not `name`.
        dump: its name in dumps, where that is not `name`.
        column_fill: where the column is not as `dims` but [L], one entry a position of prompt and
            completion: what stands at positions that the field says nothing of.
        is_optional: whether trajectories may lack it, as they do where its last dimension is 0.
        is_verls: whether the column is made by verl, or by training, and not out of a trajectory.
    """

    name: str
    dtype: torch.dtype | None
    dims: str
    wires: frozenset[Wire] = FILES
    column: str = ""
    dump: str = ""
    column_fill: int | None = None
    is_optional: bool = False
    is_verls: bool = False

    def __post_init__(self) -> None:
        if (
            not self.name
            or self.dims[:1] not in ("", *"PTLNMS")
            or (self.is_number and self.column_fill)
        ):
            raise ConfigError(
                "not a recorded field",
                where=f"field {self.name!r}",
                got=f"dims {self.dims!r}",
                expected="a name, and dims that begin with one of P, T, L, N, M, S, or none (and "
                "then "
                "no column_fill)",
            )
        object.__setattr__(self, "column", self.column or self.name)
        object.__setattr__(self, "dump", self.dump or self.name)
        object.__setattr__(self, "wires", frozenset(self.wires))

    @property
    def is_number(self) -> bool:
        """Whether a trajectory has one number of it."""
        return self.dims == ""

    @property
    def is_matrix(self) -> bool:
        """Whether a row of it is a vector: those go to binary files, not into lines of JSON."""
        return len(self.dims) > 1


_WORKER = frozenset({Wire.WORKER})
_EVERYWHERE_BUT_PAGE = FILES | _WORKER
_LOG_PROBS = frozenset({Wire.DUMP, Wire.INSPECTOR})

# made by the rollout
_TRAJECTORY_FIELDS = (
    Field("prompt_ids", torch.int64, "P", _EVERYWHERE_BUT_PAGE, column="prompts", is_verls=True),
    Field("token_ids", torch.int64, "T", ALL, column="responses", is_verls=True),
    # the column has the prompt's kinds in front
    Field("kinds", torch.int64, "T", ALL, column="position_kinds", column_fill=0),
    Field("latents", torch.float32, "NH", ALL, column="latent_embeds"),
    Field("selected_idx", torch.int64, "S", ALL, column_fill=NOT_SELECTED),
    Field("latent_aux", torch.float32, "MA", ALL, is_optional=True),
    Field("rollout_log_probs", torch.float32, "T", FILES | _LOG_PROBS, is_verls=True),
    Field("sampling_log_probs", torch.float32, "T", FILES | _LOG_PROBS),
)
# made by verl, its agent loop and its training: columns only
_TRAINING_FIELDS = (
    Field("response_mask", torch.int64, "T", _WORKER | {Wire.DUMP, Wire.INSPECTOR}, is_verls=True),
    Field("advantages", torch.float32, "T", _WORKER | {Wire.DUMP, Wire.INSPECTOR}, is_verls=True),
    Field("old_log_probs", torch.float32, "T", _WORKER | _LOG_PROBS, is_verls=True),
    Field(
        "ref_log_probs",
        torch.float32,
        "T",
        _WORKER | _LOG_PROBS,
        column="ref_log_prob",
        is_verls=True,
    ),
    Field("rollout_is_weights", torch.float32, "T", _WORKER, is_verls=True),
    # verl's engine counts a batch's actions by it; rollout correction, which clears some of
    # response_mask, leaves it
    Field("loss_mask", torch.int64, "T", _WORKER, is_verls=True),
    Field("input_ids", torch.int64, "L", _WORKER, is_verls=True),
    Field("position_ids", torch.int64, "L", _WORKER, is_verls=True),
    # of a group's first trajectory; workers fetch them once a step, by `worker.group_images`
    Field("multi_modal_inputs", None, "P", frozenset(), is_verls=True),
    Field("ref_latent_means", torch.float32, "MH", _WORKER, is_verls=True),
)
_FIELDS: dict[str, Field] = {
    field.name: field for field in (*_TRAJECTORY_FIELDS, *_TRAINING_FIELDS)
}
_TRAINING_NAMES = frozenset(field.name for field in _TRAINING_FIELDS)


def register(field: Field) -> None:
    """Declares one more field of trajectories; once more the same is no harm.

    Raises:
        ConfigError: the name, or its name on a wire, is taken.
    """
    known = _FIELDS.get(field.name)
    if known == field:
        return
    taken = {name for other in _FIELDS.values() for name in (other.name, other.column, other.dump)}
    clashes = sorted({field.name, field.column, field.dump} & taken)
    if clashes:
        raise ConfigError(
            "a recorded field is declared twice",
            where=f"field {field.name!r}",
            got=f"{clashes}, which another field has",
            expected="names of its own on every wire",
        )
    _FIELDS[field.name] = field


def field(name: str) -> Field:
    """The field of a trajectory or of training by its name in trajectories."""
    return _FIELDS[name]


def of_trajectory(wire: Wire | None = None) -> tuple[Field, ...]:
    """Fields that a trajectory has, those on `wire` if given."""
    fields = (f for f in _FIELDS.values() if f.name not in _TRAINING_NAMES)
    return tuple(f for f in fields if wire is None or wire in f.wires)


def on(wire: Wire) -> tuple[Field, ...]:
    """All fields on a wire, those of training included."""
    return tuple(f for f in _FIELDS.values() if wire in f.wires)


def columns(wire: Wire) -> list[str]:
    """Names in TransferQueue of what a wire carries."""
    return [f.column for f in on(wire)]
