"""Kills each actor of a tiny run in each phase, and looks at how the run ends.

    python tests/deaths/grid.py                      the whole grid, some 40 minutes on two cores
    python tests/deaths/grid.py --actor reward       the cells whose actor has this in its name
    python tests/deaths/grid.py --phase weights      … whose phase is this

A cell is in order if the command ends within LIMIT_S of the kill, with exit code 2 and an
`ActorDeathError` that names the actor, its pid, its node, the last step and a log that exists, and
leaves no process and no shared memory behind.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "verl_plugin"), str(HERE.parents[1] / "benchmarks")]

import tiny_run  # noqa: E402
from result_file import write_result  # noqa: E402

LIMIT_S = 30.0  # from the kill to the end of the command
RUN_LIMIT_S = 300.0
LEFT_LIMIT_S = 10.0  # for processes that are told to end
ACTORS = (
    "trainer",
    "training worker",
    "rollout server",
    "reward worker",
    "agent loop worker",
    "TransferQueue controller",
    "TransferQueue storage",
    "progress board",
)
PHASES = ("start", "rollout", "reward", "update", "weights", "validation", "save")
# (actor, phase): all of them, and Ray's own processes once each
CELLS = [(actor, phase) for phase in PHASES for actor in ACTORS]
CELLS += [("Ray's raylet", "rollout"), ("Ray's gcs_server", "update")]
SETTINGS = (
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
    "latent.usage.num_prompts=0",
    "latent.preflight.num_prompts=0",
    "latent.dump_every=0",
)


@dataclass
class Cell:
    """What came of one cell.

    Attributes:
        seconds: from the kill to the end of the command; None if nothing was killed.
        message: the last line of its stderr.
        left: what it left behind, in words.
    """

    actor: str
    phase: str
    pid: int | None = None
    seconds: float | None = None
    exit_code: int | None = None
    message: str = ""
    left: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        if self.seconds is None:
            return [f"nothing was killed (exit code {self.exit_code}): {self.message}"]
        wanted = {
            "an ActorDeathError": self.message.startswith("ActorDeathError: "),
            "the actor": self.message.removeprefix("ActorDeathError: ").startswith(self.actor),
            "its pid": f"pid {self.pid}," in self.message,
            "its node": "node 127.0.0.1," in self.message,
            "the last step": bool(re.search(r"last step \d|before the first step", self.message)),
            "a log that exists": self._log_exists(),
            f"exit code 2 (but {self.exit_code})": self.exit_code == 2,
            f"an end within {LIMIT_S:.0f} s": self.seconds <= LIMIT_S,
        }
        return [f"not {what}" for what, holds in wanted.items() if not holds] + self.left

    def _log_exists(self) -> bool:
        log = re.search(r"Its log is (\S+)\. ", self.message)
        return log is not None and Path(log.group(1)).is_file()


def run_cell(actor: str, phase: str, inputs: Path, folder: Path) -> Cell:
    """One run, whose `actor` is killed in `phase`."""
    folder.mkdir(parents=True)
    mark, shared = folder / "mark.json", set(os.listdir("/dev/shm"))
    validates = f"trainer.val_before_train={str(phase == 'validation').lower()}"
    arguments = tiny_run.overrides(inputs, folder / "run", *SETTINGS, validates)
    env = tiny_run.clean_environment() | {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "VERL_USE_EXTERNAL_MODULES": "killer",
        "GRPO_LATENT_DEATH_CELL": f"{actor}|{phase}",
        "GRPO_LATENT_DEATH_MARK": str(mark),
    }
    cell = Cell(actor, phase)
    command = [sys.executable, "-m", "grpo_latent.train", *arguments]
    try:
        done = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, text=True, timeout=RUN_LIMIT_S
        )
        cell.exit_code = done.returncode
        said = done.stderr.strip() or done.stdout.strip()  # an error is in the former
        cell.message = (said.splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        cell.message = f"the command still ran after {RUN_LIMIT_S:.0f} s"
    ended = time.time()
    if mark.exists() and (killed := mark.read_text()):
        cell.pid = json.loads(killed)["pid"]
        cell.seconds = ended - json.loads(killed)["time"]
    cell.left = left_behind(str(mark), shared)
    return cell


def left_behind(mark: str, shared_before: set[str]) -> list[str]:
    """Processes of the run that are still there after `LEFT_LIMIT_S`, and shared memory of none.

    A port is open only as long as a process has it.
    """
    deadline = time.monotonic() + LEFT_LIMIT_S
    while (processes := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    new = set(os.listdir("/dev/shm")) - shared_before
    orphans = [name for name in new if not _is_mapped(name)]
    return [f"process left: {command}" for command in processes] + [
        f"shared memory left: {name}" for name in orphans
    ]


def _processes(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return [command for command in found if command]  # without zombies


def _is_mapped(name: str) -> bool:
    """Whether a living process has this shared memory, as one of another run may.

    joblib's semaphores name who made them; they are mapped under a name that they had before.
    """
    made_by = re.match(r"sem\.loky-(\d+)-", name)
    if made_by:
        return Path("/proc", made_by[1]).exists()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}" in maps.read_text():
                return True
        except OSError:
            continue
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actor", default="")
    parser.add_argument("--phase", default="")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    cells = [(a, p) for a, p in CELLS if asked.actor in a and asked.phase in p]
    bad = 0
    taken: list[float] = []
    with tempfile.TemporaryDirectory(prefix="deaths_") as root:
        inputs = tiny_run.write_inputs(Path(root))
        for number, (actor, phase) in enumerate(cells):
            cell = run_cell(actor, phase, inputs, Path(root) / f"cell{number}")
            problems = cell.problems()
            bad += bool(problems)
            taken += [] if cell.seconds is None else [cell.seconds]
            seconds = "none" if cell.seconds is None else f"{cell.seconds:4.1f} s"
            verdict = "; ".join(problems) or "ok"
            print(f"{actor:36} {phase:11} {seconds:>7}  {verdict}", flush=True)
            if problems:
                print(f"    {cell.message}", flush=True)
    print(f"{len(cells) - bad}/{len(cells)} cells ended in time and typed")
    times = {"least_s": min(taken, default=None), "most_s": max(taken, default=None)}
    write_result(asked.json, {"cells": len(cells), "ended": len(cells) - bad, **times})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
