"""All rows of a run's files, checked by the driver before Ray starts."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoProcessor, AutoTokenizer

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.common.kinds import as_list
from grpo_latent.common.paths import is_remote
from grpo_latent.common.step_folders import step_of
from grpo_latent.data.checks import CheckedFile, check_files
from grpo_latent.data.files import RowKeys, num_rows
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.models.loading import reading
from grpo_latent.models.prompts import PromptLength
from grpo_latent.verl_plugin.trainer.checkpoint import resume_folder

GROUPS = {"train_files": "train_max_samples", "val_files": "val_max_samples"}


def check_data(config: DictConfig, console: Console | None = None) -> list[str]:
    """Checks every row of `data.train_files` and `data.val_files`, and that they make a batch.

    Files and models that lie elsewhere are checked where they are fetched to, by the data set.

    Args:
        console: shows a progress bar, which goes when it is done.

    Returns:
        what the user should know.

    Raises:
        DataError: a row that cannot be used, by file and row.
        ConfigError: fewer rows than a batch, or steps that are all taken.
    """
    folder = config.actor_rollout_ref.model.path
    files = {key: as_list(config.data[key]) for key in GROUPS}
    if is_remote(folder) or any(map(is_remote, [*files["train_files"], *files["val_files"]])):
        return []
    length, keys = prompt_length(folder), RowKeys.of(config.data)
    totals = [num_rows(path) for paths in files.values() for path in paths]
    total = None if None in totals else sum(count or 0 for count in totals)
    notes = []
    with _progress(console) as bar:
        task = bar.add_task("checking rows", total=total)
        for key, paths in files.items():
            checked = check_files(paths, length, keys, lambda count: bar.advance(task, count))
            num_left, of_length = _fitting(config, key, paths, checked)
            notes += of_length
            if key == "train_files":
                _check_batch(config, num_left)
                notes += _notes_on_steps(config, num_left)
    return notes


def prompt_length(folder: str) -> PromptLength:
    """Counts prompts of a checkpoint's folder; raises `CheckpointError` where it is damaged."""
    with reading("config.json", folder):
        _, backbone = read_backbone(folder)
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with reading("processor", folder):
        processor = AutoProcessor.from_pretrained(folder) if backbone.has_vision else None
    return PromptLength(tokenizer, processor)


def _fitting(
    config: DictConfig, key: str, paths: Sequence[str], checked: Sequence[CheckedFile]
) -> tuple[int, list[str]]:
    """The number of rows whose prompts fit, and what is to be said of the others."""
    limit = config.data.max_prompt_length
    too_long = [
        (f"{path} row {row}", count)
        for path, file in zip(paths, checked, strict=True)
        for row, count in enumerate(file.num_tokens)
        if count > limit
    ]
    num_all = sum(map(len, checked))
    num_left = num_all - len(too_long)
    if not too_long:
        return num_left, []
    where, longest = max(too_long, key=lambda item: item[1])
    fix = (
        "Raise data.max_prompt_length, or lower size.longest_edge of the checkpoint's image "
        "processor, which data.max_image_tokens of SFT sets"
    )
    if not config.data.filter_overlong_prompts or num_left == 0:
        raise DataError(
            "a prompt is too long",
            where=too_long[0][0],
            got=f"{too_long[0][1]} tokens, image tokens included; {len(too_long)} of {num_all} "
            f"rows are too long, {where} has most, {longest}",
            expected=f"<= data.max_prompt_length={limit}",
            fix=f"{fix}; data.filter_overlong_prompts=true leaves such rows out."
            if num_left
            else f"{fix}.",
        )
    return num_left, [
        f"data.{key}: {len(too_long)} of {num_all} rows are left out, longer than "
        f"data.max_prompt_length={limit} tokens ({where} has most, {longest})"
    ]


def _check_batch(config: DictConfig, num_rows: int) -> None:
    """Raises `ConfigError` where the training rows do not make one batch."""
    limit = config.data.get(GROUPS["train_files"], -1)
    if 0 < limit < num_rows:
        num_rows = limit
    batch = max(config.data.train_batch_size, config.data.get("gen_batch_size", None) or 0)
    if num_rows < batch:
        raise ConfigError(
            "a batch larger than the data",
            where="data.train_batch_size",
            got=f"{batch}, {num_rows} rows in data.train_files",
            expected=f"at most {num_rows}",
            fix="Lower it (and actor_rollout_ref.actor.ppo_mini_batch_size), or add rows.",
        )


def _notes_on_steps(config: DictConfig, num_rows: int) -> list[str]:
    """Says where a run has no step left.

    Raises:
        ConfigError: the checkpoint that it resumes from is past its last step.
    """
    trainer = config.trainer
    folder = resume_folder(trainer)
    step = None if folder is None else step_of(folder)
    if step is None or OmegaConf.select(config, "trainer.val_only", default=False):
        return []
    given = trainer.total_training_steps
    total = given or num_rows // config.data.train_batch_size * trainer.total_epochs
    if step > total:
        raise ConfigError(
            "the run is past its last step",
            where="trainer.total_training_steps" if given else "trainer.total_epochs",
            got=f"{total} steps in all, and {folder} is of step {step}",
            expected=f"more than {step}",
            fix="Raise it, or start anew in another latent.output_dir.",
        )
    if step == total:
        return [f"all {total} steps are taken: {folder} is the last, nothing is trained"]
    return []


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=console is None)
