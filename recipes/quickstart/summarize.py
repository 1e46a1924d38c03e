"""Writes summary.json and learning_curve.png of a quickstart run, and prints the summary.

python recipes/quickstart/summarize.py outputs/quickstart --seed 0 --grpo-seconds 90 --seconds-total 300
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

ACCURACY, REWARD = "val-core/digits/acc/mean@1", "critic/score/mean"
GAP, PROBS_DIFF = "latent/replay_logp_gap_max", "training/rollout_probs_diff_max"
PACKAGES = ("grpo_latent", "torch", "transformers", "verl", "ray", "TransferQueue", "tensordict", "numpy")


def read_metrics(path: Path) -> list[dict]:
    """One dict a step; a step that was logged twice, before and after a resume, counts once, the later one."""
    steps: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        steps.setdefault(entry["step"], {}).update(entry["data"])
    return [{"step": step, **data} for step, data in sorted(steps.items())]


def series(metrics: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def summarize(out: Path, seed: int, grpo_seconds: float, seconds_total: float) -> dict:
    metrics = read_metrics(out / "grpo" / "metrics.jsonl")
    sft = json.loads((out / "evaluation_sft.json").read_text())
    grpo = json.loads((out / "evaluation_grpo.json").read_text())
    config = OmegaConf.load(out / "grpo" / "config.yaml")
    return {
        "sft": {"heldout_accuracy": sft["greedy"]["accuracy"], "ablations": sft["ablations"]},
        "grpo": {
            "heldout_accuracy": grpo["greedy"]["accuracy"],
            "sampled_accuracy": grpo["sampled"]["accuracy"],
            "steps": metrics[-1]["step"],
            "seconds": grpo_seconds,
        },
        "ablations": grpo["ablations"],
        "follow": grpo["follow"],
        "hit": grpo["hit"],
        "leak": grpo["leak"],
        "replay_logp_gap_max": max(series(metrics, GAP)[1]),
        "rollout_probs_diff_max": max(series(metrics, PROBS_DIFF)[1]),
        "seed": seed,
        "rollout_engine": config.actor_rollout_ref.rollout.name.split("_")[0],
        "seconds_total": seconds_total,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def plot(out: Path, summary: dict) -> Path:
    metrics = read_metrics(out / "grpo" / "metrics.jsonl")
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[2, 1])
    curve.plot(*series(metrics, ACCURACY), marker="o", label="held-out accuracy, greedy (dev)")
    curve.plot(*series(metrics, REWARD), alpha=0.6, label="reward of the rollouts")
    curve.set(xlabel="step", ylim=(0, 1.12), title=f"latent GRPO, seed {summary['seed']}")
    curve.legend(frameon=False, fontsize=8)
    names, values = zip(*summary["ablations"].items(), strict=True)
    bars.bar(names, values, color=["tab:green"] + ["tab:gray"] * (len(names) - 1))
    bars.axhline(0.1, linestyle=":", color="black", linewidth=1)
    bars.set(ylim=(0, 1.12), title="held-out accuracy by latents fed")
    bars.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    path = out / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--grpo-seconds", type=float, required=True)
    parser.add_argument("--seconds-total", type=float, required=True)
    args = parser.parse_args()
    summary = summarize(args.out, args.seed, args.grpo_seconds, args.seconds_total)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = Table(title=f"quickstart, seed {args.seed}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("held-out accuracy after SFT", f"{summary['sft']['heldout_accuracy']:.3f}")
    table.add_row("held-out accuracy after GRPO", f"{summary['grpo']['heldout_accuracy']:.3f}")
    for name, value in summary["ablations"].items():
        table.add_row(f"  latents: {name}", f"{value:.3f}")
    table.add_row("largest replay log-prob gap (nats)", f"{summary['replay_logp_gap_max']:.1e}")
    table.add_row("leak (nats)", f"{summary['leak']:g}")
    table.add_row("seconds", f"{args.seconds_total:.0f}")
    Console().print(table)
    print(f"{args.out / 'summary.json'}\n{plot(args.out, summary)}")


if __name__ == "__main__":
    main()
