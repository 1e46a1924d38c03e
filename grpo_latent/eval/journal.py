"""Keeps what an evaluation has done so far on disk: an interrupted one goes on where it stopped.

<output>.parts/settings.json                what the evaluation is of: another one refuses to go on
<output>.parts/<phase>.<batch>.json         outcomes of one batch of prompts in one phase
<output>.parts/<phase>.<batch>.safetensors  its trajectories, where later phases need them

A batch is written atomically once it is complete, with a digest of itself and of whose it is; the
folder goes when the report has been written.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from grpo_latent import recorded_fields
from grpo_latent.common.files import write_bytes, write_text
from grpo_latent.common.manifest import seal
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.scoring import Outcome
from grpo_latent.recorded_fields import Field, Wire
from grpo_latent.trajectory import Trajectory

SETTINGS_FILE = "settings.json"
# what reading half a file, or another program's, ends in
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    StopIteration,
    SafetensorError,
)


@dataclass(frozen=True)
class PhaseBatch:
    """What one phase made of one batch of prompts.

    Attributes:
        outcomes: of each prompt's trajectories; empty for a prompt that the phase leaves as it is.
        extra: a further number a prompt, or None (`follow` of `shuffle`).
        num_tokens: positions that were decoded; `seconds`: wall time of it.
        trajectories: the first one of each prompt, None for prompts without; empty where no later
            phase needs them.
    """

    outcomes: list[list[Outcome]]
    num_tokens: int
    seconds: float
    extra: list[float | None] | None = None
    trajectories: Sequence[Trajectory | None] = ()


class Journal:
    """The finished batches of one evaluation.

    Args:
        folder: None keeps nothing.
        settings: all that they depend on, as JSON.

    Raises:
        ConfigError: the folder is another evaluation's.
        DataError: it does not say whose it is.
    """

    def __init__(self, folder: Path | None, settings: dict):
        self.folder = folder
        if folder is None:
            return
        path = folder / SETTINGS_FILE
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if path.is_file() and path.read_text(errors="replace") != text:
            before = _read_settings(path)
            differing = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            raise ConfigError(
                "the unfinished evaluation here is another one",
                where=str(path),
                got=f"other values of {differing}",
                expected="the settings that it was begun with",
                fix=f"Delete {folder} to begin anew, or choose another output.",
            )
        write_text(path, text)
        self.owner = sha256(text.encode()).hexdigest()

    def has(self, phase: str, batch_idx: int) -> bool:
        return self.folder is not None and _file(self.folder, phase, batch_idx, "json").is_file()

    def load(self, phase: str, batch_idx: int) -> PhaseBatch | None:
        """Reads a finished batch; None where there is none.

        Raises:
            DataError: it cannot be read.
        """
        if self.folder is None or not self.has(phase, batch_idx):
            return None
        path = _file(self.folder, phase, batch_idx, "json")
        try:
            values = json.loads(path.read_bytes())
            if values.pop("seal") != seal(values | self._identity(phase, batch_idx)):
                raise ValueError("not the digest of this batch of this evaluation")
            values["outcomes"] = [
                [Outcome(*outcome) for outcome in group] for group in values["outcomes"]
            ]
            expected = values.pop("trajectories_sha256")
            if expected is not None:
                path = _file(self.folder, phase, batch_idx, "safetensors")
                content = path.read_bytes()
                if sha256(content).hexdigest() != expected:
                    raise ValueError("not the digest that the batch's JSON names")
                values["trajectories"] = unpack(content)
            return PhaseBatch(**values)
        except UNREADABLE as error:
            raise DataError(
                "not a readable batch of an evaluation",
                where=str(path),
                got=f"{type(error).__name__}: {error}",
                expected="a file as this program wrote it",
                fix="Delete the batch's .json: it is computed again.",
            ) from error

    def _identity(self, phase: str, batch_idx: int) -> dict:
        """What a batch's digest holds beside its content: what is elsewhere is no part of this."""
        return {"phase": phase, "batch": batch_idx, "evaluation": self.owner}

    def save(self, phase: str, batch_idx: int, batch: PhaseBatch) -> None:
        if self.folder is None:
            return
        content = pack(batch.trajectories) if batch.trajectories else None
        if content is not None:
            write_bytes(_file(self.folder, phase, batch_idx, "safetensors"), content)
        values: dict = {
            f.name: getattr(batch, f.name)
            for f in dataclasses.fields(batch)
            if f.name != "trajectories"
        }
        values["outcomes"] = [
            [dataclasses.astuple(outcome) for outcome in group] for group in batch.outcomes
        ]
        values["trajectories_sha256"] = None if content is None else sha256(content).hexdigest()
        values["seal"] = seal(values | self._identity(phase, batch_idx))
        # last: a batch counts once its JSON is there
        write_text(_file(self.folder, phase, batch_idx, "json"), json.dumps(values))

    def discard(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _file(folder: Path, phase: str, batch_idx: int, suffix: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9_=.,@-]', '_', phase)}.{batch_idx:05d}.{suffix}"


def _read_settings(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            "not the settings of an evaluation",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="a file of this program",
            fix="Delete the folder to begin anew.",
        ) from error


def pack(trajectories: Sequence[Trajectory | None]) -> bytes:
    """Packs trajectories into one safetensors file.

    Of each recorded field it holds the rows of all, end to end, with their lengths. A field that
    none of them has is left out; of one that only some have, `<name>.is_there` says which.
    """
    present = [t for t in trajectories if t is not None]
    tensors = {"present": torch.tensor([t is not None for t in trajectories])}
    for field in recorded_fields.of_trajectory(Wire.JOURNAL) if present else ():
        rows = [t.value(field) for t in present]
        if any(row is not None for row in rows):
            tensors |= _end_to_end(field, rows)
    if present:
        tensors["stopped"] = torch.tensor([t.stop_reason == "eos" for t in present])
        tensors["numbers"] = torch.tensor([[t.seed, t.policy_version] for t in present])
    metadata = {"group_ids": json.dumps([t.group_id for t in present])}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def _end_to_end(field: Field, rows: list[Tensor | None]) -> dict[str, Tensor]:
    there = [row.reshape(1) if field.is_number else row for row in rows if row is not None]
    lengths = torch.tensor([0 if row is None else row.shape[0] if row.ndim else 1 for row in rows])
    packed = {field.name: torch.cat(there), f"{field.name}.lengths": lengths}
    if len(there) < len(rows):
        packed[f"{field.name}.is_there"] = torch.tensor([row is not None for row in rows])
    return packed


def _rows(field: Field, tensors: dict[str, Tensor]) -> list[Tensor | None]:
    """Inverts `_end_to_end`."""
    name = field.name
    rows = list(tensors[name].split(tensors[f"{name}.lengths"].tolist()))
    if field.is_number:
        rows = [row.reshape(()) if len(row) else row for row in rows]
    is_there = tensors.get(f"{name}.is_there")
    return (
        rows
        if is_there is None
        else [row if there else None for row, there in zip(rows, is_there, strict=True)]
    )


def unpack(content: bytes) -> list[Trajectory | None]:
    """Inverts `pack`."""
    # safetensors' own `load` gives no metadata; its header is JSON behind eight bytes of length
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    group_ids = json.loads(header["__metadata__"]["group_ids"])
    tensors = load(content)
    fields = [
        field.name
        for field in recorded_fields.of_trajectory(Wire.JOURNAL)
        if field.name in tensors
    ]
    columns = {name: _rows(recorded_fields.field(name), tensors) for name in fields}
    rows = iter(range(len(group_ids)))
    trajectories: list[Trajectory | None] = []
    for is_present in tensors["present"].tolist():
        if not is_present:
            trajectories.append(None)
            continue
        row = next(rows)
        seed, policy_version = tensors["numbers"][row].tolist()
        trajectories.append(
            Trajectory.of_fields(
                {name: column[row] for name, column in columns.items()},
                stop_reason="eos" if tensors["stopped"][row] else "length",
                group_id=group_ids[row],
                seed=seed,
                policy_version=policy_version,
            )
        )
    return trajectories
