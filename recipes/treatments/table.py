"""Writes summary.json of the treatments, one row each, and prints the table.

python recipes/treatments/table.py outputs/treatments --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_latent.common.provenance import provenance_line

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
from summarize import provenance_of, read_metrics, series  # noqa: E402

ORDER = (
    "mask",
    "recompute_cut",
    "recompute_one_hop",
    "recompute_bptt",
    "gaussian",
    "gumbel_soft",
    "mask_anchor",
)
GAPS = {
    "replay_logp_gap_max": "latent/replay_logp_gap_max",
    "replay_density_gap_max": "latent/replay_density_gap_max",
}
LAST = (
    "critic/score/mean",
    "latent/log_density",
    "latent/ratio_mean",
    "latent/anchor",
    "actor/grad_norm",
)
ABLATIONS = ("own", "shuffle", "oracle")


def read_row(folder: Path) -> dict:
    """One finished run: the largest gaps of all steps, and `last`, what the last step logged."""
    run = json.loads((folder / "run.json").read_text())
    before, after = (
        json.loads((folder / f"evaluation_{name}.json").read_text()) for name in ("sft", "grpo")
    )
    metrics = read_metrics(folder / "grpo" / "metrics.jsonl")
    last = metrics[-1]
    gaps = {name: series(metrics, key)[1] for name, key in GAPS.items()}
    return {
        "treatment": run["treatment"],
        "overrides": run["overrides"],
        "sft": {"heldout_accuracy": before["greedy"]["accuracy"]},
        "grpo": {
            "heldout_accuracy": after["greedy"]["accuracy"],
            "sampled_accuracy": after["sampled"]["accuracy"],
            "steps": last["step"],
            "seconds": run["seconds"],
        },
        "ablations": after["ablations"],
        "hit": after["hit"],
        **{name: max(values) for name, values in gaps.items() if values},
        "provenance": provenance_of(folder),
        "last": {key: last[key] for key in LAST if key in last},
    }


def summarize(out: Path, seed: int) -> dict:
    """Finished runs in the table's order, and the names of those that did not finish."""
    folders = [folder for folder in sorted(out.iterdir()) if folder.name in ORDER]
    folders.sort(key=lambda folder: ORDER.index(folder.name))
    finished = [folder for folder in folders if (folder / "run.json").is_file()]
    for folder in finished:
        of_row = json.loads((folder / "run.json").read_text())["seed"]
        if of_row != seed:
            sys.exit(
                f"{folder} is a run of seed {of_row}, the table is of seed {seed}: "
                "take another OUT for each seed"
            )
    return {
        "seed": seed,
        "rows": [read_row(folder) for folder in finished],
        "unfinished": [folder.name for folder in folders if folder not in finished],
    }


def show(summary: dict) -> None:
    table = Table(title=f"treatments of latents, seed {summary['seed']}")
    for column in ("treatment", "SFT", "GRPO", "sampled", *ABLATIONS, "hit", "steps", "s"):
        table.add_column(
            column, justify="left" if column == "treatment" else "right", no_wrap=True
        )
    number = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    for row in summary["rows"]:
        grpo = row["grpo"]
        accuracies = (
            row["sft"]["heldout_accuracy"],
            grpo["heldout_accuracy"],
            grpo["sampled_accuracy"],
        )
        ablations = [row["ablations"].get(name) for name in ABLATIONS]
        cells = [number(value) for value in (*accuracies, *ablations, row["hit"])]
        table.add_row(row["treatment"], *cells, str(grpo["steps"]), f"{grpo['seconds']:.0f}")
    for name in summary["unfinished"]:
        table.add_row(name, *["failed"] * 2, *[""] * 7)
    Console(width=100).print(table)
    for machine in dict.fromkeys(provenance_line(row["provenance"]) for row in summary["rows"]):
        print(f"machine: {machine}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    summary = summarize(args.out, args.seed)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(summary)
    print(args.out / "summary.json")


if __name__ == "__main__":
    main()
