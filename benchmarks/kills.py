"""`python benchmarks/kills.py`: SIGKILL of the trainer at every point of a run, continuation compared.

One run is left alone. Another one is killed at a point, started again, killed at the next one, …,
a few steps apart, so that each continuation commits steps before the next kill. After each, all
that the tracker vouches for is compared with the run that was left alone: weights, optimizer,
schedule and generators of all ranks, data position, the guards' state, metrics, rollouts; at the
end also the best checkpoint and what lies about. Prints one line a kill and the figure.

    python benchmarks/kills.py [--points 6 --seed 3] [--folder outputs/kills]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import config_check  # noqa: E402
from result_file import write_result  # noqa: E402

from grpo_latent.common.best_checkpoint import BEST_FILE  # noqa: E402
from grpo_latent.common.pickles import without_code  # noqa: E402
from grpo_latent.common.step_folders import read_tracker  # noqa: E402

TEST_EVERY = 2
# in the order of a step; those of a start come first, where nothing is committed yet
START = (
    "init_before load_before load_after init_after rewind_before rewind_after validate_before "
    "usage_after validate_after train_begin_after"
).split()
STEP = (
    "sample_before sample_after old_log_prob_before old_log_prob_after ref_log_prob_after "
    "advantage_after update_before update_after save_before file_model file_optimizer file_extra "
    "file_config file_hf_config file_hf_weights file_hf_tokenizer file_hf_latents "
    "file_hf_manifest file_data save_after send_weights_before send_weights_after "
    "validate_before usage_before validate_after metrics_before dump_before file_dump dump_after "
    "judge_after metrics_after log_before commit_before sync_after guards_after manifest_before "
    "manifest_after tracker_before tracker_after name_best_after prune_before prune_after "
    "log_after"
).split()
END = ("shutdown_before", "fit_after")
RUN_TIMEOUT_S = 600
UNSTABLE = ("timing", "perf/", "actor/perf")


@dataclass
class Kill:
    """One kill: the point, the step, and what was found after it."""

    point: str
    step: int | None
    differences: list[str] = field(default_factory=list)
    is_verified: bool = False  # the continuation has committed a step, or ended


def plan(points: Sequence[str]) -> tuple[list[Kill], int]:
    """Kills by point with their steps, and the number of steps that this takes."""
    kills, step = [], 0
    for point in points:
        if point in END:
            kills.append(Kill(point, None))
        elif step == 0 and point in START:
            kills.append(Kill(point, None))
        else:
            step += 2  # the step before is committed by the continuation of the last kill
            kills.append(Kill(point, step))
    return kills, step + 2


def overrides(inputs: Path, output: Path, num_steps: int) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={inputs}/model",
        f"data.train_files={inputs}/train.parquet",
        f"data.val_files={inputs}/val.parquet",
        f"reward.custom_reward_function.path={inputs}/reward.py",
        f"latent.output_dir={output}",
        "latent.dump_every=1",
        "latent.preflight.num_prompts=0",
        "latent.usage.num_prompts=2",
        "data.train_batch_size=2",
        "data.val_max_samples=4",
        "data.max_prompt_length=64",
        "data.max_response_length=10",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.shuffle=true",
        f"trainer.total_training_steps={num_steps}",
        "trainer.total_epochs=1000",
        "trainer.save_freq=1",
        f"trainer.test_freq={TEST_EVERY}",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.checkpoint_callback_class=kill_points.KillPoints",
    ]


def run(inputs: Path, output: Path, num_steps: int, **environment: str) -> int:
    """One start of `grpo_latent.train`; its exit code."""
    own = Path(__file__).resolve()
    path = os.pathsep.join(
        [str(own.parent), str(own.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    output.mkdir(parents=True, exist_ok=True)
    with (output / "console.log").open("a") as log:
        command = [sys.executable, "-m", "grpo_latent.train"]
        done = subprocess.run(
            command + overrides(inputs, output, num_steps),
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=log,
            stderr=log,
            timeout=RUN_TIMEOUT_S,
        )
    return done.returncode


def write_inputs(folder: Path) -> None:
    config_check.write_inputs(folder)
    shutil.rmtree(folder / "run")
    shutil.copy(Path(__file__).parent / "tiny_reward.py", folder / "reward.py")


# ---- comparison ---------------------------------------------------------------------------------


def states(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds, by file."""
    found: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".pt":
            with without_code():
                found[name] = torch.load(path, weights_only=False)
        elif path.is_file() and path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Places where two nested structures differ, tensors and arrays to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))[:5]}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield f"{where}: length"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        x, y = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
        if not torch.equal(x, y):
            yield where
    elif isinstance(a, np.ndarray):
        if not np.array_equal(a, b):
            yield where
    elif a != b:
        yield f"{where}: {str(a)[:60]} != {str(b)[:60]}"


def metrics(output: Path, last: int) -> list[tuple[int, dict]]:
    """Lines of steps up to `last` as they stand in the file, without times and memory."""
    lines = []
    for text in (output / "metrics.jsonl").read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that a kill cut
            continue
        if line["step"] <= last:
            data = {k: v for k, v in line["data"].items() if not k.startswith(UNSTABLE)}
            lines.append((line["step"], data))
    return lines


def compare(alone: Path, archive: Path, killed: Path, is_end: bool) -> tuple[int, list[str]]:
    """The tracker's step of the killed run, and where it differs from the one left alone."""
    step = read_tracker(killed / "checkpoints") or 0
    found: list[str] = []
    if step:
        folder = killed / "checkpoints" / f"global_step_{step}"
        found += differences(states(archive / str(step)), states(folder), f"step {step}")
        found += differences(metrics(alone, step), metrics(killed, step), "metrics.jsonl")
    for number in range(1, step + 1):
        for suffix in ("jsonl", "safetensors"):
            name = f"rollouts/step_{number}.{suffix}"
            if (alone / name).read_bytes() != (killed / name).read_bytes():
                found.append(name)
    if is_end:
        best = f"checkpoints/{BEST_FILE}"
        if (alone / best).read_bytes() != (killed / best).read_bytes():
            found.append(best)
        found += differences(listing(alone), listing(killed), "files")
    return step, found


def listing(output: Path) -> list[str]:
    paths = (path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    return sorted(path for path in paths if "console.log" not in path)


# ---- the grid -----------------------------------------------------------------------------------


def grid(folder: Path, points: Sequence[str], say=print) -> list[Kill]:
    """Kills a run at the points; each with what differs after it."""
    kills, num_steps = plan(points)
    inputs, alone, archive, killed = (folder / n for n in ("inputs", "alone", "archive", "killed"))
    inputs.mkdir(parents=True)
    write_inputs(inputs)
    code = run(inputs, alone, num_steps, ARCHIVE=str(archive))
    if code:
        raise SystemExit(f"the run that is left alone ended with {code}: {alone}/console.log")
    pending: list[Kill] = []
    committed = 0
    for kill in [*kills, None]:
        started = time.monotonic()
        at = "" if kill is None else f"{kill.point}@{'' if kill.step is None else kill.step}"
        marker = folder / "killed_at"
        code = run(inputs, killed, num_steps, KILL_AT=at, KILLED=str(marker))
        step, found = compare(alone, archive, killed, is_end=kill is None)
        if step > committed or kill is None:
            for before in pending:
                before.is_verified, before.differences = True, found
            pending, committed = [], step
        if kill is None:
            if code:
                raise SystemExit(f"the last continuation ended with {code}: {killed}/console.log")
            continue
        if not marker.is_file() or code == 0:
            found = [*found, f"not killed: exit code {code}, {killed}/console.log"]
        marker.unlink(missing_ok=True)
        kill.differences = found
        pending.append(kill)
        say(
            f"{kill.point}@{kill.step}: committed {step}, {len(found)} differences, "
            f"{time.monotonic() - started:.0f} s",
        )
        if found:
            say("\n".join(found[:10]))
    return kills


def num_identical(kills: Sequence[Kill]) -> int:
    return sum(kill.is_verified and not kill.differences for kill in kills)


def figure(kills: Sequence[Kill]) -> str:
    return f"{num_identical(kills)} of {len(kills)} continuations identical"


def choose(num: int | None, seed: int) -> list[str]:
    """All points, or some of a step drawn at random, in order."""
    if num is None:
        return [*START, *STEP, *END]
    drawn = sorted(random.Random(seed).sample(range(len(STEP)), num))
    return [STEP[i] for i in drawn]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, help="of a step, drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/kills"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        shutil.rmtree(options.folder)
    points = choose(options.points, options.seed)
    kills = grid(options.folder.absolute(), points, lambda text: print(text, flush=True))
    print(figure(kills))
    good = num_identical(kills)
    write_result(options.json, {"identical": good, "kills": len(kills)}, options.seed)
    return 0 if good == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
