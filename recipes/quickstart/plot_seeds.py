"""Draws README's picture: learning curves of several quickstart runs, and of their controls.

python recipes/quickstart/plot_seeds.py expected.png outputs/seed0 outputs/seed1 outputs/seed2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from summarize import ACCURACY, read_metrics, series


def main(picture: str, folders: list[str]) -> None:
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[2, 1])
    for out in map(Path, folders):
        summary = json.loads((out / "summary.json").read_text())
        points = series(read_metrics(out / "grpo" / "metrics.jsonl"), ACCURACY)
        (line,) = curves.plot(
            *points, marker="o", markersize=3, label=f"latent GRPO, seed {summary['seed']}"
        )
        names, values = zip(*summary["ablations"].items(), strict=True)
        bars.plot(names, values, "o", alpha=0.7, color=line.get_color())
        controls = {
            "random reward": "control_random/grpo",
            "text only, same labels": "control_text/direct/grpo",
        }
        for name, folder in controls.items():
            metrics = out / folder / "metrics.jsonl"
            if metrics.is_file():
                curves.plot(
                    *series(read_metrics(metrics), ACCURACY),
                    linestyle="--",
                    label=f"control: {name}",
                )
    curves.set(xlabel="step", ylim=(0, 1), title="held-out accuracy, greedy (dev questions)")
    curves.legend(frameon=False, fontsize=7)
    bars.axhline(0.1, linestyle=":", color="black", linewidth=1)
    bars.set(ylim=(0, 1), title="after GRPO, by latents fed")
    bars.tick_params(axis="x", rotation=60, labelsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
