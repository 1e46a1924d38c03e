"""`python -m grpo_latent.evaluate`: how right a checkpoint is, and whether its latents are used.

Writes (and prints) one JSON object:

    greedy      {"accuracy", "interval", "score", "n", "tokens_per_question",
                "seconds_per_question"}; of a benchmark also "row_accuracy", "pair_accuracy"
                (MMVP), "group_accuracy", "by_category"
    sampled     the same and {"pass_at_k", "accuracy_by_seed", "seed_std"}, null without
    decodings   the same for each further strategy
    latents     of greedy ones {"frac_rollouts", "spans_mean", "steps_mean", "steps_max",
                "norm_mean", "effective_rank", …}
    ablations   {"own", "zero", "shuffle", …}: greedy accuracies over all questions, null where
                nothing could be changed
    num_changed prompts that each ablation changed
    usage       by ablation, over the prompts that it changed: {"own", "ablated", "gap",
                "gap_interval", "p_value", "mcnemar", "verdict" (used, not used, undecided at this
                n), "sentence", "about"}
    verdict     {"verdict", "sentence", "ablation"} of the primary ablation
    follow      how often the answer under `shuffle` is right for the prompt whose latents were
                put in
    hit         how often a latent's nearest visual token is the box's (alignment, not use)
    leak        largest change of a post-span log-prob, in nats, when the image is swapped under
                the recorded latents
    prompts     [{"row_id", "question", "where", "truth"}]
    outcomes    by ablation one number a prompt
    benchmark   of one: {"name", "preset", "labels", "notes"}: what to compare with what
    checkpoint, data, mechanism, chance, seed, num_prompts, seconds

Accuracies, pass@k, gaps and their intervals are over questions: rows of a benchmark that share one
(MMVP's pairs, HRBench's rotated options) are averaged first, and it counts once. "row_accuracy",
where rows share questions, is the plain mean over rows; "score" is the mean reward over rows.
Under a preset each decoding also has "published_accuracy" (and "published_by_category"): the plain
mean over rows, each answer counted as the paper's own code does.

An interrupted evaluation that has an `output` goes on where it stopped and gives the same report,
run times aside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from grpo_latent.common.command import config_command
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.common.files import write_text
from grpo_latent.common.paths import check_output_folder
from grpo_latent.common.provenance import provenance
from grpo_latent.common.schema import resolved
from grpo_latent.common.settings import MISSING, build, section
from grpo_latent.data.files import RowKeys
from grpo_latent.errors import ConfigError
from grpo_latent.eval.benchmarks import find_benchmark, find_preset, load_benchmark
from grpo_latent.eval.benchmarks.loading import CORRECTED
from grpo_latent.eval.decode import Decoding
from grpo_latent.eval.evaluate import EvalSettings, Evaluation, PromptsDigest, fingerprint
from grpo_latent.eval.journal import Journal
from grpo_latent.eval.keys import evaluate_schema
from grpo_latent.eval.pixels import PixelStore
from grpo_latent.eval.prompts import EvalPrompt, benchmark_prompts, read_prompts
from grpo_latent.eval.scoring import GradeScorer, RewardScorer, Scorer
from grpo_latent.eval.table import report_table
from grpo_latent.eval.verdict import VerdictSettings
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models.loading import LatentModel, load_latent_model
from grpo_latent.models.treatment_parameters import initialisation_notes
from grpo_latent.rewards.functions import source_digest, specs_from_config
from grpo_latent.rewards.runner import RewardRunner

OVERRIDES = ("visibility", "steps", "exit", "max_spans")


def check_only(config: DictConfig) -> None:
    """Loads model, rows and reward, decodes nothing, and says what would be evaluated.

    Raises:
        GrpoLatentError: as `run`.
    """
    config = with_preset(config)
    check_values(config)
    settings = read_settings(config)
    if config.output is not None:
        check_output_folder(str(Path(config.output).parent), "output")
    loaded = load(config, settings)
    prompts, data = read_data(config, loaded, lambda prompt: None)
    with make_scorer(config, loaded):
        print(f"model    {config.model.path}, engine hf on {config.model.device}")
        print(f"rows     {len(prompts):,} of {', '.join(data)}")
        print(
            f"decoded  {', '.join(settings.phases())}; {settings.max_new_tokens} positions at most"
        )
        print(f"output   {config.output or 'the console alone'}")
        print("nothing is wrong; nothing was evaluated or written")


@config_command("evaluate", check_only)
def main(config: DictConfig) -> None:
    report = run(config)
    # tables do not fit the 80 columns that a pipe is taken for
    Console(width=None if sys.stdout.isatty() else 110).print(report_table(report))


def run(config: DictConfig) -> dict:
    """Evaluates and, if `output` is set, writes the JSON file.

    Raises:
        GrpoLatentError: config, checkpoint, data or reward cannot be used.
    """
    config = with_preset(config)
    check_values(config)
    if not torch.cuda.is_available():
        torch.set_num_threads(config.latent.cpu_threads)
    settings = read_settings(config)
    loaded = load(config, settings)
    record = provenance(config.seed)
    digest = PromptsDigest()
    prompts, data = read_data(
        config, loaded, digest.add if config.output is not None else lambda prompt: None
    )
    with make_scorer(config, loaded) as scorer, _progress() as bar:
        task = bar.add_task("own", total=len(prompts) * len(settings.phases()))
        journal = None
        if config.output is not None:
            done = fingerprint(loaded, digest, settings) | {
                "weights": weights_of(config.model.path),
                "data": data,
            }
            if isinstance(scorer, RewardScorer):
                done["reward"] = [
                    OmegaConf.to_container(part) for part in (config.reward, config.latent.reward)
                ]
                done["reward files"] = [source_digest(spec) for spec in scorer.runner.functions]
            journal = Journal(Path(f"{config.output}.parts"), done)
        report = Evaluation(
            loaded,
            prompts,
            scorer,
            settings,
            progress=lambda phase, count: bar.update(task, advance=count, description=phase),
            max_batch_rows=config.latent.max_batch_rows,
            journal=journal,
        ).run()
    report |= {
        "checkpoint": str(config.model.path),
        "data": data,
        "latent_config": loaded.mechanism.to_dict(),
        "benchmark": benchmark_notes(config),
        "seed": config.seed,
        "provenance": record,
    }
    if journal is not None:
        write_report(Path(config.output), report)
        # last: without a report on disk the finished batches are all that there is
        journal.discard()
    return report


def load(config: DictConfig, settings: EvalSettings) -> LatentModel:
    """Loads the checkpoint, and says what it lacks of the treatment's parameters."""
    disable_progress_bar()  # transformers', for reading weights
    overrides = {
        name: config.latent[name] for name in OVERRIDES if config.latent[name] is not None
    }
    loaded = load_latent_model(
        config.model.path,
        dtype=parse_dtype(config.model.dtype, "model.dtype"),
        device=config.model.device,
        attn_implementation=config.model.attn_implementation,
        overrides=overrides,
        plain=config.model.plain,
        treatment=settings.treatment,
        seed=settings.seed,
        verify_digests=config.model.verify_digests,
    )
    for note in initialisation_notes(settings.treatment, config.model.path, settings.seed):
        print(note, file=sys.stderr)
    return loaded


def with_preset(config: DictConfig) -> DictConfig:
    """Fills in what a preset brings where the user says nothing: positions, and lengths of a span.

    Raises:
        ConfigError: no such preset.
    """
    name = OmegaConf.select(config, "data.benchmark.preset")
    if name is None:
        return config
    preset = find_preset(name)
    config = config.copy()
    if OmegaConf.is_missing(config.data, "max_response_length"):
        config.data.max_response_length = preset.max_new_tokens
    if config.decodings == []:
        config.decodings = [{"steps": steps} for steps in preset.steps]
    return config


def benchmark_notes(config: DictConfig) -> dict | None:
    """Says which numbers of a benchmark may be compared with which; None of other data."""
    asked = config.data.benchmark
    if asked.name is None:
        return None
    benchmark = find_benchmark(asked.name)
    notes = []
    if asked.preset is not None:
        preset = find_preset(asked.preset)
        notes.append(preset.form(benchmark.name).note)
        if config.data.max_response_length != preset.max_new_tokens:
            notes.append(
                f"preset {preset.name} decodes {preset.max_new_tokens} positions, here "
                f"data.max_response_length={config.data.max_response_length}"
            )
    if benchmark.corrections:
        how = (
            "they are corrected here: not comparable with published numbers"
            if asked.labels == CORRECTED
            else "they stand as published here (data.benchmark.labels=corrected turns them round)"
        )
        notes.append(f"{benchmark.corrections_note}; {how}")
    return {
        "name": benchmark.name,
        "preset": asked.preset,
        "labels": asked.labels,
        "notes": notes,
    }


def check_values(config: DictConfig) -> None:
    """Raises `ConfigError` at an unknown key, or a value of another type, range or name."""
    shipped = OmegaConf.load(Path(__file__).parent / "config" / "evaluate.yaml")
    assert isinstance(shipped, DictConfig), "the file holds sections"
    for name in ("defaults", "hydra"):
        del shipped[name]
    values = resolved(config)
    data = values.get("data")
    # a benchmark may stand for the files, which `read_data` asks
    if isinstance(data, dict) and data.get("val_files") in (MISSING, None):
        if data["val_files"] == MISSING or OmegaConf.select(config, "data.benchmark.name"):
            del data["val_files"]
    evaluate_schema(resolved(shipped)).check(values)


def read_settings(config: DictConfig) -> EvalSettings:
    """Reads the settings; raises `ConfigError` by the setting's name."""
    strategies = OmegaConf.to_container(config.decodings, resolve=True)
    if not isinstance(strategies, list):
        raise ConfigError(
            "not a list", where="decodings", got=strategies, expected="[{steps: 4}, {n: 8}, …]"
        )
    return EvalSettings(
        max_new_tokens=config.data.max_response_length,
        num_sampled=config.rollout.n,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        decodings=tuple(
            Decoding.from_dict(values, f"decodings[{i}]") for i, values in enumerate(strategies)
        ),
        ablations=tuple(config.ablations),
        leak_prompts=config.leak_prompts,
        seed=config.seed,
        prompts_per_batch=config.prompts_per_batch,
        verdict=build(VerdictSettings, config.verdict, "verdict"),
        treatment=parse_treatment(config.latent.treatment)[0],
    )


def read_data(
    config: DictConfig, loaded: LatentModel, seen: Callable[[EvalPrompt], None]
) -> tuple[list[EvalPrompt], list[str]]:
    """Reads prompts of `data.val_files` or `data.benchmark`; returns what they came from, too.

    Arguments are as `read_prompts`.
    """
    benchmark = config.data.benchmark
    size = config.data.cache_bytes
    if type(size) is not int or size < 0:
        raise ConfigError(
            "not a number of bytes", where="data.cache_bytes", got=size, expected="int >= 0"
        )
    store = PixelStore(size)
    if benchmark.name is not None:
        if benchmark.path is None:
            raise ConfigError(
                "no folder",
                where="data.benchmark.path",
                got=None,
                expected="the benchmark's folder",
            )
        items = load_benchmark(
            benchmark.name, benchmark.path, benchmark.subset, benchmark.preset, benchmark.labels
        )
        source = f"{benchmark.name} {benchmark.path}" + (
            f" {benchmark.subset}" if benchmark.subset else ""
        )
        if benchmark.preset is not None:
            source += f", preset {benchmark.preset}"
        if benchmark.labels == CORRECTED:
            source += ", corrected labels"
        return benchmark_prompts(items, loaded, config.data.max_rows, store, seen), [source]
    if OmegaConf.is_missing(config.data, "val_files"):
        raise ConfigError(
            "nothing to evaluate on",
            where="data",
            got="neither",
            expected="val_files, or benchmark.name and .path",
        )
    files = config.data.val_files
    files = list(files) if isinstance(files, ListConfig) else [files]
    keys = RowKeys.of(config.data)
    prompts = read_prompts(files, loaded, config.data.max_rows, store, seen, keys)
    return prompts, [str(path) for path in files]


@contextmanager
def make_scorer(config: DictConfig, loaded: LatentModel) -> Iterator[Scorer]:
    """Opens the benchmark's grader, or the config's reward functions, named as in training."""
    if config.data.benchmark.name is not None:
        yield GradeScorer(loaded)
        return
    settings = section(config.latent.reward, "latent.reward")
    custom = section(config.reward.custom_reward_function, "reward.custom_reward_function")
    functions = settings.pop("functions")
    if custom["path"]:
        functions = [
            {"path": custom["path"], "name": custom["name"], "kwargs": custom["reward_kwargs"]}
        ]
    with RewardRunner(specs_from_config(functions), **settings) as runner:
        yield RewardScorer(runner, loaded)


def weights_of(folder: str) -> list[list[object]]:
    """Lists name, size and time of a checkpoint's files: they tell another at the same place."""
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def write_report(path: Path, report: dict) -> None:
    """Writes the report as JSON in which a prompt's or an ablation's outcomes take one line."""
    rows = {name: f"@{name}@" for name in ("prompts", "outcomes")}
    text = json.dumps(report | rows, indent=2)
    lines = ",\n".join(f"    {json.dumps(prompt)}" for prompt in report["prompts"])
    text = text.replace('"@prompts@"', f"[\n{lines}\n  ]")
    lines = ",\n".join(
        f"    {json.dumps(n)}: {json.dumps(values)}" for n, values in report["outcomes"].items()
    )
    write_text(path, text.replace('"@outcomes@"', f"{{\n{lines}\n  }}") + "\n")


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    sys.exit(main())
