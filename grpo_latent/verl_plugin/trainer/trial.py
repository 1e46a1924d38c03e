"""The checkpoint that is to be trained, loaded and tried on a few prompts before that."""

from __future__ import annotations

from itertools import islice

from omegaconf import DictConfig
from rich.console import Console

from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.common.paths import is_remote
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.data.rows import check_prompt
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.rollout.preflight import PreflightPrompt, PreflightReport, preflight
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.verl_plugin.boot.options import CHECKPOINT_FIELDS


def try_checkpoint(config: DictConfig) -> PreflightReport | None:
    """Loads the checkpoint once in this process and rolls out a few prompts.

    Returns:
        a `PreflightReport`, None if switched off.

    Raises:
        CheckpointError, PreflightError: RL cannot start from it.
    """
    settings = config.latent.preflight
    folder = config.actor_rollout_ref.model.path
    if settings.num_prompts == 0 or is_remote(folder):
        return None

    files = config.data.train_files
    rollout = config.actor_rollout_ref.rollout
    prompts = []
    first = files if isinstance(files, str) else files[0]
    rows = iter_verl_rows(first, RowKeys.of(config.data))
    for row, where in islice(rows, settings.num_prompts):
        messages, images = check_prompt(row, where)
        prompts.append(PreflightPrompt(messages, [image.open() for image in images], where))
    return preflight(
        folder,
        prompts,
        min_emission_rate=settings.min_emission_rate,
        sampling=SamplingParams(
            config.data.max_response_length, rollout.temperature, rollout.top_k, rollout.top_p
        ),
        overrides={
            name: config.latent[name]
            for name in CHECKPOINT_FIELDS
            if config.latent[name] is not None
        },
        dtype=parse_dtype(rollout.dtype),
        device=config.trainer.device,
        treatment=parse_treatment(config.latent.treatment)[0],
        seed=config.latent.seed,
        verify_digests=config.latent.verify_digests,
    )


def report_trial(report: PreflightReport | None, console: Console) -> None:
    """Says what the trial found; nothing where it was switched off."""
    if report is not None:
        console.print(f"preflight {report.summary()}")
