"""Measures the inspector's page for 2,000 trajectories: its size, and how fast Chromium opens it.

    python benchmarks/inspect_page.py outputs/<run> [--trajectories 2000] [--repeats 5]
                                      [--json out.json]

The run's rollout dumps are repeated under new step numbers until there are enough trajectories;
checkpoint, data and metrics are the run's. "Open" is from navigation to a table that can be used
(`document.body.dataset.ready`): median and largest of the repeats, each in a tab of its own. Needs
Chromium with its driver, and `pip install -e ".[inspect]" selenium`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headless import headless, open_page
from result_file import write_result
from safetensors.torch import load_file

from grpo_latent.eval.dumps import dump_files, write_step


def repeat_dumps(run: Path, target: Path, num_trajectories: int) -> int:
    """Links the run's files into `target`, its dumps repeated; returns the trajectories in all."""
    target.mkdir()
    for entry in run.resolve().iterdir():
        if entry.name not in ("rollouts", "report.html"):
            (target / entry.name).symlink_to(entry)
    (target / "rollouts").mkdir()
    steps = dump_files(run / "rollouts")
    if not steps:
        sys.exit(f"{run} has no rollout dumps: train with latent.dump_every=<steps>")
    total = 0
    step = 0
    while total < num_trajectories:
        source = steps[step % len(steps)]
        step += 1
        records = [json.loads(line) | {"step": step} for line in source.read_text().splitlines()]
        tensors = load_file(source.with_suffix(".safetensors"))
        write_step(target / "rollouts", step, records, tensors)
        total += len(records)
    return total


def time_opening(page: Path, repeats: int) -> list[float]:
    """Seconds of each opening."""
    seconds = []
    with headless() as driver:
        for _ in range(repeats):
            driver.switch_to.new_window("tab")
            start = time.perf_counter()
            open_page(driver, page)
            seconds.append(time.perf_counter() - start)
            driver.close()
            driver.switch_to.window(driver.window_handles[0])
    return seconds


def main() -> None:
    """Makes the page of a run, opens it a few times, and prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / options.run.resolve().name
        page = Path(folder) / "report.html"
        num_dumped = repeat_dumps(options.run, run, options.trajectories)
        start = time.perf_counter()
        command = [sys.executable, "-m", "grpo_latent.inspect", run, "--out", page]
        made = subprocess.run(
            [*command, "--trajectories", str(num_dumped)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if "Error: " in made.stderr:  # the page is made without what cannot be read
            sys.exit(made.stderr)
        made_s = time.perf_counter() - start
        opened_s = time_opening(page, options.repeats)
        result = {
            "trajectories": num_dumped,
            "page_megabytes": round(page.stat().st_size / 1e6, 2),
            "made_s": round(made_s, 2),
            "open_median_s": round(statistics.median(opened_s), 3),
            "open_max_s": round(max(opened_s), 3),
        }
    print(json.dumps(result, indent=2))
    write_result(options.json, result)


if __name__ == "__main__":
    main()
