"""The page's data: one overview, and one block a group that the page parses when it is opened.

Every value that came out of a rollout, a data row or a config is data in JSON; the page writes it
as text only.
"""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from grpo_latent import recorded_fields
from grpo_latent.common.pictures import to_rgb
from grpo_latent.eval.dumps import DumpedTrajectory
from grpo_latent.eval.geometry import geometry
from grpo_latent.inspect.evaluation import ablation_rows
from grpo_latent.inspect.probes import GroupProbe, PromptRow
from grpo_latent.inspect.run import Run, label_runs
from grpo_latent.recorded_fields import Wire
from grpo_latent.trajectory import PositionKind, Trajectory, positions_of

KIND_LETTERS = {
    PositionKind.TEXT: "T",
    PositionKind.START: "S",
    PositionKind.LATENT: "L",
    PositionKind.FORCED: "F",
    PositionKind.SELECTED: "V",
    PositionKind.MIXED: "M",
    PositionKind.END: "E",
    PositionKind.FED_START: "S",
}
SECRET = re.compile(r"api_?key|password|secret|credential", re.IGNORECASE)
MAX_POINTS = 500  # of one curve
MAX_RECORDED = 8  # numbers shown of a vector recorded beside a latent
MAX_IMAGE_SIDE, SMALL_IMAGE_SIDE = 336, 128


@dataclass
class GroupData:
    """A group with what was found out about it.

    `row` is None where its data row was not found, `probe` where it was not probed.
    """

    run_idx: int
    step: int
    group_id: str
    trajectories: list[DumpedTrajectory]
    row: PromptRow | None = None
    probe: GroupProbe | None = None
    tokens: list[list[str]] = field(default_factory=list)

    @property
    def hits(self) -> list[bool]:
        """Whether each latent's nearest visual token lies in the boxes; empty without boxes."""
        if self.probe is None or not self.probe.roi:
            return []
        roi = set(self.probe.roi)
        return [int(top) in roi for probe in self.probe.probes for top in probe.cosines.argmax(-1)]


def overview(
    runs: Sequence[Run], groups: Sequence[GroupData], notes: list[str], versions: dict[str, str]
) -> dict:
    """Makes what the page shows before any group is opened."""
    labels = label_runs(runs)
    return {
        "runs": [
            _run(run, labels[run_idx], [g for g in groups if g.run_idx == run_idx])
            for run_idx, run in enumerate(runs)
        ],
        "groups": [group_summary(group) for group in groups],
        "notes": notes,
        "versions": versions,
    }


def _run(run: Run, label: tuple[str, str], groups: Sequence[GroupData]) -> dict:
    metrics = {name: thin(steps, values) for name, (steps, values) in run.metrics.items()}
    return {
        "name": label[0],
        "family": label[1],
        "checkpoint": None if run.checkpoint is None else str(run.checkpoint),
        "metrics": metrics | dump_metrics(run, groups),
        "ablations": [ablation_rows(name, report) for name, report in run.evaluations.items()],
        "config": flatten(run.config),
        "problems": [f"{type(problem).__name__}: {problem}" for problem in run.problems],
        "num_trajectories": len(run.dump.trajectories),
        "num_groups": len(run.dump.groups()),
    }


def dump_metrics(run: Run, groups: Sequence[GroupData]) -> dict[str, list]:
    """Draws the curves that only the dump can give: geometry of latents, hits of the boxes.

    Hits are of the probed groups.
    """
    curves: dict[str, dict[int, float]] = {}
    by_step: dict[int, list] = {}
    for (step, _), trajectories in run.dump.groups().items():
        by_step.setdefault(step, []).append([dumped.trajectory.latents for dumped in trajectories])
    for step, latents in by_step.items():
        for name, value in geometry(latents).items():
            curves.setdefault(f"dump/latent_{name}", {})[step] = value
    hits: dict[int, list[bool]] = {}
    for group in groups:
        hits.setdefault(group.step, []).extend(group.hits)
    for step, values in hits.items():
        if values:
            curves.setdefault("dump/roi_hit", {})[step] = statistics.fmean(values)
    return {
        name: [sorted(points), [short(points[s]) for s in sorted(points)]]
        for name, points in curves.items()
    }


def group_summary(group: GroupData) -> dict:
    """Makes the group's row in the table."""
    trajectories = group.trajectories
    rewards = [dumped.reward for dumped in trajectories]
    advantages = [dumped.advantage for dumped in trajectories if dumped.advantage is not None]
    texts = Counter(dumped.text for dumped in trajectories)
    commonest, count = texts.most_common(1)[0]
    return {
        "run": group.run_idx,
        "step": group.step,
        "group": group.group_id,
        "question": None
        if group.row is None
        else group.row.text.replace("[image]", "").strip()[:200],
        "truth": trajectories[0].ground_truth,
        "size": len(trajectories),
        "reward": short(statistics.fmean(rewards)),
        "reward_std": short(statistics.pstdev(rewards)),
        "advantage": short(max(map(abs, advantages))) if advantages else None,
        "spans": short(statistics.fmean(len(dumped.trajectory.spans) for dumped in trajectories)),
        "steps": short(
            statistics.fmean(len(dumped.trajectory.latents) for dumped in trajectories)
        ),
        "disagreement": short(1 - count / len(trajectories)),
        "commonest": commonest[:80],
        "hit": short(statistics.fmean(group.hits)) if group.hits else None,
        "probed": group.probe is not None,
    }


def group_block(group: GroupData) -> dict:
    """Packs all of a group for the trajectory view.

    Equal probes of a group are stored once: its latents often are equal.
    """
    probes: list[dict] = []
    known: dict[str, int] = {}
    trajectories = []
    for index, dumped in enumerate(group.trajectories):
        entry = _trajectory(dumped, group.tokens[index] if group.tokens else None)
        norms = dumped.trajectory.latents.norm(dim=-1).tolist()
        beside = recorded_beside(dumped.trajectory)
        entry["probes"] = []
        for latent_idx, norm in enumerate(norms):
            probe = (
                {"norm": short(norm)}
                | _latent_probe(group, index, latent_idx)
                | beside[latent_idx]
            )
            key = json.dumps(probe)
            if key not in known:
                known[key] = len(probes)
                probes.append(probe)
            entry["probes"].append(known[key])
        if group.probe is not None:
            entry["log_probs"]["new"] = short_list(group.probe.probes[index].new_log_probs)
        trajectories.append(entry)
    block: dict[str, object] = {
        "trajectories": trajectories,
        "probes": probes,
        "prompt": None,
        "images": [],
        "boxes": [],
        "roi": [],
    }
    if group.row is not None:
        block["prompt"] = group.row.text
        block["boxes"] = [
            {"image": i, "box": [short(side) for side in box]}
            for box, i in zip(group.row.boxes, group.row.box_images, strict=True)
        ]
        if group.probe is not None:
            images = zip(group.row.images(), group.probe.grids, strict=True)
            block["images"] = [image_entry(image, grid) for image, grid in images]
            block["roi"] = group.probe.roi
    return block


def _trajectory(dumped: DumpedTrajectory, tokens: list[str] | None) -> dict:
    trajectory = dumped.trajectory
    return {
        "idx": dumped.trajectory_idx,
        "reward": short(dumped.reward),
        "advantage": None if dumped.advantage is None else short(dumped.advantage),
        "terms": reward_terms(dumped),
        "text": dumped.text,
        "stop": trajectory.stop_reason,
        "kinds": "".join(KIND_LETTERS[PositionKind(kind)] for kind in trajectory.kinds.tolist()),
        "tokens": tokens
        if tokens is not None
        else [f"#{token_id}" for token_id in trajectory.token_ids.tolist()],
        "acted": "".join("1" if acted else "0" for acted in dumped.response_mask.tolist()),
        "log_probs": {name: short_list(values) for name, values in dumped.log_probs.items()},
        "recorded": recorded_by_token(trajectory),
        "numbers": recorded_numbers(trajectory),
    }


def recorded_by_token(trajectory: Trajectory) -> dict[str, list]:
    """Lists, by name, numbers that mechanism or treatment recorded of every position."""
    found: dict[str, list] = {}
    for field_ in recorded_fields.of_trajectory(Wire.INSPECTOR):
        values_T = trajectory.value(field_)
        if field_.dims == "T" and field_.name in trajectory.extra and values_T is not None:
            found[field_.name] = short_list(values_T.float())
    return found


def recorded_numbers(trajectory: Trajectory) -> dict[str, float | None]:
    """Lists, by name, what mechanism or treatment recorded of the trajectory as a whole."""
    found = {
        f.name: trajectory.value(f)
        for f in recorded_fields.of_trajectory(Wire.INSPECTOR)
        if f.is_number
    }
    return {name: short(value.item()) for name, value in found.items() if value is not None}


def recorded_beside(trajectory: Trajectory) -> list[dict]:
    """Lists for each latent position what else was recorded there.

    Entries are {"recorded": {name: first numbers}}, or {}.
    """
    kinds_N = trajectory.kinds[positions_of(trajectory.kinds, "N")]
    found: list[dict] = [{} for _ in kinds_N]
    for shown in recorded_fields.of_trajectory(Wire.INSPECTOR):
        values = trajectory.value(shown)
        letter = shown.dims[:1]
        if shown.name == "latents" or letter not in tuple("NMS") or values is None:
            continue
        for latent_idx, row in zip(
            positions_of(kinds_N, letter).nonzero()[:, 0].tolist(), values, strict=True
        ):
            found[latent_idx][shown.name] = [
                short(value) for value in row.reshape(-1)[:MAX_RECORDED].tolist()
            ]
    return [{"recorded": values} if values else {} for values in found]


def reward_terms(dumped: DumpedTrajectory) -> dict:
    """Picks the terms that say something.

    Left out are the reward or another term again, and bookkeeping of trajectories that went
    well.
    """
    terms = {}
    for name, value in dumped.reward_terms.items():
        is_idle = value in (None, "") or (name == "dropped" and not value)
        is_reward = (
            isinstance(value, float)
            and abs(value - dumped.reward) < 1e-5
            and len(dumped.reward_terms) > 1
        )
        is_copy = name == "acc" and value == dumped.reward_terms.get("accuracy")
        if not is_idle and not is_copy and not (is_reward and name not in ("accuracy", "acc")):
            terms[name] = short(value) if isinstance(value, float) else value
    return terms


def _latent_probe(group: GroupData, index: int, latent_idx: int) -> dict:
    if group.probe is None:
        return {}
    probe = group.probe.probes[index]
    cosines_M = probe.cosines[latent_idx]
    values: dict[str, object] = {
        "gap": short(probe.replay_gaps[latent_idx]),
        "lens": [[token, short(score)] for token, score in probe.lens[latent_idx]],
        "nearest": [[token, short(score)] for token, score in probe.nearest[latent_idx]],
    }
    if len(cosines_M):
        # a byte a visual token: 1/127 of cosine is finer than any colour scale
        quantised = (cosines_M.clamp(-1, 1) * 127).round().to(torch.int8)
        values["cosines"] = base64.b64encode(quantised.numpy().tobytes()).decode()
        top = int(cosines_M.argmax())
        values["top"] = top
        if group.probe.roi:
            values["hit"] = top in set(group.probe.roi)
    return values


def image_entry(image: Image.Image, grid: tuple[int, int]) -> dict:
    """Encodes an image as a data URI: PNG where it is small, else JPEG, shrunk."""
    small = max(image.size) <= SMALL_IMAGE_SIDE
    picture = to_rgb(image)
    width, height = picture.size
    if not small:
        picture = picture.copy()  # it may be the caller's
        picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(
        buffer,
        format="PNG" if small else "JPEG",
        **({"optimize": True} if small else {"quality": 82}),
    )
    kind = "png" if small else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {
        "src": source,
        "width": width,
        "height": height,
        "rows": grid[0],
        "columns": grid[1],
    }


def flatten(config: dict, prefix: str = "") -> dict[str, str]:
    """Flattens a config to dotted keys and values as text; secrets are not shown."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
            if SECRET.search(name) and value:
                flat[name] = "(not shown)"
    return flat


def thin(steps: list[int], values: list[float]) -> list[list]:
    """Thins a curve to at most `MAX_POINTS` points, the last one among them.

    NaN and infinities become null, a gap in the curve.
    """
    stride = -(-len(steps) // MAX_POINTS)
    kept = sorted(set(range(0, len(steps), stride or 1)) | ({len(steps) - 1} if steps else set()))
    return [[steps[i] for i in kept], [short(values[i]) for i in kept]]


def short(value: float) -> float | None:
    """Rounds to five significant digits; None unless finite, because JSON has no NaN."""
    value = float(value)
    return float(f"{value:.5g}") if abs(value) < float("inf") else None


def short_list(values: torch.Tensor) -> list[float | None]:
    return [None if v != v else float(f"{v:.4g}") for v in values.tolist()]
