"""The trajectories of one training step, read back from TransferQueue: metrics and dumps are made of them.

Pure functions of what verl stored; the trainer calls them in its own order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_latent.common.files import replacing_file
from grpo_latent.errors import ReplayGapError, RewardError
from grpo_latent.eval.geometry import geometry

# of reward_extra_info: bookkeeping, no reward terms
NOT_REWARD_TERMS = ("score", "acc", "dropped")
GEOMETRY_GROUPS = 64


@dataclass(frozen=True)
class ReplayGap:
    """Differences of rollout and replayed log-probs over the actions of a batch, in nats."""

    maximum: float
    mean: float
    row: int
    position: int

    def check(self, bound: float | None, step: int, describe: str, key: str = "latent.replay_logp_gap_bound") -> None:
        """Raises `ReplayGapError` above `bound`, and at a NaN."""
        if bound is None or self.maximum <= bound:
            return
        raise ReplayGapError(
            "replayed log-probs differ from the rollout's",
            where=f"step {step}, {describe}, completion position {self.position}",
            got=f"{self.maximum:.3g} nats",
            expected=f"<= {key}={bound:g}",
            fix="The trained policy is not the one that acted. If the gap is rounding (bf16), raise the bound.",
        )


def replay_gap(rollout_rows: Iterable[Tensor], old_rows: Iterable[Tensor], mask_rows: Iterable[Tensor]) -> ReplayGap:
    """The gap over all rows; each row is one completion [T], `mask` nonzero at actions. No action at all: a gap of 0."""
    total, count, worst = 0.0, 0, ReplayGap(0.0, 0.0, 0, 0)
    for row, (rollout, old, mask) in enumerate(zip(rollout_rows, old_rows, mask_rows, strict=True)):
        gaps = (rollout.double() - old.double()).abs().masked_fill(mask == 0, 0.0)
        # a NaN is the worst gap of all; comparisons with it are False
        gaps = gaps.nan_to_num(nan=torch.inf)
        total, count = total + float(gaps.sum()), count + int((mask != 0).sum())
        if gaps.numel() and float(gaps.max()) > worst.maximum:
            worst = ReplayGap(float(gaps.max()), 0.0, row, int(gaps.argmax()))
    return ReplayGap(worst.maximum, total / max(count, 1), worst.row, worst.position)


def state_error_metrics(error_rows: Iterable[Tensor]) -> dict[str, float]:
    """How far the old policy's replay makes latents other than they were recorded, the worst of the batch.

    Args:
        error_rows: float [m, 2] a trajectory, `treated_forward.state_errors` of its latents.
    """
    errors_M2 = torch.cat([torch.zeros(1, 2), *(row.cpu() for row in error_rows)]).nan_to_num(nan=torch.inf)
    absolute, relative = errors_M2.amax(0).tolist()
    return {"latent/replay_state_err": absolute, "latent/replay_state_err_rel": relative}


def act_masks(kinds_rows: Iterable[Tensor], mask_rows: Iterable[Tensor], kinds: frozenset[int]) -> list[Tensor]:
    """bool [T] of each completion, True at positions of `kinds`.

    Args:
        kinds_rows: of prompt and completion, [L]; `mask_rows` give the completions' lengths.
    """
    wanted = torch.tensor(sorted(kinds))
    pairs = zip(kinds_rows, mask_rows, strict=True)
    return [torch.isin(row[len(row) - len(mask) :], wanted.to(row.device)) for row, mask in pairs]


def is_dropped(extra_fields: dict) -> bool:
    """Whether the reward manager took this trajectory out of training."""
    return float(extra_fields.get("reward_extra_info", {}).get("dropped", 0) or 0) == 1.0


def score_metrics(extra_fields: list[dict], rewards_N: Tensor) -> dict[str, float]:
    """verl's `critic/{score,rewards}/*` without dropped trajectories, whose reward of 0 is none; {} if none was dropped."""
    kept_N = torch.tensor([not is_dropped(fields) for fields in extra_fields])
    if bool(kept_N.all()):
        return {}
    kept_M = rewards_N[kept_N].double()
    values = dict.fromkeys(("mean", "max", "min"), float("nan"))
    if kept_M.numel():
        values = {"mean": float(kept_M.mean()), "max": float(kept_M.max()), "min": float(kept_M.min())}
    return {f"critic/{kind}/{name}": value for kind in ("score", "rewards") for name, value in values.items()}


@dataclass(frozen=True)
class ValidationRows:
    """What verl makes validation metrics of. `columns`: data sources, uids, reward infos by name, turns."""

    columns: tuple[list, list, dict[str, list], list]
    expected_acc_counts: dict[tuple[str, str], int] | None
    dropped_frac: float


def without_dropped(
    data_sources: list,
    uids: list,
    reward_infos: dict[str, list],
    turns: list,
    expected_acc_counts: dict[tuple[str, str], int] | None,
) -> ValidationRows:
    """Validation without the trajectories that a reward failed on under `on_error=drop`: verl would count them as 0.

    Args:
        reward_infos: columns of `reward_extra_info`, one value a trajectory.
        expected_acc_counts: trajectories by (data source, uid), which verl fills up with accuracies of 0.
    """
    dropped = [float(value or 0) == 1.0 for value in reward_infos.get("dropped", [0] * len(uids))]
    if not any(dropped):
        return ValidationRows((data_sources, uids, reward_infos, turns), expected_acc_counts, 0.0)
    kept = [i for i, drop in enumerate(dropped) if not drop]
    counts = None if expected_acc_counts is None else dict(expected_acc_counts)
    for i, drop in enumerate(dropped):
        key = (str(data_sources[i]), str(uids[i]))
        if drop and counts and key in counts:
            counts[key] -= 1
    columns = [[column[i] for i in kept] for column in (data_sources, uids, turns)]
    infos = {name: [values[i] for i in kept] for name, values in reward_infos.items()}
    return ValidationRows((columns[0], columns[1], infos, columns[2]), counts, sum(dropped) / len(dropped))


def latent_metrics(extra_fields: list[dict]) -> dict[str, float]:
    """`latent/*` over a batch of trajectories."""
    summaries = [fields["latent"] for fields in extra_fields]
    spans = torch.tensor([float(s["num_spans"]) for s in summaries])
    steps = torch.tensor([float(s["num_steps"]) for s in summaries])
    forced = sum(s["num_forced_ends"] for s in summaries)
    norms = torch.cat([torch.as_tensor(fields["latent_norms"], dtype=torch.float64) for fields in extra_fields])
    return {
        "latent/frac_rollouts": float((spans > 0).double().mean()),
        "latent/spans_mean": float(spans.mean()),
        "latent/steps_mean": float(steps.mean()),
        "latent/steps_max": float(steps.max()),
        "latent/forced_end_frac": forced / max(float(spans.sum()), 1.0),
        "latent/norm_mean": float(norms.mean()) if norms.numel() else 0.0,
        "latent/stopped_at_length_frac": sum(f["stop_reason"] == "length" for f in extra_fields) / len(extra_fields),
    }


def latent_geometry(keys: list[str], fetch: Callable[[list[str]], Mapping[str, Tensor]]) -> dict[str, float]:
    """Signs of collapse over the first groups of a batch: cosines between latents, and their effective rank.

    Args:
        keys: of the batch's trajectories, `<group>_<session>_<output>`.
        fetch: `latent_embeds` of some of them.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.rsplit("_", 2)[0], []).append(key)
    chosen = list(groups.values())[:GEOMETRY_GROUPS]
    latents = iter(fetch([key for group in chosen for key in group])["latent_embeds"].unbind())
    found = geometry([[next(latents) for _ in group] for group in chosen])
    return {f"latent/{name}": value for name, value in found.items() if name != "norm_mean"}


def reward_metrics(extra_fields: list[dict], rewards_N: Tensor, group_ids: list[str]) -> dict[str, float]:
    """`rewards/<name>/{mean,std}` of each numeric reward term, and the fraction of groups without any signal."""
    terms: dict[str, list[float]] = {}
    kept = [not is_dropped(fields) for fields in extra_fields]
    for fields, keep in zip(extra_fields, kept, strict=True):
        for name, value in fields.get("reward_extra_info", {}).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if keep and is_number and name not in NOT_REWARD_TERMS:
                terms.setdefault(name, []).append(float(value))
    metrics = {}
    for name, values in terms.items():
        values_N = torch.tensor(values, dtype=torch.float64)
        metrics[f"rewards/{name}/mean"] = float(values_N.mean())
        metrics[f"rewards/{name}/std"] = float(values_N.std(correction=0))
    groups: dict[str, set[float]] = {}
    for reward, group_id, keep in zip(rewards_N.tolist(), group_ids, kept, strict=True):
        if keep:
            groups.setdefault(group_id, set()).add(reward)
    metrics["frac_reward_zero_std"] = sum(len(v) == 1 for v in groups.values()) / max(len(groups), 1)
    metrics["rewards/dropped_frac"] = 1 - sum(kept) / len(kept)
    kinds = [fields.get("reward_extra_info", {}).get("reward_error") for fields in extra_fields]
    return metrics | {f"rewards/errors/{kind}": float(kinds.count(kind)) for kind in RewardError.KINDS}


def dump_rollouts(folder: str | Path, step: int, rows: list[dict], latents: dict[str, Tensor]) -> None:
    """Writes `step_<n>.jsonl`, one trajectory a line, and `step_<n>.safetensors`, its latents, both whole or not at all.

    Args:
        latents: float [n, H] by the trajectory's `id`.
    """
    folder = Path(folder)
    # readers look for the jsonl: it comes last
    with (
        replacing_file(folder / f"step_{step}.jsonl") as text,
        replacing_file(folder / f"step_{step}.safetensors") as tensors,
    ):
        save_file({name: tensor.contiguous() for name, tensor in latents.items()}, tensors)
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
