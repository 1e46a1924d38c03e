"""Writes summary.json and learning_curve.png of a recipe's run, and prints the summary.

python recipes/summarize.py outputs/quickstart --seed 0 --grpo-seconds 90 --seconds-total 300
python recipes/summarize.py outputs/ilvr --name ilvr --stages stage1 stage2 --seed 0 --grpo-seconds
90 --seconds-total 300

It reads evaluation_<stage>.json of each SFT stage, evaluation_grpo.json, evaluation_best.json where
the best checkpoint is not the last one, and the folder grpo/.
With one stage `sft` is one entry, with several a list of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from grpo_latent.common.best_checkpoint import read_best
from grpo_latent.common.provenance import provenance_line, read_provenance, versions
from grpo_latent.common.step_folders import read_tracker

ACCURACY = ("val-core/", "/acc/mean@1")  # verl puts the data source between the two
REWARD = "critic/score/mean"
GAP = "latent/replay_logp_gap_max"
PROBS_DIFF = "training/rollout_probs_diff_max"


def read_metrics(path: Path) -> list[dict]:
    """One dict a step; of a step that was logged twice, around a resume, the later one."""
    steps: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        steps.setdefault(entry["step"], {}).update(entry["data"])
    return [{"step": step, **data} for step, data in sorted(steps.items())]


def series(metrics: list[dict], key: str | tuple[str, str]) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric.

    Args:
        key: its name, or how it begins and ends.
    """
    if isinstance(key, tuple):
        begin, end = key
        names = {
            name
            for entry in metrics
            for name in entry
            if name.startswith(begin) and name.endswith(end)
        }
        (key,) = names or {""}
    points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def sft_entry(out: Path, stage: str) -> dict:
    report = json.loads((out / f"evaluation_{stage}.json").read_text())
    return {"heldout_accuracy": report["greedy"]["accuracy"], "ablations": report["ablations"]}


def best_entry(out: Path, last_accuracy: float) -> dict | None:
    """The checkpoint of the best validation; None where training has named none."""
    root = out / "grpo" / "checkpoints"
    best = read_best(root)
    if best is None:
        return None
    if best.step == read_tracker(root):
        accuracy = last_accuracy
    else:
        report = json.loads((out / "evaluation_best.json").read_text())
        accuracy = report["greedy"]["accuracy"]
    return {"step": best.step, "dev_score": best.score, "heldout_accuracy": accuracy}


def provenance_of(out: Path) -> dict | None:
    """Says where the RL stage ran last; None for a run of before that was recorded."""
    return next(reversed(read_provenance(out / "grpo")), None)


def summarize(
    out: Path,
    seed: int,
    grpo_seconds: float,
    seconds_total: float,
    stages: Sequence[str] = ("sft",),
    controls: Sequence[str] = (),
) -> dict:
    metrics = read_metrics(out / "grpo" / "metrics.jsonl")
    entries = [sft_entry(out, stage) for stage in stages]
    named = [{"stage": stage, **entry} for stage, entry in zip(stages, entries, strict=True)]
    grpo = json.loads((out / "evaluation_grpo.json").read_text())
    config = OmegaConf.load(out / "grpo" / "config.yaml")
    return {
        "sft": entries[0] if len(stages) == 1 else named,
        "grpo": {
            "heldout_accuracy": grpo["greedy"]["accuracy"],
            "sampled_accuracy": grpo["sampled"]["accuracy"],
            "steps": metrics[-1]["step"],
            "silent_steps": metrics[-1].get("actor/silent_steps"),
            "seconds": grpo_seconds,
        },
        "best": best_entry(out, grpo["greedy"]["accuracy"]),
        **(
            {"controls": {name: sft_entry(out, name)["heldout_accuracy"] for name in controls}}
            if controls
            else {}
        ),
        "ablations": grpo["ablations"],
        "chance": grpo["chance"],
        "latents": grpo["verdict"]["sentence"],
        "follow": grpo["follow"],
        "hit": grpo["hit"],
        "leak": grpo.get("leak"),
        "replay_logp_gap_max": max(series(metrics, GAP)[1]),
        "rollout_probs_diff_max": max(series(metrics, PROBS_DIFF)[1]),
        "seed": seed,
        "rollout_engine": config.actor_rollout_ref.rollout.name.split("_")[0],
        "seconds_total": seconds_total,
        "versions": versions(),
        "provenance": provenance_of(out),
    }


def plot(out: Path, summary: dict) -> Path:
    metrics = read_metrics(out / "grpo" / "metrics.jsonl")
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[2, 1])
    curve.plot(*series(metrics, ACCURACY), marker="o", label="held-out accuracy, greedy (dev)")
    curve.plot(*series(metrics, REWARD), alpha=0.6, label="reward of the rollouts")
    curve.set(xlabel="step", ylim=(0, 1.12), title=f"GRPO, seed {summary['seed']}")
    curve.legend(frameon=False, fontsize=8)
    known = {name: value for name, value in summary["ablations"].items() if value is not None}
    names, values = zip(*known.items(), strict=True)
    bars.bar(names, values, color=["tab:green"] + ["tab:gray"] * (len(names) - 1))
    bars.axhline(summary["chance"], linestyle=":", color="black", linewidth=1)
    bars.set(ylim=(0, 1.12), title="held-out accuracy by latents fed")
    bars.tick_params(axis="x", rotation=60, labelsize=8)
    figure.tight_layout()
    path = out / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="quickstart", help="of the recipe, for titles")
    parser.add_argument("--stages", nargs="+", default=["sft"], help="SFT stages, in order")
    parser.add_argument(
        "--controls", nargs="*", default=[], help="evaluations of SFT without latents"
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--grpo-seconds", type=float, required=True)
    parser.add_argument("--seconds-total", type=float, required=True)
    args = parser.parse_args()
    summary = summarize(
        args.out, args.seed, args.grpo_seconds, args.seconds_total, args.stages, args.controls
    )
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = Table(title=f"{args.name}, seed {args.seed}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for stage in args.stages:
        label = "SFT" if len(args.stages) == 1 else stage
        table.add_row(
            f"held-out accuracy after {label}",
            f"{sft_entry(args.out, stage)['heldout_accuracy']:.3f}",
        )
    for name, accuracy in summary.get("controls", {}).items():
        table.add_row(f"control: {name}", f"{accuracy:.3f}")
    table.add_row("held-out accuracy after GRPO", f"{summary['grpo']['heldout_accuracy']:.3f}")
    best = summary["best"]
    if best is not None:
        where = f"best validation, step {best['step']}"
        table.add_row(f"  of the {where}", f"{best['heldout_accuracy']:.3f}")
    if summary["grpo"]["silent_steps"]:
        table.add_row("steps without signal", f"{summary['grpo']['silent_steps']:.0f}")
    for name, value in summary["ablations"].items():
        table.add_row(f"  latents: {name}", "-" if value is None else f"{value:.3f}")
    table.add_row("  the latents are", summary["latents"].split(":")[0])
    table.add_row("largest replay log-prob gap (nats)", f"{summary['replay_logp_gap_max']:.1e}")
    if summary["leak"] is not None:
        table.add_row("leak (nats)", f"{summary['leak']:g}")
    table.add_row("seconds", f"{args.seconds_total:.0f}")
    Console().print(table)
    print(f"machine: {provenance_line(summary['provenance'])}")
    print(f"{args.out / 'summary.json'}\n{plot(args.out, summary)}")


if __name__ == "__main__":
    main()
