"""The shell functions that run.sh scripts share, without the stages that they start."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, folder: Path, **env) -> subprocess.CompletedProcess:
    lines = f"set -euo pipefail\nsource recipes/common.sh\n{script}"
    # the scripts call `python`, which `make` puts in front for recipes and not for tests
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OUT": str(folder), "SEED": "0", **env}
    return subprocess.run(
        ["bash", "-c", lines], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_that_fails_takes_down_what_runs_beside_it(tmp_path):
    """A grandchild goes down too, which killing a background function by its id would miss.

    That id is the subshell's.
    """
    script = (
        'run() { sleep 600 & echo $! > "$OUT/pid"; wait; }\n'
        'beside "$OUT/log" run\nuntil [ -s "$OUT/pid" ]; do sleep 0.1; done\nexit 3'
    )
    assert bash(script, tmp_path).returncode == 3
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlives the script"
        time.sleep(0.05)


def test_what_ran_beside_and_failed_ends_the_script_with_its_log(tmp_path):
    done = bash(
        'run() { echo lost; false; echo never; }\nbeside "$OUT/log" run\njoin\necho on', tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "lost\n")
    done = bash('beside "$OUT/log" echo fine\njoin\necho on', tmp_path)
    assert (done.returncode, done.stdout) == (0, "on\n") and (
        tmp_path / "log"
    ).read_text() == "fine\n"


def test_the_last_checkpoint_is_the_trackers(tmp_path):
    (tmp_path / "checkpoints" / "global_step_12").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("12")
    done = bash('last_checkpoint "$OUT"', tmp_path)
    assert done.stdout == f"{tmp_path}/checkpoints/global_step_12/actor/huggingface\n"


@pytest.mark.parametrize("tracker", ["", "12_best", "13", None])
def test_a_run_without_a_last_checkpoint_ends_the_script(tmp_path, tracker):
    for name in ("12", "12_best"):
        (tmp_path / "checkpoints" / f"global_step_{name}").mkdir(parents=True)
    if tracker is not None:
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(tracker)
    done = bash('CHECKPOINT=$(last_checkpoint "$OUT")\necho on', tmp_path)
    assert (done.returncode, done.stdout) == (
        1,
        "",
    ) and "latest_checkpointed_iteration.txt" in done.stderr


def write_checkpoints(root: Path, last: int, best: int | None, start: Path | None = None) -> Path:
    """Folders of both, the tracker and the file that names the best one."""
    for step in {last, best or last}:
        (root / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface").mkdir(
            parents=True
        )
    (root / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(last))
    if best is not None:
        folder = f"global_step_{best}" if best else str(start)
        values = {"step": best, "score": 0.5, "metric": "m", "folder": folder}
        (root / "checkpoints" / "best_checkpoint.json").write_text(json.dumps(values))
    return root


def evaluated(folder: Path) -> list[str]:
    """What `evaluate_rl` evaluates below `folder`, as step, name and number of overrides."""
    script = 'evaluate() { echo "$2 $3 $(($# - 3))"; }\nevaluate_rl digits_evaluate a=1 b=2'
    done = bash(script, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(f"{folder}/grpo/checkpoints/global_step_", "").splitlines()


def test_the_best_checkpoint_is_evaluated_where_it_is_another_one(tmp_path):
    write_checkpoints(tmp_path / "a" / "grpo", last=60, best=40)
    expected = ["60/actor/huggingface grpo 2", "40/actor/huggingface best 5"]
    assert evaluated(tmp_path / "a") == expected
    write_checkpoints(tmp_path / "b" / "grpo", last=60, best=60)
    write_checkpoints(tmp_path / "c" / "grpo", last=60, best=None)
    assert evaluated(tmp_path / "b") == evaluated(tmp_path / "c") == expected[:1]
    write_checkpoints(tmp_path / "d" / "grpo", last=60, best=0, start=tmp_path / "sft")
    assert evaluated(tmp_path / "d") == [expected[0], f"{tmp_path}/sft best 5"]


def test_a_best_checkpoint_that_cannot_be_read_ends_the_script(tmp_path):
    root = write_checkpoints(tmp_path / "grpo", last=60, best=40)
    (root / "checkpoints" / "best_checkpoint.json").write_text("{")
    done = bash("evaluate() { true; }\nevaluate_rl digits_evaluate\necho on", tmp_path)
    assert done.returncode != 0 and "on" not in done.stdout.splitlines()
    assert "best_checkpoint.json" in done.stderr
