"""One SFT run from its settings: load, train, save.

<output_dir>/model/            what RL starts from
             checkpoint-N/     what a resumed run starts from
             metrics.jsonl  settings.json  summary.json  sft.log
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainingArguments, set_seed

from grpo_latent.common.files import write_json
from grpo_latent.common.paths import check_output_folder
from grpo_latent.common.provenance import provenance
from grpo_latent.common.sockets import keep_socket_paths_short
from grpo_latent.data.boxes import BadBoxes
from grpo_latent.errors import ConfigError
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.loading import LatentModel
from grpo_latent.sft.common.callbacks import JsonlLog, ProgressBar
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.images import set_image_tokens
from grpo_latent.sft.common.loading import load_for_sft
from grpo_latent.sft.common.parameters import add_lora, freeze_vision, merge_lora
from grpo_latent.sft.common.saving import save_for_rl
from grpo_latent.sft.common.sharding import check_sharding, gathered_weights
from grpo_latent.sft.common.trainer import LatentSFTTrainer
from grpo_latent.sft.resuming import as_dict, find_checkpoint
from grpo_latent.sft.settings import SFTSettings

_SUMMARISED = ("ce", "latent_loss", "latent_hit", "end_loss")


@dataclass(frozen=True)
class SFTResult:
    """`metrics` are the last that were logged, `bad_boxes` those of the rows that were read."""

    model_path: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    bad_boxes: BadBoxes


def run_sft(settings: SFTSettings) -> SFTResult:
    """Trains and writes `settings.model.save_path`.

    Raises:
        GrpoLatentError: what is wrong with config, data or checkpoint, and how to fix it.
    """
    start = time.perf_counter()
    args = settings.training_arguments()
    assert args.output_dir is not None, "`training_arguments` asks for it"
    output_dir = Path(args.output_dir)
    save_path = Path(settings.model.save_path)
    check_sharding(args, settings.trainer, settings.model)
    check_precision(settings, args)
    check_output_folders(save_path, settings, output_dir)
    log_to_file(output_dir / "sft.log", args.should_save)
    checkpoint = find_checkpoint(settings, output_dir, args.world_size)
    set_seed(args.seed)  # before loading, which draws new embeddings and modules
    latent = load_model(settings)
    bad_boxes = BadBoxes(settings.data.on_bad_box)
    dataset = build_dataset(latent, settings, bad_boxes)
    record = None
    if args.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "settings.json", as_dict(settings, args.world_size))
        record = provenance(args.seed)  # of the code that trains, not of what it is at the end
    trainer = train(latent, settings, args, dataset, checkpoint)
    # gathering shards is a collective: every process takes part
    state_dict = (
        gathered_weights(latent.model, args.should_save) if trainer.is_fsdp_enabled else None
    )
    if args.should_save:
        merge_lora(latent.model)
        save_for_rl(save_path, latent, state_dict)
    result = SFTResult(
        save_path,
        trainer.state.global_step,
        time.perf_counter() - start,
        last_metrics(trainer.state.log_history),
        bad_boxes,
    )
    if args.should_save:
        write_json(output_dir / "summary.json", summary_of(result, record))
    return result


def check_sft(settings: SFTSettings) -> list[str]:
    """Checks settings, model, every row and the checkpoint to resume; trains and writes nothing.

    Returns:
        what would be trained, in lines.

    Raises:
        GrpoLatentError: as `run_sft`.
    """
    args = settings.training_arguments()
    assert args.output_dir is not None, "`training_arguments` asks for it"
    output_dir, save_path = Path(args.output_dir), Path(settings.model.save_path)
    check_sharding(args, settings.trainer, settings.model)
    check_precision(settings, args)
    check_output_folders(save_path, settings, output_dir)
    checkpoint = find_checkpoint(settings, output_dir, args.world_size)
    latent = load_model(settings)
    bad_boxes = BadBoxes(settings.data.on_bad_box)
    dataset = build_dataset(latent, settings, bad_boxes)
    for index in range(len(dataset)):
        dataset[index]  # decodes its images and encodes the row, as its batch would
    trained = sum(item.numel() for item in latent.model.parameters() if item.requires_grad)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = (
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    return [
        f"model    {settings.model.path}: {latent.model.config.model_type}, "
        f"{trained:,} parameters trained",
        f"rows     {len(dataset):,}; {bad_boxes.report() or 'no box was out of place'}",
        f"method   {settings.method}, batches of {batch}, {length}, "
        f"learning rate {args.learning_rate:g}",
        f"run      {'anew' if checkpoint is None else f'resumes {checkpoint}'}",
        f"output   {save_path}",
    ]


def check_output_folders(save_path: Path, settings: SFTSettings, output_dir: Path) -> None:
    """Refuses a file in the place of a folder, and to write a model over the one that is trained."""
    check_output_folder(str(output_dir), "trainer.output_dir")
    check_output_folder(str(save_path), "model.save_path")
    if Path(settings.model.path).resolve() in (save_path.resolve(), output_dir.resolve()):
        raise ConfigError(
            "the input checkpoint would be overwritten",
            where="model.save_path",
            got=str(save_path),
            expected="another folder than model.path",
        )


def load_model(settings: SFTSettings) -> LatentModel:
    """Loads `settings.model`, with the image sizes and trained parameters that are asked for."""
    latent = load_for_sft(
        settings.model,
        settings.latent,
        settings.loss.trains_end_vector,
        settings.method_row.needs_vision,
    )
    if latent.processor is not None:
        set_image_tokens(
            latent.processor, settings.data.min_image_tokens, settings.data.max_image_tokens
        )
    choose_parameters(latent, settings)
    return latent


def train(
    latent: LatentModel,
    settings: SFTSettings,
    args: TrainingArguments,
    dataset: SFTDataset,
    checkpoint: Path | None,
) -> LatentSFTTrainer:
    """Trains to the end, from `checkpoint` on where there is one, and waits for all processes."""
    assert args.output_dir is not None, "`training_arguments` asks for it"
    if args.dataloader_num_workers:
        keep_socket_paths_short()
    bar = ProgressBar()
    trainer = settings.method_row.trainer(
        latent,
        args,
        dataset,
        settings.loss,
        labelled_per_batch=settings.data.labelled_per_batch,
        horizon_steps=settings.horizon_steps,
        vision_cache_bytes=settings.model.vision_cache_bytes,
        callbacks=[bar, JsonlLog(Path(args.output_dir) / "metrics.jsonl")],
    )
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
        trainer.release()
    trainer.accelerator.wait_for_everyone()
    return trainer


def summary_of(result: SFTResult, record: dict[str, Any] | None) -> dict[str, Any]:
    """What `summary.json` holds; `record` is the run's provenance."""
    return {
        "model": str(result.model_path),
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        **result.metrics,
        "bad_boxes": dataclasses.asdict(result.bad_boxes),
        "provenance": record,
    }


def last_metrics(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Picks the last value of each from whichever line has it: the last one may lack a term."""
    metrics: dict[str, float] = {}
    for line in log_history:
        metrics |= {name: line[name] for name in _SUMMARISED if name in line}
    return metrics


def check_precision(settings: SFTSettings, args: TrainingArguments) -> None:
    """Raises `ConfigError` where float32 adapters meet a half-precision base without a cast."""
    if settings.model.lora.enabled and settings.model.dtype == "bfloat16" and not args.bf16:
        raise ConfigError(
            "adapters train in float32 over a bfloat16 base",
            where="trainer.bf16",
            got=False,
            expected="true with model.lora.enabled and model.dtype=bfloat16",
        )


def choose_parameters(latent: LatentModel, settings: SFTSettings) -> None:
    """Freezes and adapts parameters, installs the latent hook; before anything wraps the model."""
    model = latent.model
    if settings.model.lora.enabled:
        new_ids = list(latent.mechanism.token_ids.values())
        add_lora(model, settings.model.lora, new_ids, latent.mechanism.parameter_prefixes)
    freeze_vision(model, settings.model.freeze_vision, settings.model.freeze_merger)
    LatentInjector.install(model)


def build_dataset(
    latent: LatentModel, settings: SFTSettings, bad_boxes: BadBoxes | None = None
) -> SFTDataset:
    """Reads and checks the rows of all files; their images are decoded when a batch is made.

    Args:
        bad_boxes: counts them.
    """
    bad_boxes = bad_boxes or BadBoxes(settings.data.on_bad_box)
    data = settings.data
    method = settings.method_row
    read = method.readers[data.format]
    examples = itertools.chain.from_iterable(
        read(path, data.image_folder, bad_boxes) for path in data.train_files
    )
    encoder = method.make_encoder(latent, settings.loss, data.max_length)
    return SFTDataset(list(itertools.islice(examples, data.max_rows)), encoder, data.cache_bytes)


def log_to_file(path: Path, is_main: bool) -> None:
    """Sends the libraries' own messages to the log file; the console keeps the bar."""
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("transformers", "accelerate", "peft"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
