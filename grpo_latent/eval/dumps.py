"""The one reader of rollout dumps, which training writes each `latent.dump_every` steps.

rollouts/step_<n>.jsonl         one trajectory a line: ids, kinds, masks, log-probs, reward, its terms, advantages
rollouts/step_<n>.safetensors   its latents, float [n, H], by the trajectory's id "<row index>/<index in the group>"
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo_latent.errors import DataError, GrpoLatentError
from grpo_latent.trajectory import NOT_SELECTED, Trajectory

REQUIRED = ("step", "id", "text", "stop_reason", "reward", "prompt_ids", "token_ids", "kinds", "response_mask")
FIX = "It was cut off while being written, or by another release: delete it, or dump the step again."


@dataclass(frozen=True)
class DumpedTrajectory:
    """A trajectory as it was trained on. T completion positions.

    Attributes:
        trajectory: ids, kinds, latents and the rollout's log-probs (zeros where they were not dumped).
        step: training step; `group_id`: index of the data row; `trajectory_idx`: index in the group.
        text: completion without latent spans, as rewards saw it.
        reward_terms: what the reward reported beside the reward.
        advantage: of its actions; None where none was dumped.
        response_mask: bool [T], True where the policy acted.
        log_probs: float [T] by name, of `rollout`, `sampling`, `old`, `ref` those that were dumped.
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


def read_dump(folder: str | Path) -> Dump:
    """All steps of a folder, in order. A file that cannot be read becomes a problem that names it; the others still come."""
    trajectories: list[DumpedTrajectory] = []
    problems: list[GrpoLatentError] = []
    for path in dump_files(folder):
        try:
            trajectories += read_step(path)
        except DataError as error:
            problems.append(error)
    return Dump(trajectories, problems)


def dump_files(folder: str | Path) -> list[Path]:
    """The jsonl files of a folder, by step."""
    numbered = [(re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in Path(folder).glob("step_*.jsonl")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def read_step(path: str | Path) -> list[DumpedTrajectory]:
    """The trajectories of one jsonl file.

    Raises:
        DataError: the file, the line or the latents beside it are missing, malformed or do not fit each other.
    """
    path = Path(path)
    latents = path.with_suffix(".safetensors")
    try:
        with safe_open(latents, framework="pt") as tensors:
            known = set(tensors.keys())
            return [
                _parse(line, f"{path} line {number}", tensors, known)
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            ]
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        where = str(path if isinstance(error, UnicodeDecodeError) else latents)
        raise DataError(
            "not a readable rollout dump",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="a dump",
            fix=FIX,
        ) from error


def _parse(line: str, where: str, tensors, known: set[str]) -> DumpedTrajectory:
    try:
        record = json.loads(line)
        missing = [name for name in REQUIRED if name not in record]
        if missing:
            raise DataError("fields are missing", where=where, got=sorted(record), expected=str(missing), fix=FIX)
        if record["id"] not in known:
            raise DataError("no latents", where=where, got=record["id"], expected="an id of the safetensors", fix=FIX)
        return _build(record, tensors.get_tensor(record["id"]).float())
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(
            "malformed trajectory",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="a line of verl_plugin's dump",
            fix=FIX,
        ) from error


def _build(record: dict, latents_NH: Tensor) -> DumpedTrajectory:
    group_id, trajectory_idx = record["id"].rsplit("/", 1)
    prompt_ids, token_ids = torch.tensor(record["prompt_ids"]), torch.tensor(record["token_ids"], dtype=torch.long)
    kinds = torch.tensor(record["kinds"])[len(prompt_ids) :]
    names = ("rollout", "sampling", "old", "ref")
    values = {name: record.get(f"{name}_log_probs") for name in names}
    log_probs = {name: torch.tensor(column) for name, column in values.items() if column is not None}
    response_mask = torch.tensor(record["response_mask"]).bool()
    lengths = {name: len(values) for name, values in (*log_probs.items(), ("response_mask", response_mask))}
    if set(lengths.values()) != {len(token_ids)}:
        raise ValueError(f"{len(token_ids)} tokens, but {lengths}")
    zeros = torch.zeros(len(token_ids))
    chosen = torch.tensor(record.get("selected_idx", ()), dtype=torch.long)
    trajectory = Trajectory(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        kinds=kinds,
        latents=latents_NH.reshape(-1, latents_NH.shape[-1]),
        rollout_log_probs=log_probs.get("rollout", zeros),
        sampling_log_probs=log_probs.get("sampling", zeros),
        stop_reason=record["stop_reason"],
        group_id=group_id,
        selected_idx=chosen[chosen != NOT_SELECTED],
    )
    advantages = record.get("advantages")
    acted = response_mask.nonzero()[:, 0].tolist()
    return DumpedTrajectory(
        trajectory=trajectory,
        step=int(record["step"]),
        group_id=group_id,
        trajectory_idx=int(trajectory_idx),
        text=str(record["text"]),
        ground_truth=None if record.get("ground_truth") is None else str(record["ground_truth"]),
        reward=float(record["reward"]),
        reward_terms=dict(record.get("reward_terms") or {}),
        advantage=None if advantages is None else float(advantages[acted[0]]) if acted else 0.0,
        response_mask=response_mask,
        log_probs=log_probs,
    )
