"""`python benchmarks/file_kills.py`: SIGKILL before every file operation of a run, without Ray.

verl's own loop (`PPOTrainer.fit`), resume and data loader, and this package's saves, guards,
dumps, logs and commits, with one number in place of a model and nothing that trains. A run is repeated in
a process of its own once for each file that it opens for writing, renames or removes, and killed
right before; a second process resumes it to the end. What lies there then is compared, byte for
byte, with a run that was left alone. Prints what differs and the figure.

    python benchmarks/file_kills.py [--num 20 --seed 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from result_file import write_result
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from grpo_latent.common import manifest
from grpo_latent.eval.dumps import write_step
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import trainer as trainer_module
from grpo_latent.verl_plugin.trainer.guards import Guards
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer
from grpo_latent.verl_plugin.worker.parts import PartDigests

NUM_STEPS = 6
SCORES = {0: 0.2, 1: 0.5, 2: 0.4, 3: 0.6, 4: 0.55, 5: 0.7, 6: 0.65}  # saved for 1, 3 and 5, too
MODEL, EXTRA = "model_world_size_1_rank_0.pt", "extra_state_world_size_1_rank_0.pt"


class Weights:
    """Stands for the actor's workers: one number, which each batch and a draw change."""

    world_size = 1

    def __init__(self) -> None:
        self.value = torch.ones((), dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        self._parts: PartDigests | None = None

    def update(self, rows: Sequence[int]) -> None:
        for row in rows:
            draw = torch.rand((), generator=self.generator)
            self.value = (self.value * 1.25 + row).sin() + 2 + draw

    def save_checkpoint(self, folder: str, remote: Any, step: int, **kwargs: Any) -> None:
        place = Path(folder)
        (place / "huggingface").mkdir(parents=True)
        torch.save({"weight": self.value}, place / MODEL)
        torch.save({"rng": self.generator.get_state()}, place / EXTRA)
        (place / "huggingface" / "config.json").write_text(json.dumps({"step": step}))
        (place / "fsdp_config.json").write_text('{"world_size": 1}')
        self._parts = PartDigests(place, 0)

    def digest_parts(self) -> list[manifest.Entries]:
        assert self._parts is not None, "asked after a save"
        return [self._parts.result()]

    def check_parts(self, folder: str, entries: manifest.Entries) -> None:
        manifest.check_files(folder, entries)

    def load_checkpoint(self, local_path: str, **kwargs: Any) -> None:
        self.value = torch.load(f"{local_path}/{MODEL}")["weight"]
        self.generator.set_state(torch.load(f"{local_path}/{EXTRA}")["rng"])


class Loop(LatentPPOTrainer):
    """The trainer, less what trains."""

    def __init__(self, folder: Path):
        self.config = OmegaConf.create(
            {
                "trainer": {
                    "default_local_dir": str(folder / "checkpoints"),
                    "default_hdfs_dir": None,
                    "del_local_ckpt_after_load": False,
                    "resume_mode": "auto",
                    "save_freq": 2,
                    "test_freq": 1,
                    "val_before_train": True,
                    "val_only": False,
                    "total_epochs": 100,
                    "max_actor_ckpt_to_keep": 1,
                    "project_name": "p",
                    "experiment_name": "e",
                    "logger": ["file"],
                },
                "global_profiler": {"steps": None},
                "actor_rollout_ref": {
                    "model": {"path": "start"},
                    "actor": {"checkpoint": {"load_contents": ["model", "optimizer", "extra"]}},
                },
            }
        )
        self.options = LatentOptions(
            output_dir=str(folder), dump_every=1, dump_dir=str(folder / "rollouts")
        )
        self.guards = Guards(self.options, self.config.trainer)
        nothing = lambda *args, **kwargs: None  # noqa: E731
        self.reporter = SimpleNamespace(report=nothing, say=nothing)  # type: ignore[assignment]
        self.checkpoint_callback = SimpleNamespace(on_save=nothing)  # type: ignore[assignment]
        manager: Any = SimpleNamespace(update_weights=nothing, sleep_replicas=nothing)
        self.checkpoint_manager = manager
        self.replay_buffer = SimpleNamespace(manager=None)  # type: ignore[assignment]
        self.board = None
        self.resumed_from, self.is_resumed, self._saved_step, self._pending = 0, False, None, None
        self.trainer_mode, self.use_critic = "sync", False
        self.steps_per_epoch, self.total_training_steps = 3, NUM_STEPS
        self.actor_rollout_wg = Weights()
        generator = torch.Generator().manual_seed(0)
        self.train_dataloader = StatefulDataLoader(
            list(range(6)),
            batch_size=2,
            sampler=RandomSampler(range(6), generator=generator),
        )
        self._rows: Iterator | None = None
        self._init_dump_executor()
        self._load_checkpoint()

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        if self._rows is None:
            self._rows = iter(self.train_dataloader)
        try:
            rows = next(self._rows)
        except StopIteration:
            self._rows = iter(self.train_dataloader)
            rows = next(self._rows)
        self.actor_rollout_wg.update(rows.tolist())
        metrics["critic/score/mean"] = float(self.actor_rollout_wg.value)
        return KVBatchMeta(partition_id="train", keys=[], tags=[])

    def _measure_usage(self) -> dict[str, float]:
        return {}

    def _start_profiling(self) -> None:
        pass

    def _stop_profiling(self) -> None:
        pass


def _dump(batch: KVBatchMeta, step: int, folder: Path) -> tuple[list[dict], list[dict]]:
    write_step(folder, step, [{"step": step, "id": "0/0"}], {"0/0": torch.full((1, 4), step)})
    return [], []


def install() -> None:
    """Replaces what needs workers or a queue; for this process and those that it forks."""
    compat.apply_patches()
    score = "val-core/x/acc/mean@1"
    base: Any = PPOTrainerSync
    base._validate = lambda self: {
        score: SCORES[self.global_steps],
        "val-aux/standard_error": 0.01,
    }
    base._compute_metrics = lambda self, *args, **kwargs: None
    for module, name, value in (
        (trainer_module, "step_metrics", lambda batch: {"latent/frac_rollouts": 1.0}),
        (trainer_module, "dump_step", _dump),
        (trainer_base.tq, "kv_clear", lambda **kwargs: None),
        (trainer_base, "tqdm", lambda **kwargs: SimpleNamespace(update=int, close=int)),
        (trainer_base, "pprint", lambda text: None),
        (trainer_base.SkipManager, "init", lambda config: None),
    ):
        setattr(module, name, value)


# ---- killing --------------------------------------------------------------------------------------

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def fork(folder: Path, kill_at: int | None, count_into: Path | None = None) -> int:
    """Runs in a process of its own; its status.

    Args:
        kill_at: it kills itself before the file operation of this number, from 1.
        count_into: a file outside the folder, for the number of operations.
    """
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    status = 1
    try:
        os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics.jsonl")
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere
            count = watch(folder, kill_at)
            Loop(folder).fit(None)
        if count_into is not None:
            count_into.write_text(str(count[0]))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def watch(folder: Path, kill_at: int | None) -> list[int]:
    """Counts this process's file operations in a folder, and kills it before one of them."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (writes or event in EVENTS) or str(folder) not in str(arguments[0]):
            return
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


# ---- comparison -----------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """Every file by its path; times, and what zip files say of their making, are left out."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            found[name] = [
                (line["step"], {k: v for k, v in line["data"].items() if "timing" not in k})
                for line in lines
            ]
        elif path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                found[name] = {item: archive.read(item) for item in archive.namelist()}
        else:
            found[name] = path.read_bytes()
    return found


def differing(alone: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    return sorted(name for name in alone | killed if alone.get(name) != killed.get(name))


def grid(folder: Path, seed: int, num: int | None = None) -> list[tuple[int, list[str]]]:
    """What differs by the number of the operation that a run was killed before."""
    install()
    place, counter = folder / "run", folder / "count"
    if fork(place, None, counter):
        raise SystemExit("the run that is left alone failed")
    alone = content(place)
    numbers = list(range(1, int(counter.read_text()) + 1))
    if num is not None:
        numbers = sorted(random.Random(seed).sample(numbers, num))
    found = []
    for number in numbers:
        shutil.rmtree(place)
        status = fork(place, number)
        if not os.WIFSIGNALED(status):
            found.append((number, [f"not killed: {status}"]))
            continue
        status = fork(place, None)
        found.append(
            (number, [f"ended with {status}"] if status else differing(alone, content(place)))
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, help="operations drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = grid(Path(folder), options.seed, options.num)
    for number, names in found:
        if names:
            print(f"operation {number}: {names}")
    good = sum(not names for _, names in found)
    print(f"{good} of {len(found)} kills before a file operation: the same files to the byte")
    write_result(options.json, {"same": good, "kills": len(found)}, options.seed)
    return 0 if good == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
