"""Does a recipe's RL hold under what must not matter?

    python benchmarks/robustness.py quickstart ilvr ivt_lr coconut [--seeds 0 1 2] [--processes 2]
    make robustness RECIPES="ilvr"

Runs the GRPO stage of a recipe, from the checkpoint of its SFT, under eight perturbations for each
seed: twice the threads, another batch composition, 1e-6 relative noise on the weights of the start,
another order of rows, the kernels of a processor without AVX-512. Their true effect is rounding, and
the order of rows; a run that ends elsewhere does so by luck. Prints and writes for each recipe the
distribution of final held-out accuracy, the share of runs below their start, and where runs fell.

What a seed lacks of its recipe (data, vision tower, SFT) is made first, below --outputs, by the
commands of the recipe. `--grpo-defaults` takes grpo.yaml's algorithm and optimizer in place of the
recipe's. Training is `one_process.py`'s: the product's rollouts, losses and rewards,
no Ray, so that a run takes a minute of one core. `--set key=value` changes the config of all runs;
with latent.alarm.rollback=true they go back at alarms as training does, and the result says when.
`--remedy NAME` adds one of one_process_remedies.py's, which no config has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

# threads that spin while they wait slow down whoever shares their cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

from result_file import write_result  # noqa: E402
from robustness_recipes import ALGORITHM_KEYS, RECIPES, REMEDY_NAMES, Recipe  # noqa: E402

from grpo_latent.errors import ConfigError  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
TRACK_ROWS = 128  # of dev.parquet, while it trains
FINAL_ROWS = 1024  # of heldout.parquet, at its start and end
TRACK_EVERY = 10  # steps
COLLAPSED = 0.5  # of the start's accuracy

# What torch, oneDNN and MKL take on a processor without AVX-512. They read it when they are loaded.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class Perturbation:
    """One way to run the same thing.

    Attributes:
        noise: standard deviation of the factor 1 + noise · eps on each weight of the start;
        noise_seed: of its eps.
        order: 0 is the order of rows that training takes; others are further permutations.
        is_avx2: with the kernels of a processor without AVX-512.
    """

    name: str
    threads: int = 1
    max_batch_rows: int | None = None
    noise: float = 0.0
    noise_seed: int = 0
    order: int = 0
    is_avx2: bool = False


PERTURBATIONS = (
    Perturbation("none"),
    Perturbation("threads=2", threads=2),
    Perturbation("max_batch_rows=64", max_batch_rows=64),
    Perturbation("noise 1", noise=1e-6, noise_seed=1),
    Perturbation("noise 2", noise=1e-6, noise_seed=2),
    Perturbation("order 1", order=1),
    Perturbation("avx2", is_avx2=True),
    Perturbation("avx2, max_batch_rows=40", max_batch_rows=40, is_avx2=True),
)


def prepare(recipe: Recipe, name: str, seed: int, outputs: Path) -> Path:
    """The seed's folder with data and checkpoint, made by the recipe's own script if need be."""
    folder = outputs / f"{recipe.output or name}_seed{seed}"
    if not (folder / recipe.checkpoint / "latent_config.json").is_file():
        print(f"{name}, seed {seed}: data and SFT", flush=True)
        environment = os.environ | dict(recipe.environment)
        environment |= {"SEED": str(seed), "OUT": str(folder), "ONLY_SFT": "1"}
        outputs.mkdir(parents=True, exist_ok=True)
        with (outputs / f"{folder.name}.log").open("w") as log:
            subprocess.run(
                ["bash", recipe.script],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    return folder


@dataclass(frozen=True)
class Job:
    """A run; all that a worker process needs."""

    recipe: Recipe
    seed: int
    folder: str
    perturbation: Perturbation
    overrides: tuple[str, ...]
    has_grpo_defaults: bool = False
    remedy: str | None = None


def run_job(job: Job) -> dict:
    """Trains once, in a worker process."""
    import one_process as loop
    import torch
    from omegaconf import OmegaConf

    os.chdir(REPOSITORY)  # recipes name their reward files from here
    change = job.perturbation
    torch.set_num_threads(change.threads)
    overrides = [f"latent.seed={job.seed}", *job.recipe.overrides, *job.overrides]
    if change.max_batch_rows:
        overrides.append(f"latent.max_batch_rows={change.max_batch_rows}")
    config = loop.compose_config(job.recipe.folder, job.recipe.config, overrides)
    if job.has_grpo_defaults:
        defaults = loop.compose_config(REPOSITORY / "grpo_latent/config", "grpo", job.overrides)
        for key in ALGORITHM_KEYS:
            OmegaConf.update(config, key, OmegaConf.select(defaults, key), merge=False)
    loaded = loop.load(config, Path(job.folder, job.recipe.checkpoint))
    if change.noise:
        add_noise(loaded.model, change.noise, change.noise_seed)
    data = str(Path(job.folder, job.recipe.data))
    num_steps = config.trainer.total_training_steps
    train, dev, held_out = (
        _rows(data, name, str(Path(job.folder, job.recipe.checkpoint)), max_rows)
        for name, max_rows in (
            ("train_rl", None),
            ("dev", TRACK_ROWS),
            ("heldout", FINAL_ROWS),
        )
    )
    with loop.rewards_of(config, loaded) as scorer:
        training = loop_of(config, loaded, job.remedy)
        start = loop.OneProcess.validate(training, held_out, scorer)
        rows = loop.in_training_order(train, config.data.seed, change.order)
        every = config.trainer.test_freq if config.latent.alarm.rollback else TRACK_EVERY
        record = training.run(rows, dev, scorer, num_steps, every)
        final = loop.OneProcess.validate(training, held_out, scorer)
    return {
        "seed": job.seed,
        "perturbation": change.name,
        "start": start,
        "final": final,
        "tracked": record.held_out,
        "grad_norm_max": max(log.grad_norm for log in record.steps),
        "steps": [asdict(log) for log in record.steps],
        "seconds": record.seconds,
    } | said_by_alarms(training)


def loop_of(config, loaded, remedy: str | None = None):
    """The loop, with alarms and their way back where the config asks for it, or with a remedy."""
    import one_process as loop
    from one_process_alarms import GuardedProcess
    from one_process_remedies import REMEDIES

    from grpo_latent.common.settings import build
    from grpo_latent.verl_plugin.boot.options import LatentOptions
    from grpo_latent.verl_plugin.trainer.alarm_settings import AlarmSettings
    from grpo_latent.verl_plugin.trainer.alarms import Alarms
    from grpo_latent.verl_plugin.trainer.guards import check_guards

    if remedy is not None and config.latent.alarm.rollback:
        raise ConfigError(
            "a remedy is measured without the way back",
            where="latent.alarm.rollback",
            got=f"true, with --remedy {remedy}",
            expected="one of them",
        )
    if not config.latent.alarm.rollback:
        return (loop.OneProcess if remedy is None else REMEDIES[remedy])(config, loaded)
    check_guards(config, LatentOptions.from_rollout(config.actor_rollout_ref.rollout))
    settings = build(AlarmSettings, config.latent.alarm, "latent.alarm")
    return GuardedProcess(Alarms(settings), config, loaded)


def said_by_alarms(training) -> dict:
    """Of a guarded run: what was said, when, and where it went back; nothing of another."""
    from one_process_alarms import GuardedProcess

    if not isinstance(training, GuardedProcess):
        return {}
    return {
        "rollbacks": training.rollbacks,
        "alarms": [(step, line.kind) for step, line in training.lines if line.is_alarm],
        "first_bad_step": training.first_bad_step,
    }


@cache
def _rows(data: str, name: str, checkpoint: str, max_rows: int | None):
    import one_process as loop

    from grpo_latent.models.loading import load_latent_model

    return loop.read_rows(data, name, load_latent_model(checkpoint), max_rows)


def add_noise(model, noise: float, seed: int) -> None:
    """Multiplies each weight by 1 + noise · eps: what another order of summation would change."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            eps = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + noise * eps)


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[dict]:
    """Results as they come, `processes` jobs at once.

    Processes stay, so that rows are read once; those with other kernels are others.
    """
    pools: list[ProcessPoolExecutor] = []
    own, starting = threading.local(), threading.Lock()

    def run(job: Job) -> dict:
        name = "avx2" if job.perturbation.is_avx2 else "native"
        if not hasattr(own, name):
            # a fork would inherit loaded kernels, and a process starts with its first job
            with starting, environment(AVX2 if job.perturbation.is_avx2 else {}):
                pools.append(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
                pools[-1].submit(os.getpid).result()
                setattr(own, name, pools[-1])
        return getattr(own, name).submit(run_job, job).result()

    try:
        with ThreadPoolExecutor(processes) as threads:
            for done in as_completed([threads.submit(run, job) for job in jobs]):
                yield done.result()
    finally:
        for pool in pools:
            pool.shutdown()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def summarize(runs: Sequence[dict]) -> dict:
    """The distribution over runs; accuracies are shares of held-out rows."""
    finals, gains = [run["final"] for run in runs], [run["final"] - run["start"] for run in runs]
    fell = [step for step in map(collapse_step, runs) if step is not None]
    lowest = min(runs, key=lambda run: run["final"] - run["start"])
    return {
        "runs": len(runs),
        "start": fmean(run["start"] for run in runs),
        "mean": fmean(finals),
        "sd": stdev(finals) if len(finals) > 1 else 0.0,
        "min": min(finals),
        "mean_gain": fmean(gains),
        "min_gain": min(gains),
        "below_start": fmean(gain < 0 for gain in gains),
        "holds": min(gains) >= fmean(gains) / 2 and fmean(gains) > 0,
        "collapsed": len(fell),
        "steps_to_collapse": sorted(fell),
        "lowest_run": f"seed {lowest['seed']}, {lowest['perturbation']}",
        "seconds_per_run": fmean(run["seconds"] for run in runs),
    }


def collapse_step(run: dict) -> int | None:
    """The first validation at which less than half of the start's accuracy was left."""
    start = run["tracked"][0][1]
    return next((step for step, value in run["tracked"] if value < COLLAPSED * start), None)


def show(name: str, summary: dict) -> None:
    print(
        f"{name}: {summary['runs']} runs, start {summary['start']:.3f}, final "
        f"{summary['mean']:.3f} ± {summary['sd']:.3f}, min {summary['min']:.3f}, gain "
        f"{summary['mean_gain']:+.3f}, least {summary['min_gain']:+.3f} ({summary['lowest_run']}), "
        f"below start {summary['below_start']:.0%}, collapsed {summary['collapsed']} "
        f"{summary['steps_to_collapse'] or ''}, {'holds' if summary['holds'] else 'DOES NOT HOLD'}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=["quickstart", "ilvr", "ivt_lr", "coconut"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outputs", type=Path, default=REPOSITORY / "outputs" / "robustness")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--perturbations", type=int, nargs="+", default=[*range(len(PERTURBATIONS))]
    )
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--grpo-defaults", action="store_true", help="grpo.yaml's algorithm and optimizer"
    )
    parser.add_argument("--remedy", choices=REMEDY_NAMES, help="one_process_remedies.py")
    parser.add_argument("--json", type=Path, help="default: <outputs>/<recipe>.json")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"unknown recipes {sorted(unknown)}; known: {', '.join(RECIPES)}")
    for name in arguments.recipes:
        recipe = RECIPES[name]
        started = time.monotonic()
        jobs = [
            Job(
                recipe,
                seed,
                str(prepare(recipe, name, seed, arguments.outputs)),
                PERTURBATIONS[i],
                tuple(arguments.overrides),
                arguments.grpo_defaults,
                arguments.remedy,
            )
            for seed in arguments.seeds
            for i in arguments.perturbations
        ]
        runs = []
        for run in run_all(jobs, arguments.processes):
            runs.append(run)
            print(
                f"  {name} seed {run['seed']} {run['perturbation']}: {run['start']:.3f} -> "
                f"{run['final']:.3f}  {' '.join(f'{v:.2f}' for _, v in run['tracked'])}  "
                f"largest gradient {run['grad_norm_max']:.1f}  {run['seconds']:.0f} s",
                flush=True,
            )
        summary = summarize(runs)
        show(name, summary)
        path = arguments.json or arguments.outputs / f"{name}.json"
        found = {
            "recipe": name,
            "overrides": arguments.overrides,
            "has_grpo_defaults": arguments.grpo_defaults,
            "remedy": arguments.remedy,
            "seconds": time.monotonic() - started,
        }
        write_result(path, {**found, **summary, "each": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
