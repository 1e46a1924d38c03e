"""The table of docs/gpu.md: bytes a GPU of the paper-scale recipes on 1, 2 and 4 nodes of 8 GPUs.

    python benchmarks/sizing.py [--nodes 1 2 4] [--json out.json]

Each number is the total that a recipe's `validate.py trainer.nnodes=N` prints; nothing is computed
here. Five minutes of one core.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = ("lvr", "ilvr", "ivt_lr")
LINE = re.compile(
    r"^(?P<stage>\w+) of \w+_(?P<size>\dB), (?:weights=(?P<weights>\w+), )?.*total (?P<total>[\d.]+) GB",
    re.MULTILINE | re.IGNORECASE,
)


def totals(recipe: str, num_nodes: int) -> dict[str, float]:
    """GB a GPU by stage, model size and kind of weights, as the recipe's validation prints them."""
    command = [sys.executable, f"recipes/{recipe}/validate.py", f"trainer.nnodes={num_nodes}"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return {
        f"{line['stage']} {line['size'].upper()} {line['weights'] or 'all'}": float(line["total"])
        for line in LINE.finditer(done.stdout)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    found: dict[str, list[float]] = {}
    for recipe in RECIPES:
        for num_nodes in arguments.nodes:
            for name, total in totals(recipe, num_nodes).items():
                found.setdefault(name, []).append(total)
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{total:.0f}" for total in row) + " |")
    write_result(arguments.json, {"nodes": arguments.nodes, "gb_a_gpu": found})


if __name__ == "__main__":
    main()
