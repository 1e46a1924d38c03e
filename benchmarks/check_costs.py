"""What the manifest, and the checks of rows and rewards before a start, cost of a run.

    python benchmarks/check_costs.py [--quickstart outputs/quickstart] [--steps 60] [--repeats 3]
                                     [--json out.json]

Runs the quickstart's GRPO stage, saved three times, from this checkout and from a copy of it in which
rows and rewards are not looked at and no file's digest is made or compared, in turns. Verdicts on
rows that an earlier run has kept are not read. Prints medians of seconds and CPU-seconds of the
whole command, and what the checks are of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from result_file import write_result  # noqa: E402
from step import SAMPLED_EVERY_S, Processes  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
# appended to modules of the copy
LEFT_OUT = {
    "common/manifest.py": """
def digest(path):
    return Entry(Path(path).stat().st_size, "")
def check_files(*args, **kwargs):
    pass
def check_folder(*args, **kwargs):
    return []
""",
    "verl_plugin/trainer/data_check.py": """
def check_data(*args, **kwargs):
    return []
""",
    "verl_plugin/rewards/start_check.py": """
def check_rewards(*args, **kwargs):
    return []
""",
}


def without_checks(folder: Path) -> Path:
    """A copy of what a run needs of this checkout, its checks left out."""
    for name in ("grpo_latent", "recipes", "reward"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name, text in LEFT_OUT.items():
        path = folder / "grpo_latent" / name
        path.write_text(path.read_text() + text)
    return folder


def run(checkout: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and CPU-seconds of a whole command."""
    quickstart = args.quickstart.resolve()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpo_latent.train"]
        command += ["--config-dir", "recipes/quickstart", "--config-name", "digits_grpo"]
        command += [
            f"actor_rollout_ref.model.path={quickstart}/sft/model",
            f"data.train_files={quickstart}/data/train_rl.parquet",
            f"data.val_files={quickstart}/data/dev.parquet",
            f"latent.output_dir={folder}/run",
            f"trainer.total_training_steps={args.steps}",
            f"trainer.save_freq={max(1, args.steps // 3)}",
        ]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        environment |= {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": f"{folder}/cache"}
        log = Path(folder) / "log"
        started, ended = time.monotonic(), threading.Event()
        with log.open("w") as file:
            child = subprocess.Popen(
                command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        processes = Processes(psutil.Process(child.pid))

        def sample_often() -> None:
            while not ended.wait(SAMPLED_EVERY_S):
                processes.sample()

        sampler = threading.Thread(target=sample_often)
        sampler.start()
        code = child.wait()
        seconds = time.monotonic() - started
        ended.set()
        sampler.join()
        if code:
            sys.exit(f"{checkout}: exit code {code}\n{log.read_text()[-4000:]}")
        return seconds, sum(processes.seconds.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=REPOSITORY / "outputs/quickstart")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    turns: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"with": REPOSITORY, "without": without_checks(Path(folder))}
        for _ in range(args.repeats):
            for name, checkout in checkouts.items():
                turns[name].append(run(checkout, args))
                print(f"{name}: {turns[name][-1][0]:.1f} s, {turns[name][-1][1]:.1f} CPU-s")
    found: dict[str, dict[str, float]] = {}
    for index, unit in enumerate(("s", "CPU-s")):
        medians = [statistics.median(turn[index] for turn in turns[name]) for name in turns]
        share = medians[0] / medians[1] - 1
        found[unit] = {"with": medians[0], "without": medians[1], "percent": 100 * share}
        print(f"with {medians[0]:.1f} {unit}, without {medians[1]:.1f} {unit}: {share:+.1%}")
    write_result(args.json, {"medians": found, "turns": turns}, seed=0)  # latent.seed of grpo.yaml


if __name__ == "__main__":
    main()
