"""From run folders to the page's data: which groups are shown and probed, how much fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo_latent.common.provenance import versions
from grpo_latent.errors import ConfigError, DataError, GrpoLatentError
from grpo_latent.inspect.payload import GroupData, group_block, overview
from grpo_latent.inspect.probes import Prober, draws, find_rows
from grpo_latent.inspect.run import OnProgress, Run, label_runs, lookup, no_progress
from grpo_latent.latent.treatments import Treatment, parse_treatment
from grpo_latent.models.loading import LatentModel, load_latent_model

# of this environment, which need not be the run's
PACKAGES = ("grpo_latent", "torch", "transformers", "verl", "ray", "plotly")


@dataclass(frozen=True)
class Limits:
    """How much of the runs a page shows.

    Attributes:
        trajectories: shown in the table and the trajectory view, over all runs.
        probed_groups: with image and heat maps, over all runs.
        block_bytes: of all groups' data; groups beyond it keep their row in the table only.
        verify_digests: False compares names and sizes of the checkpoint's files alone.
    """

    trajectories: int = 2000
    probed_groups: int = 64
    block_bytes: int = 4_000_000
    verify_digests: bool = True

    def __post_init__(self):
        for name in ("trajectories", "probed_groups", "block_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    "not a valid count", where=name, got=getattr(self, name), expected=">= 0"
                )


@dataclass(frozen=True)
class Report:
    """`overview` and, by index in its table, the JSON text of the groups that can be opened."""

    overview: dict
    blocks: dict[int, str]


def build_report(
    runs: Sequence[Run],
    limits: Limits,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: OnProgress = no_progress,
) -> Report:
    """Probes and packs; what fails for one run is written on the page, the others go on."""
    notes: list[str] = []
    groups: list[GroupData] = []
    share = max(1, len(runs))
    for run_idx, (run, (name, _)) in enumerate(zip(runs, label_runs(runs), strict=True)):
        shown = choose_groups(run_idx, run, limits.trajectories // share)
        num_shown = sum(len(group.trajectories) for group in shown)
        if num_shown < len(run.dump.trajectories):
            notes.append(
                f"{name}: {num_shown} of {len(run.dump.trajectories)} dumped trajectories are "
                "shown."
            )
        chosen = spread(shown, limits.probed_groups // share)
        try:
            treatment = treatment_of(run)
            if shown:
                progress(f"{name}: loading {run.checkpoint}", 0, 0)
            loaded = load_shown(run, shown, device, dtype, treatment, limits.verify_digests)
            if loaded is not None:
                probe_groups(run, loaded, shown, chosen, progress, treatment)
            notes += [
                f"{name}: {reason}" for reason in [no_replay_gap(treatment, shown)] if reason
            ]
        except (GrpoLatentError, OSError) as error:
            run.problems.append(error)
        groups += shown
    progress("writing the page", 0, 0)
    blocks, left_out = pack(groups, limits.block_bytes)
    if left_out:
        notes.append(
            f"{left_out} groups have a row but no trajectories here, to keep the page small "
            "(--megabytes)."
        )
    summary = overview(runs, groups, notes, versions(PACKAGES))
    for index, row in enumerate(summary["groups"]):
        row["open"] = index in blocks
    return Report(summary, blocks)


def treatment_of(run: Run) -> Treatment | None:
    """Finds what the run made of latents; None where this environment cannot tell.

    That is the case for a class of the user's that cannot be imported here.
    """
    values = lookup(run.config, "latent.treatment")
    if values is not None and not isinstance(values, dict):
        return None
    try:
        return parse_treatment(values)[0]
    except ConfigError:
        return None


def no_replay_gap(treatment: Treatment | None, shown: Sequence[GroupData]) -> str:
    """Says why the page has no state errors of a run; empty where it has."""
    hidden_size = next(
        (t.trajectory.latents.shape[1] for group in shown for t in group.trajectories), 0
    )
    if treatment is None:
        return (
            "no state errors, because latent.treatment.name of its config cannot be imported here."
        )
    if hidden_size and draws(treatment, hidden_size):
        name = type(treatment).__name__
        return (
            f"no state errors, because the treatment {name} draws its latents: "
            "they differ from the model's by design."
        )
    return ""


def choose_groups(run_idx: int, run: Run, max_trajectories: int) -> list[GroupData]:
    """Chooses whole groups, spread evenly over the dump, last step first."""
    groups = [
        GroupData(run_idx, step, group_id, members)
        for (step, group_id), members in run.dump.groups().items()
    ]
    groups.sort(key=lambda group: -group.step)
    total = sum(len(group.trajectories) for group in groups)
    if total <= max_trajectories:
        return groups
    return spread(groups, len(groups) * max_trajectories // total)


def spread(groups: Sequence[GroupData], num: int) -> list[GroupData]:
    """Takes `num` of the groups at even distances, so that all steps are seen."""
    if num >= len(groups):
        return list(groups)
    return [groups[i * len(groups) // num] for i in range(num)]


def load_shown(
    run: Run,
    shown: list[GroupData],
    device: str,
    dtype: torch.dtype,
    treatment: Treatment | None,
    verify_digests: bool,
) -> LatentModel | None:
    """Loads the run's checkpoint; None where nothing is shown.

    Raises:
        GrpoLatentError: there is no checkpoint, or it cannot be read.
    """
    if not shown:
        return None
    if run.checkpoint is None:
        raise DataError(
            "no checkpoint, so no heat maps and no token texts",
            where=str(run.folder),
            expected="checkpoints/global_step_<n>/actor/huggingface, or "
            "actor_rollout_ref.model.path of config.yaml",
            fix="Pass one with --checkpoint.",
        )
    return load_latent_model(
        run.checkpoint,
        dtype=dtype,
        device=device,
        treatment=treatment,
        verify_digests=verify_digests,
    )


def probe_groups(
    run: Run,
    loaded: LatentModel,
    shown: list[GroupData],
    chosen: list[GroupData],
    progress: OnProgress,
    treatment: Treatment | None,
) -> None:
    """Fills tokens of `shown`, and rows and probes of `chosen`.

    Raises:
        GrpoLatentError: the data cannot be read.
    """
    for done, group in enumerate(shown):
        progress(f"{run.name}: texts of tokens, by group", done, len(shown))
        group.tokens = [
            token_texts(loaded, dumped.trajectory.token_ids.tolist())
            for dumped in group.trajectories
        ]
    progress(f"{run.name}: reading prompts", 0, 0)
    rows = find_rows(run.data_files, {group.group_id for group in shown}, run.keys)
    for group in shown:
        group.row = rows.get(group.group_id)
    temperature = lookup(run.config, "actor_rollout_ref.rollout.temperature") or 1.0
    if not isinstance(temperature, int | float):
        where = f"{run.folder}: actor_rollout_ref.rollout.temperature"
        raise DataError(
            "no temperature", where=where, got=temperature, expected="a number, as in training"
        )
    prober = Prober(loaded, float(temperature), treatment)
    missing = sorted({group.group_id for group in shown} - set(rows))
    for done, group in enumerate(chosen):
        progress(f"{run.name}: heat maps, by group", done, len(chosen))
        if group.row is not None:
            group.probe = prober.probe(group.row, group.trajectories)
    if missing:
        raise DataError(
            "prompts of dumped groups are not in the data, so they have no image",
            where=", ".join(map(str, run.data_files)) or "data.train_files",
            got=f"extra_info.index {missing[:5]}",
            expected=f"all of {len(set(group.group_id for group in shown))}",
            fix="Pass the file that the run trained on with --data.",
        )


def token_texts(loaded: LatentModel, token_ids: list[int]) -> list[str]:
    """Decodes each token by itself; an id outside the vocabulary is shown as its number."""
    return [
        str(loaded.tokenizer.decode([token_id]))
        if 0 <= token_id < len(loaded.tokenizer)
        else f"#{token_id}"
        for token_id in token_ids
    ]


def pack(groups: Sequence[GroupData], max_bytes: int) -> tuple[dict[int, str], int]:
    """Packs groups as JSON by index, probed ones first; says how many are beyond `max_bytes`."""
    blocks: dict[int, str] = {}
    used = 0
    for index in sorted(range(len(groups)), key=lambda i: groups[i].probe is None):
        text = json.dumps(group_block(groups[index]), separators=(",", ":"), allow_nan=False)
        if used + len(text) > max_bytes:
            continue
        used += len(text)
        blocks[index] = text
    return blocks, len(groups) - len(blocks)
