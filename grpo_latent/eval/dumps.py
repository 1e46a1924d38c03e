"""Writes and reads rollout dumps, which training leaves each `latent.dump_every` steps.

rollouts/step_<n>.jsonl         one trajectory a line: ids, kinds, masks, log-probs, reward, its
                                terms, advantages
rollouts/step_<n>.safetensors   its latents, float [n, H], by the trajectory's id, which is
                                "<row index>/<index in the group>", and other recorded vectors by
                                "<id>/<name>"; in its metadata digests of the lines and of these

Which fields there are, and where each of them stands, follows from `grpo_latent.recorded_fields`:
sequences of numbers are in the lines, vectors in the binary file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_latent import recorded_fields
from grpo_latent.common.files import replacing_file
from grpo_latent.errors import DataError, GrpoLatentError
from grpo_latent.recorded_fields import Field, Wire
from grpo_latent.trajectory import Trajectory, from_column

LOG_PROBS = "_log_probs"  # fields of such a name are one number a position
REQUIRED = (
    "step",
    "id",
    "text",
    "stop_reason",
    "reward",
    "prompt_ids",
    "token_ids",
    "kinds",
    "response_mask",
)
DIGESTS, LINES, VECTORS = "digests", "lines_sha256", "vectors_sha256"  # in its metadata
FIX = (
    "It was cut off while being written, or by another release: delete it, or dump the step again."
)


@dataclass(frozen=True)
class DumpedTrajectory:
    """A trajectory as it was trained on. T completion positions.

    Attributes:
        trajectory: ids, kinds, latents and the rollout's log-probs (zeros where they were not
            dumped).
        step: training step; `group_id`: index of the data row; `trajectory_idx`: index in the
            group.
        text: completion without latent spans, as rewards saw it.
        reward_terms: what the reward reported beside the reward.
        advantage: of its actions; None where none was dumped.
        response_mask: bool [T], True where the policy acted.
        log_probs: float [T] by name, of `rollout`, `sampling`, `old`, `ref` those that were
            dumped.
    """

    trajectory: Trajectory
    step: int
    group_id: str
    trajectory_idx: int
    text: str
    ground_truth: str | None
    reward: float
    reward_terms: dict
    advantage: float | None
    response_mask: Tensor
    log_probs: dict[str, Tensor]


@dataclass(frozen=True)
class Dump:
    """Readable trajectories by step and group, and what could not be read."""

    trajectories: list[DumpedTrajectory]
    problems: list[GrpoLatentError]

    def groups(self) -> dict[tuple[int, str], list[DumpedTrajectory]]:
        """Trajectories by (step, group), both in order of reading."""
        groups: dict[tuple[int, str], list[DumpedTrajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault((trajectory.step, trajectory.group_id), []).append(trajectory)
        return groups


def split_columns(
    record_id: str, columns: dict[str, Tensor]
) -> tuple[dict[str, list | float], dict[str, Tensor]]:
    """Splits a trajectory's columns into its line's and the binary file's.

    Args:
        columns: by column of TransferQueue, those of the wire `dump` that there are.
    """
    line: dict[str, list | float] = {}
    tensors: dict[str, Tensor] = {}
    for field in recorded_fields.on(Wire.DUMP):
        values = columns.get(field.column)
        if values is None:
            continue
        if field.is_matrix:
            tensors[_key(record_id, field)] = values
        else:
            line[field.dump] = values.item() if field.is_number else values.tolist()
    return line, tensors


def write_step(
    folder: str | Path, step: int, records: list[dict], tensors: dict[str, Tensor]
) -> None:
    """Writes `step_<n>.jsonl` and `step_<n>.safetensors`, both whole or not at all.

    Args:
        tensors: of all trajectories, by the keys that `split_columns` gives them.
    """
    path = Path(folder) / f"step_{step}.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    whole = {name: values.contiguous() for name, values in tensors.items()}
    # a dump counts once its lines are there
    with replacing_file(path) as lines, replacing_file(path.with_suffix(".safetensors")) as binary:
        lines.write_bytes(text)
        digests = {LINES: sha256(text).hexdigest(), VECTORS: digest_of(whole)}
        # under one key: safetensors writes several in an order that differs from run to run
        save_file(whole, binary, {DIGESTS: json.dumps(digests)})


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Digests names, types, shapes and values."""
    digest = sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(record_id: str, field: Field) -> str:
    return record_id if field.name == "latents" else f"{record_id}/{field.dump}"


def read_dump(
    folder: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Dump:
    """Reads all steps of a folder, in order.

    A file that cannot be read becomes a problem that names it; the others still come.
    """
    trajectories: list[DumpedTrajectory] = []
    problems: list[GrpoLatentError] = []
    paths = dump_files(folder)
    for done, path in enumerate(paths):
        progress(done, len(paths))
        try:
            trajectories += read_step(path)
        except DataError as error:
            problems.append(error)
    for path in sorted(Path(folder).glob("step_*.safetensors")):
        lines = path.with_suffix(".jsonl")
        if not lines.is_file():
            what = f"latents without their lines, {lines.name}"
            problems.append(DataError(what, where=str(path), expected="both files", fix=FIX))
    return Dump(trajectories, problems)


def dump_files(folder: str | Path) -> list[Path]:
    """Finds the jsonl files of a folder, by step."""
    numbered = [
        (re.fullmatch(r"step_(\d+)\.jsonl", path.name), path)
        for path in Path(folder).glob("step_*.jsonl")
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def read_step(path: str | Path) -> list[DumpedTrajectory]:
    """Reads the trajectories of one jsonl file.

    Raises:
        DataError: the file, the line or the latents beside it are missing, malformed, changed
            since they were written, or do not fit each other.
    """
    path = Path(path)
    latents = path.with_suffix(".safetensors")
    try:
        content = path.read_bytes()
        with safe_open(latents, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            digests = json.loads((file.metadata() or {}).get(DIGESTS, "{}"))
        lines = content.decode().splitlines()
        trajectories = [
            _parse(line, f"{path} line {number}", tensors) for number, line in enumerate(lines, 1)
        ]
        # last: a line that cannot be read is named by its number
        _compare(path, content, tensors, digests)
        return trajectories
    except DataError:
        raise
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        where = str(path if isinstance(error, UnicodeDecodeError) else latents)
        raise DataError(
            "not a readable rollout dump",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="a dump",
            fix=FIX,
        ) from error


def _compare(
    path: Path, content: bytes, tensors: dict[str, Tensor], digests: dict[str, str]
) -> None:
    """Raises `DataError` where a dump is not what was written; older ones have no digests."""
    found = {LINES: sha256(content).hexdigest(), VECTORS: digest_of(tensors)}
    names = {LINES: path.name, VECTORS: path.with_suffix(".safetensors").name}
    changed = [name for name in found if digests and digests.get(name) != found[name]]
    if changed:
        raise DataError(
            "changed since it was dumped",
            where=" and ".join(str(path.with_name(names[name])) for name in changed),
            got=f"{len(content.splitlines())} lines, {len(tensors)} tensors",
            expected=f"the digests in {names[VECTORS]}",
            fix=FIX,
        )


def _parse(line: str, where: str, tensors: dict[str, Tensor]) -> DumpedTrajectory:
    try:
        record = json.loads(line)
        missing = [name for name in REQUIRED if name not in record]
        if missing:
            raise DataError(
                "fields are missing",
                where=where,
                got=sorted(record),
                expected=str(missing),
                fix=FIX,
            )
        if record["id"] not in tensors:
            raise DataError(
                "no latents",
                where=where,
                got=record["id"],
                expected="an id of the safetensors",
                fix=FIX,
            )
        keys = {
            field: _key(record["id"], field)
            for field in recorded_fields.of_trajectory(Wire.DUMP)
            if field.is_matrix
        }
        return _build(
            record,
            {f.name: tensors[key].to(f.dtype) for f, key in keys.items() if key in tensors},
        )
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise DataError(
            "malformed trajectory",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="a line of verl_plugin's dump",
            fix=FIX,
        ) from error


def _build(record: dict, matrices: dict[str, Tensor]) -> DumpedTrajectory:
    group_id, trajectory_idx = record["id"].rsplit("/", 1)
    values = matrices | _sequences(record)
    lengths = {name: len(values[name]) for name in ("token_ids", "response_mask")}
    log_probs = {
        name.removesuffix(LOG_PROBS): row
        for name, row in values.items()
        if name.endswith(LOG_PROBS)
    }
    lengths |= {name: len(row) for name, row in log_probs.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{lengths['token_ids']} tokens, but {lengths}")
    reward = float(record["reward"])
    if not math.isfinite(reward):
        raise ValueError(f"reward {reward}")
    zeros = torch.zeros(lengths["token_ids"])
    # what dumps may lack, of older releases or of trajectories without such positions
    absent = {
        "rollout_log_probs": zeros,
        "sampling_log_probs": zeros,
        "selected_idx": torch.zeros(0, dtype=torch.long),
    }
    fields = {
        f.name: values.get(f.name, absent.get(f.name))
        for f in recorded_fields.of_trajectory(Wire.DUMP)
    }
    response_mask = values["response_mask"].bool()
    acted = response_mask.nonzero()[:, 0].tolist()
    advantages = values.get("advantages")
    return DumpedTrajectory(
        trajectory=Trajectory.of_fields(
            fields, stop_reason=record["stop_reason"], group_id=group_id
        ),
        step=int(record["step"]),
        group_id=group_id,
        trajectory_idx=int(trajectory_idx),
        text=str(record["text"]),
        ground_truth=None if record.get("ground_truth") is None else str(record["ground_truth"]),
        reward=reward,
        reward_terms=dict(record.get("reward_terms") or {}),
        advantage=None if advantages is None else float(advantages[acted[0]]) if acted else 0.0,
        response_mask=response_mask,
        log_probs=log_probs,
    )


def _sequences(record: dict) -> dict[str, Tensor]:
    """Reads the fields of a line by name, as trajectories have them."""
    fields = [
        field
        for field in recorded_fields.on(Wire.DUMP)
        if not field.is_matrix and field.dump in record
    ]
    columns = {field: torch.tensor(record[field.dump], dtype=field.dtype) for field in fields}
    kinds_L = columns[recorded_fields.field("kinds")]
    values = {field.name: from_column(field, column, kinds_L) for field, column in columns.items()}
    # by length and not by kind: whether the kinds fit is for `Trajectory` to say
    return values | {"kinds": kinds_L[len(values["prompt_ids"]) :]}
