"""Metrics of a step's trajectories: latents, rewards, verl's scores without dropped ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transfer_queue import KVBatchMeta

from grpo_latent import recorded_fields
from grpo_latent.errors import RewardError
from grpo_latent.eval.geometry import geometry
from grpo_latent.verl_plugin.boot.row_keys import group_of
from grpo_latent.verl_plugin.trainer.dropped import is_dropped
from grpo_latent.verl_plugin.trainer.spread import reward_spread
from grpo_latent.verl_plugin.trainer.step_rows import StepRows

# of reward_extra_info: bookkeeping, no reward terms
NOT_REWARD_TERMS = ("score", "acc", "dropped")
GEOMETRY_GROUPS = 64


def step_metrics(batch: KVBatchMeta) -> dict[str, float]:
    """All of them, of a batch as training has left it."""
    rows, latents = (
        StepRows(batch, ("extra_fields", "rm_scores")),
        recorded_fields.field("latents").column,
    )
    extra_fields = rows.objects("extra_fields")
    rewards_N = torch.stack([scores.sum() for scores in rows.tensors("rm_scores")])
    metrics = score_metrics(extra_fields, rewards_N) | latent_metrics(extra_fields)
    metrics |= latent_geometry(
        batch.keys, lambda keys: StepRows(batch, [latents], keys).tensors(latents)
    )
    return metrics | reward_metrics(extra_fields, rewards_N, rows.group_ids)


def score_metrics(extra_fields: list[dict], rewards_N: Tensor) -> dict[str, float]:
    """verl's `critic/{score,rewards}/*` without dropped trajectories; {} if none was dropped."""
    kept_N = torch.tensor([not is_dropped(fields) for fields in extra_fields])
    if bool(kept_N.all()):
        return {}
    kept_M = rewards_N[kept_N].double()
    values = dict.fromkeys(("mean", "max", "min"), float("nan"))
    if kept_M.numel():
        values = {
            "mean": float(kept_M.mean()),
            "max": float(kept_M.max()),
            "min": float(kept_M.min()),
        }
    return {
        f"critic/{kind}/{name}": value
        for kind in ("score", "rewards")
        for name, value in values.items()
    }


def latent_metrics(extra_fields: list[dict]) -> dict[str, float]:
    """`latent/*` over a batch of trajectories."""
    summaries = [fields["latent"] for fields in extra_fields]
    spans = torch.tensor([float(s["num_spans"]) for s in summaries])
    steps = torch.tensor([float(s["num_steps"]) for s in summaries])
    forced = sum(s["num_forced_ends"] for s in summaries)
    norms = torch.cat(
        [torch.as_tensor(fields["latent_norms"], dtype=torch.float64) for fields in extra_fields]
    )
    # a mechanism may record vectors beside its tokens, without any span
    num_with_latents = sum(len(fields["latent_norms"]) > 0 for fields in extra_fields)
    return {
        "latent/frac_rollouts": num_with_latents / len(extra_fields),
        "latent/spans_mean": float(spans.mean()),
        "latent/steps_mean": float(steps.mean()),
        "latent/steps_max": float(steps.max()),
        "latent/forced_end_frac": forced / max(float(spans.sum()), 1.0),
        "latent/norm_mean": float(norms.mean()) if norms.numel() else 0.0,
        "latent/stopped_at_length_frac": sum(f["stop_reason"] == "length" for f in extra_fields)
        / len(extra_fields),
    }


def latent_geometry(
    keys: list[str], fetch: Callable[[list[str]], list[Tensor]]
) -> dict[str, float]:
    """Signs of collapse over the batch's first groups: cosines between latents, effective rank.

    Args:
        keys: of the batch's trajectories, `<group>_<session>_<output>`.
        fetch: the latents of some of them, float [n, H] each.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(group_of(key), []).append(key)
    chosen = list(groups.values())[:GEOMETRY_GROUPS]
    latents = iter(fetch([key for group in chosen for key in group]))
    found = geometry([[next(latents) for _ in group] for group in chosen])
    return {f"latent/{name}": value for name, value in found.items() if name != "norm_mean"}


def reward_metrics(
    extra_fields: list[dict], rewards_N: Tensor, group_ids: list[str]
) -> dict[str, float]:
    """`rewards/<name>/{mean,std}` of numeric reward terms; `reward_spread`; what was dropped."""
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
    counted = [
        (reward, group_id)
        for reward, group_id, keep in zip(rewards_N.tolist(), group_ids, kept, strict=True)
        if keep
    ]
    metrics |= reward_spread([reward for reward, _ in counted], [group for _, group in counted])
    metrics["rewards/dropped_frac"] = 1 - sum(kept) / len(kept)
    kinds = [fields.get("reward_extra_info", {}).get("reward_error") for fields in extra_fields]
    return metrics | {
        f"rewards/errors/{kind}": float(kinds.count(kind)) for kind in RewardError.KINDS
    }
