"""verl's synchronous trainer, with steps that are all or nothing: saved, committed, resumed.

Which order that is, `commit` draws; what lies on disk, `checkpoint`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tracking import Tracking

from grpo_latent.common.files import replacing_file
from grpo_latent.common.pickles import without_code
from grpo_latent.common.step_folders import step_of
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer.alarms import Line
from grpo_latent.verl_plugin.trainer.commit import (
    DATA_FILE,
    CommittingLogger,
    check_checkpoint,
    sync_outputs,
    write_manifest,
)
from grpo_latent.verl_plugin.trainer.guards import Guards
from grpo_latent.verl_plugin.trainer.reports import Reporter


class CommittingTrainer(PPOTrainerSync):
    """Saves, commits and loads checkpoints of whole steps.

    Attributes:
        resumed_from: the step of the checkpoint that the run goes on from, 0 without one.
        is_resumed: whether there is one: it may be that of step 0.
    """

    def __init__(self, config: DictConfig, options: LatentOptions):
        checkpoint.resume_folder(config.trainer)  # refuses before workers start, and gives nothing
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # the base class branches on this literal
        super().__init__(config)
        self.options = options
        self.reporter = Reporter()
        self.guards = Guards(options, config.trainer)
        self.resumed_from = 0
        self.is_resumed = False
        self._saved_step: int | None = None
        self._pending: Path | None = None  # a checkpoint that the tracker does not name yet

    @property  # type: ignore[override]  # the base class sets it, and calls `log`
    def logger(self) -> CommittingLogger:
        """verl's loggers, which verl's `fit` makes; a step's log is followed by its commit."""
        return self._logger

    @logger.setter
    def logger(self, tracking: Tracking) -> None:
        self._logger = CommittingLogger(tracking, self._commit, self.resumed_from)

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if self.guards.settings.rollback and self.global_steps == 1 and not self.is_resumed:
            self._save_step(0)  # what a run falls back to before its first save
            self._commit()  # its validation is logged

    def _save_checkpoint(self) -> None:
        self._save_step(self.global_steps)

    def _save_step(self, step: int) -> None:
        """verl's layout; `_commit` names it in the tracker."""
        trainer = self.config.trainer
        root = Path(trainer.default_local_dir)
        if self._pending is not None:  # saved twice in a step: its digests may still be made
            self.actor_rollout_wg.digest_parts()
        checkpoint.begin_tracker(root)
        checkpoint.make_room(root, step, self.resumed_from)
        folder = root / f"{checkpoint.STEP_PREFIX}{step}"
        remote = trainer.default_hdfs_dir and f"{trainer.default_hdfs_dir}/{folder.name}/actor"
        # verl keeps all of them: old ones go once this one is committed (`prune`)
        self.actor_rollout_wg.save_checkpoint(
            str(folder / "actor"), remote, step, max_ckpt_to_keep=None
        )
        # a file, not a path: torch would write its random name into the archive
        with replacing_file(folder / DATA_FILE) as unfinished, unfinished.open("wb") as file:
            torch.save(self.train_dataloader.state_dict(), file)
        self._pending, self._saved_step = folder, step

    def _commit(self) -> None:
        """Names the step's checkpoint in the tracker, if it has one; see `commit`."""
        folder, self._pending = self._pending, None
        if folder is None:
            return
        assert self._saved_step is not None, "set with the folder"
        for dump in self._dump_futures:
            dump.result()
        self.logger.flush()
        sync_outputs(self.config.trainer, self._saved_step)
        self.guards.save(folder)
        write_manifest(folder, self.actor_rollout_wg.digest_parts())
        checkpoint.write_tracker(self.guards.root, self._saved_step)
        self._follow_commit(folder)

    def _follow_commit(self, folder: Path) -> None:
        """Does what comes after the tracker; again on resume: a kill may have come before it."""
        step = step_of(folder)
        assert step is not None, "checkpoints are named after steps"
        self.guards.name_best()
        self.guards.remove_superseded(step)
        keep = self.config.trainer.get("max_actor_ckpt_to_keep", None)
        checkpoint.prune(self.guards.root, keep, self.guards.pinned)
        self.checkpoint_callback.on_save(
            trainer=self, global_step=step, checkpoint_dir=str(folder), async_save=False
        )

    def _load_checkpoint(self) -> None:
        trainer = self.config.trainer
        folder = checkpoint.resume_folder(trainer)
        notes = []
        if folder is not None:
            notes = check_checkpoint(folder, self.actor_rollout_wg, self.options)
            if trainer.resume_mode == "resume_path":  # verl would choke on a slash at its end
                trainer.resume_from_path = str(folder)
        with without_code(self.options.trust_pickles):
            super()._load_checkpoint()
        self.resumed_from, self.is_resumed = self.global_steps, folder is not None
        if folder is None:
            self.guards.begin()
            return
        contents = self.config.actor_rollout_ref.actor.checkpoint.load_contents
        lines = [Line(f"resumed from {folder.name}", checkpoint.restored(folder, contents))]
        lines += [Line("resume", note) for note in [*notes, *self.guards.load(folder)]]
        self.reporter.say(lines, self.global_steps, self.total_training_steps)
        # the tracker's own, not a step that is gone back to
        if trainer.resume_mode == "auto" and not trainer.val_only:
            self._follow_commit(folder)
