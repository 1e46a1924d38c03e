"""The console's line of a step, a validation or an alarm: which metrics it shows, and how."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What happened last.

    `kind` is start, step, validation, or alarm or event (with a line of text).
    """

    kind: str
    step: int
    total_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    text: str = ""


SHORT_NAMES = {
    "reward": ("critic/score/mean",),
    "kl": ("actor/kl_loss",),  # to the reference: without one there is none
    "entropy": ("actor/entropy",),
    "latent": ("latent/steps_mean",),
    "used": ("latent/usage_gap/shuffle",),
    "silent": ("frac_reward_zero_std",),
    "gap": ("latent/replay_logp_gap_max",),
}


def held_out_names(metrics: dict[str, float]) -> list[str]:
    """verl's main validation metric, one a data source: no best-of-n, no spread."""
    return [name for name in metrics if name.startswith("val-core/") and "/mean@" in name]


def held_out(metrics: dict[str, float]) -> float | None:
    """Their mean over data sources, None without a validation."""
    values = [metrics[name] for name in held_out_names(metrics)]
    return sum(values) / len(values) if values else None


def short_line(report: Report, seconds: float | None = None) -> str:
    """One line a step.

    >>> metrics = {"critic/score/mean": 0.5, "latent/steps_mean": 1.0, "timing_s/step": 1.25}
    >>> short_line(Report("step", 3, 60, metrics))
    'step 3/60  reward 0.500  latent 1.0  1.2 s'
    """
    metrics = report.metrics
    position = f"step {report.step}/{report.total_steps}"
    if report.kind in ("alarm", "event"):
        return f"{position}  {'ALARM  ' if report.kind == 'alarm' else ''}{report.text}"
    if report.kind == "validation":
        value = held_out(metrics)
        return f"{position}  held-out {'none' if value is None else f'{value:.3f}'}"
    columns = [position]
    formats = {
        "reward": "{:.3f}",
        "kl": "{:.4f}",
        "entropy": "{:.3f}",
        "latent": "{:.1f}",
        "used": "{:+.2f}",
        "silent": "{:.2f}",
        "gap": "{:.1e}",
    }
    for name, keys in SHORT_NAMES.items():
        value = next((metrics[key] for key in keys if key in metrics), None)
        if value is not None and (value or name != "silent"):  # each group has a signal: no news
            columns.append(f"{name} {formats[name].format(value)}")
        if name == "reward" and held_out(metrics) is not None:
            columns.append(f"held-out {held_out(metrics):.3f}")
    seconds = metrics.get("timing_s/step", seconds)
    if seconds is not None:
        columns.append(f"{seconds:.1f} s")
    return "  ".join(columns)
