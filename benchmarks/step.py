"""Times the start of a run and its steps, in CPU-seconds of all its processes.

    python benchmarks/step.py [--checkouts ".,../other:../other/outputs/quickstart"] [--steps 12]
                              [--repeats 3] [--device cpu] [--json out.json] [hydra overrides]

Runs the quickstart's GRPO stage from its SFT checkpoint for a few steps, without validation and
saves. `--checkouts` are folders with a checkout of this repository each, which take turns, and
after a colon the outputs of a quickstart to start from (outputs/quickstart of the first one if
left out); ratios are to the last one.

    to step 1     seconds from the command to the line of step 1, and CPU-seconds of all processes
    a step        CPU-seconds of all processes and seconds, means over the steps after the second
    by phase      seconds of the trainer's timers, medians over these steps
    by process    CPU-seconds until step 1 and a step, of the last turn

CPU-seconds are sampled when a step's line is seen, so what a process used and ended in between
counts as it was last seen, at most a fifth of a second before its end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import psutil
from result_file import write_result

SAMPLED_EVERY_S = 0.2
RUN_LIMIT_S = 900
NAME_WIDTH = 34
STEP_LINE = re.compile(r"step (\d+)/\d+ ")


@dataclass
class Processes:
    """CPU-seconds of a command and all its descendants, those that ended included."""

    root: psutil.Process
    seconds: dict[int, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def sample(self) -> float:
        """Looks at all of them; CPU-seconds so far."""
        try:
            alive = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            alive = []
        for process in alive:
            try:
                times, command = process.cpu_times(), " ".join(process.cmdline())
            except psutil.Error:  # it ended meanwhile
                continue
            self.seconds[process.pid] = times.user + times.system
            # a worker of Ray is named after what it last ran, and IDLE before
            if command and "IDLE" not in command:
                self.names[process.pid] = command
        return sum(self.seconds.values())

    def by_name(self) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for pid, seconds in self.seconds.items():
            found[short_name(self.names.get(pid, "idle workers"))] += seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass
class Turn:
    """One run.

    Attributes:
        start_s, start_cpu_s: to the line of step 1.
        step_s, step_cpu_s: means over the steps after the second.
        phases: median seconds of the trainer's timers over these steps.
        processes: CPU-seconds to step 1 and a step, by process.
    """

    start_s: float
    start_cpu_s: float
    step_s: float
    step_cpu_s: float
    phases: dict[str, float]
    processes: dict[str, tuple[float, float]]


def short_name(command: str) -> str:
    """Names a process.

    >>> short_name("ray::LatentAgentLoopWorker.generate"), short_name("/x/bin/gcs_server --port=1")
    ('LatentAgentLoopWorker', 'gcs_server')
    """
    words = command.split()
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").partition(".")[0]
    modules = [word for word in words if "grpo_latent" in word or word.endswith(".py")]
    return Path(modules[0] if modules else words[0]).name


def overrides(args: argparse.Namespace, quickstart: Path, output: Path) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={quickstart}/sft/model",
        f"data.train_files={quickstart}/data/train_rl.parquet",
        f"data.val_files={quickstart}/data/dev.parquet",
        f"latent.output_dir={output}",
        f"trainer.total_training_steps={args.steps}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "latent.dump_every=0",
        f"device={args.device}",
        *args.overrides,
    ]


def run(checkout: Path, quickstart: Path, args: argparse.Namespace) -> Turn:
    """One turn of one checkout."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "grpo_latent.train"]
        command += ["--config-dir", "recipes/quickstart", "--config-name", "digits_grpo"]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        environment["PYTHONPATH"] = str(checkout)
        started = time.monotonic()
        child = subprocess.Popen(
            command + overrides(args, quickstart, output),
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(Path(folder) / "stderr").open("w"),
            text=True,
        )
        processes = Processes(psutil.Process(child.pid))
        seen = follow(child, processes, started)
        if child.wait() or args.steps not in seen:
            sys.exit(
                f"{checkout}: exit code {child.returncode}\n{(Path(folder) / 'stderr').read_text()}"
            )
        lines = [json.loads(line)["data"] for line in metrics_file(output).open()]
    (start_s, start_cpu_s, at_start), second, last = seen[1], seen[2], seen[args.steps]
    num_steps = args.steps - 2
    by_process = {
        name: (at_start.get(name, 0.0), (seconds - second[2].get(name, 0.0)) / num_steps)
        for name, seconds in last[2].items()
    }
    timers = {name for line in lines[2:] for name in line if name.startswith("timing_s/")}
    phases = {
        name.removeprefix("timing_s/"): statistics.median(
            line.get(name, 0.0) for line in lines[2:]
        )
        for name in sorted(timers)
    }
    return Turn(
        start_s,
        start_cpu_s,
        (last[0] - second[0]) / num_steps,
        (last[1] - second[1]) / num_steps,
        phases,
        by_process,
    )


def parse_checkouts(text: str) -> list[tuple[Path, Path]]:
    """Checkouts, and the quickstart that each starts from."""
    found: list[tuple[Path, Path]] = []
    for item in text.split(","):
        folder, _, outputs = item.partition(":")
        first = found[0][1] if found else Path(folder).resolve() / "outputs" / "quickstart"
        found.append((Path(folder).resolve(), Path(outputs).resolve() if outputs else first))
    return found


def metrics_file(output: Path) -> Path:
    return next(output.rglob("metrics.jsonl"))


def follow(
    child: subprocess.Popen, processes: Processes, started: float
) -> dict[int, tuple[float, float, dict[str, float]]]:
    """Seconds, CPU-seconds and these by process at each step's line."""
    seen: dict[int, tuple[float, float, dict[str, float]]] = {}
    lock, ended = threading.Lock(), threading.Event()

    def sample_often() -> None:
        while not ended.wait(SAMPLED_EVERY_S):
            with lock:
                processes.sample()

    sampler = threading.Thread(target=sample_often)
    sampler.start()
    limit = threading.Timer(RUN_LIMIT_S, child.kill)
    limit.start()
    assert child.stdout is not None
    for line in child.stdout:
        if found := STEP_LINE.search(line):
            with lock:
                cpu_s = processes.sample()
                seen[int(found[1])] = (time.monotonic() - started, cpu_s, processes.by_name())
    limit.cancel()
    ended.set()
    sampler.join()
    return seen


def medians(results: dict[str, list[Turn]]) -> dict[str, list[float]]:
    """Of the turns of each checkout, in their order."""
    columns = {
        "to step 1, s": attrgetter("start_s"),
        "to step 1, CPU-s": attrgetter("start_cpu_s"),
        "a step, s": attrgetter("step_s"),
        "a step, CPU-s": attrgetter("step_cpu_s"),
    }
    return {
        title: [statistics.median(map(of, turns)) for turns in results.values()]
        for title, of in columns.items()
    }


def table(results: dict[str, list[Turn]]) -> str:
    names = list(results)
    rows = [("", *names, *(f"{name} / {names[-1]}" for name in names[:-1]))]
    for title, values in medians(results).items():
        ratios = [f"{value / values[-1]:.2f}" for value in values[:-1]]
        rows.append((title, *(f"{value:.2f}" for value in values), *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    for name in names:
        last = results[name][-1]
        lines += ["", f"{name}: by phase, s"]
        lines += [
            f"  {phase:{NAME_WIDTH}} {seconds:.3f}" for phase, seconds in last.phases.items()
        ]
        lines += ["", f"{name}: by process, CPU-s to step 1 and a step"]
        lines += [
            f"  {process:{NAME_WIDTH}} {start:6.1f} {step:7.3f}"
            for process, (start, step) in last.processes.items()
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkouts", default=".")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    args = parser.parse_args(arguments)
    if args.steps < 3:
        parser.error("--steps: at least 3, since the first two are left out")
    sources = parse_checkouts(args.checkouts)
    results: dict[str, list[Turn]] = {checkout.name: [] for checkout, _ in sources}
    for _ in range(args.repeats):
        for checkout, quickstart in sources:
            turn = run(checkout, quickstart, args)
            results[checkout.name].append(turn)
            print(json.dumps({checkout.name: vars(turn)}), file=sys.stderr)
    print(table(results))
    found = {name: [vars(turn) for turn in turns] for name, turns in results.items()}
    ratios = {
        title: [value / values[-1] for value in values]
        for title, values in medians(results).items()
    }
    heads = {"checkouts": list(results), "medians": medians(results), "to_the_last": ratios}
    write_result(args.json, {**heads, "turns": found}, seed=0)  # latent.seed of grpo.yaml


if __name__ == "__main__":
    main()
