"""What a run would do, for `python -m grpo_latent.train --check`, of config and files alone."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from grpo_latent.common import manifest
from grpo_latent.common.kinds import as_list
from grpo_latent.common.paths import is_remote
from grpo_latent.common.pickles import check_pickles
from grpo_latent.common.step_folders import step_of
from grpo_latent.data.files import RowKeys, iter_verl_rows, num_rows
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.verl_plugin.rewards.manager import reward_settings
from grpo_latent.verl_plugin.trainer.checkpoint import restored, resume_folder
from grpo_latent.verl_plugin.trainer.commit import DATA_FILE, TRUST
from grpo_latent.verl_plugin.trainer.config_check import check_config
from grpo_latent.verl_plugin.worker.parts import resharding_notes


def check_resume(config: DictConfig) -> list[str]:
    """Reads the whole checkpoint that a run would go on from, as its ranks would do between them.

    Returns:
        what the user should know.

    Raises:
        CheckpointError: a part is missing or changed, or would run code.
    """
    folder = resume_folder(config.trainer)
    if folder is None:
        return []
    options = check_config(config)
    notes = manifest.check_folder(folder, options.verify_digests)
    num_ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    notes += resharding_notes(folder / "actor", num_ranks)
    check_pickles([folder / DATA_FILE], options.trust_pickles, TRUST)
    return notes


def plan(config: DictConfig) -> list[str]:
    """Says in a few lines what a checked config would train, on what, from where, and how long."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    batch = config.data.train_batch_size
    rows = _count(config, "train_files", "train_max_samples")
    held_out = _count(config, "val_files", "val_max_samples")
    treatment = OmegaConf.select(config, "latent.treatment.name", default="mask")
    settings = reward_settings(config)
    functions = ", ".join(
        f"{spec.path}:{spec.name}" for spec in specs_from_config(settings["functions"])
    )
    return [
        f"model    {config.actor_rollout_ref.model.path}",
        f"rows     {_text(rows)} to train on, {_text(held_out)} held out",
        f"step     {batch} prompts x {rollout.n} trajectories of at most "
        f"{config.data.max_response_length} positions; updates of "
        f"{actor.ppo_mini_batch_size} prompts, learning rate {actor.optim.lr:g}",
        f"KL       {_reference(config)}",
        f"latents  treatment {treatment}; engine {rollout.name}, device {config.trainer.device}",
        f"reward   {functions} (called on one right answer before the start; odd ones: "
        "grpo-latent check-reward)",
        f"use      {_usage(config)}",
        f"run      {_steps(config, rows)}",
        f"output   {config.latent.output_dir}",
    ]


def _reference(config: DictConfig) -> str:
    actor = config.actor_rollout_ref.actor
    if actor.use_kl_loss:
        return f"{actor.kl_loss_coef:g} x {actor.kl_loss_type} to the reference"
    if config.algorithm.use_kl_in_reward:
        return "to the reference, in the rewards"
    return "none: nothing holds the policy at its start (actor.use_kl_loss)"


def _usage(config: DictConfig) -> str:
    usage = config.latent.usage
    if not usage.num_prompts:
        return "of latents is not measured (latent.usage.num_prompts)"
    return (
        f"of latents at each validation, on {usage.num_prompts} rows: {usage.ablations[0]} decides, "
        f"with an accuracy of guessing of {usage.chance:g} (latent.usage.chance)"
    )


def _count(config: DictConfig, key: str, limit_key: str) -> int | None:
    """The number of rows that are read of a run's files; None where they lie elsewhere."""
    paths = as_list(config.data[key])
    if any(map(is_remote, paths)):
        return None
    keys = RowKeys.of(config.data)
    found = 0
    for path in paths:
        count = num_rows(path)
        found += sum(1 for _ in iter_verl_rows(path, keys)) if count is None else count
    limit = config.data.get(limit_key, -1)
    return min(found, limit) if limit > 0 else found


def _text(count: int | None) -> str:
    return "rows not counted" if count is None else f"{count:,}"


def _steps(config: DictConfig, rows: int | None) -> str:
    trainer = config.trainer
    total = trainer.total_training_steps
    if total is None and rows is not None:
        total = rows // config.data.train_batch_size * trainer.total_epochs
    end = f"{total} steps" if total is not None else f"{trainer.total_epochs} epochs"
    folder = resume_folder(trainer)
    if folder is None:
        start = "from the model on"
    else:
        start = f"{step_of(folder)} taken: resumes {restored(folder, _contents(config))}"
    saves = trainer.save_freq
    saved = (
        f"a checkpoint every {saves} steps" if saves > 0 else "no checkpoint (trainer.save_freq)"
    )
    return f"{end}, {start}; {saved}"


def _contents(config: DictConfig) -> Sequence[str]:
    return OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.load_contents")
