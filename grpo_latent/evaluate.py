"""`python -m grpo_latent.evaluate`: accuracy of a latent checkpoint, and whether its latents are used.

Writes (and prints) one JSON object:

    greedy     {"accuracy", "score"}
    sampled    {"accuracy", "n"}, null without
    latents    {"frac_rollouts", "spans_mean", "steps_mean", "steps_max", "norm_mean", "length_mean", …} of the greedy ones
    ablations  {"own", "zero", "noise", "shuffle", "oracle"}: greedy accuracies over the same prompts, null where impossible
    follow     how often the answer under `shuffle` is the right one of the prompt whose latents were put in
    hit        how often a latent's nearest visual token is the one of the box (alignment, not use)
    leak       largest change of a post-span log-prob when the image is swapped under the recorded latents, in nats
    checkpoint, data, latent_config, seed, num_prompts, seconds
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from grpo_latent.errors import ConfigError, GrpoLatentError
from grpo_latent.eval.evaluate import EvalSettings, evaluate
from grpo_latent.eval.prompts import read_prompts
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardRunner

OVERRIDES = ("visibility", "steps", "exit", "max_spans")


@hydra.main(config_path="pkg://grpo_latent.config", config_name="evaluate", version_base=None)
def main(config: DictConfig) -> None:
    try:
        report = run(config)
    except GrpoLatentError as error:  # a message for the user, not a traceback of ours
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    show(report)


def run(config: DictConfig) -> dict:
    """Evaluates and, if `output` is set, writes the JSON file.

    Raises:
        GrpoLatentError: config, checkpoint, data or reward cannot be used.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(config.latent.cpu_threads)
    settings = EvalSettings(
        max_new_tokens=config.data.max_response_length,
        num_sampled=config.rollout.n,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        ablations=tuple(config.ablations),
        leak_prompts=config.leak_prompts,
        seed=config.seed,
        prompts_per_batch=config.prompts_per_batch,
    )
    disable_progress_bar()  # transformers', for reading weights
    overrides = {name: config.latent[name] for name in OVERRIDES if config.latent[name] is not None}
    loaded = load_latent_model(
        config.model.path,
        dtype=parse_dtype(config.model.dtype),
        device=config.model.device,
        attn_implementation=config.model.attn_implementation,
        overrides=overrides,
    )
    files = config.data.val_files
    files = list(files) if isinstance(files, ListConfig) else [files]
    with reward_runner(config) as runner, _progress() as bar:
        prompts = read_prompts(files, loaded, config.data.max_rows)
        task = bar.add_task("own", total=len(prompts) * (1 + len(settings.ablations)))
        report = evaluate(
            loaded,
            prompts,
            runner,
            settings,
            progress=lambda phase, count: bar.update(task, advance=count, description=phase),
            max_batch_rows=config.latent.max_batch_rows,
        )
    report |= {
        "checkpoint": str(config.model.path),
        "data": [str(path) for path in files],
        "latent_config": dataclasses.asdict(loaded.config),
        "seed": config.seed,
    }
    if config.output is not None:
        write_json(Path(config.output), report)
    return report


def reward_runner(config: DictConfig) -> RewardRunner:
    """The reward functions of the config, as training names them: one custom one, or a weighted list."""
    settings = OmegaConf.to_container(config.latent.reward, resolve=True)
    custom = OmegaConf.to_container(config.reward.custom_reward_function, resolve=True)
    functions = settings.pop("functions")
    if custom["path"]:
        functions = [{"path": custom["path"], "name": custom["name"], "kwargs": custom["reward_kwargs"]}]
    return RewardRunner(specs_from_config(functions), **settings)


def parse_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError("unknown dtype", where="model.dtype", got=name, expected="float32, bfloat16 or float16")
    return dtype


def write_json(path: Path, report: dict) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, path)


def show(report: dict) -> None:
    table = Table(title=f"{report['checkpoint']}: {report['num_prompts']} prompts, {report['seconds']:.1f} s")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {"greedy accuracy": report["greedy"]["accuracy"]}
    if report["sampled"] is not None:
        rows[f"sampled accuracy (n = {report['sampled']['n']})"] = report["sampled"]["accuracy"]
    rows |= {f"with latents {name}": value for name, value in report["ablations"].items() if name != "own"}
    rows |= {"shuffle follows its donor": report["follow"], "nearest token is the box's": report["hit"]}
    rows |= {"trajectories with latents": report["latents"]["frac_rollouts"], "leak (nats)": report.get("leak")}
    for name, value in rows.items():
        table.add_row(name, "-" if value is None else f"{value:.4g}")
    Console().print(table)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    main()
