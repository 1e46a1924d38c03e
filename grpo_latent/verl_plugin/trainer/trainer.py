"""Trainer mode `latent_sync`: verl's synchronous trainer, repeatable, resumable, loud for latents.

One training step, in verl's order (`PPOTrainer._step_once`); what this class adds stands to the
right:

    dispatch prompts        ticketed, so that rollout batches do not depend on timing
    wait for groups         sorted; a failed rollout raises here
    balance over ranks      whole groups, which share their prompt in a micro-batch
    old log-probs           dropped rows masked before it, replay gap checked after it
    reference log-probs
    advantages, update      `grpo_latent`
    save                    not yet named by the tracker
    weights to rollout
    validate, log           latent and reward metrics, usage, rollout dump; alarms, back to a good
                            checkpoint or the best one kept; report to the driver
    commit                  manifest, then the tracker, atomically; callbacks of the save
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.seqlen_balancing import log_seqlen_unbalance

from grpo_latent.common.best_checkpoint import Best
from grpo_latent.common.files import remove_unfinished
from grpo_latent.common.step_folders import step_of
from grpo_latent.verl_plugin.boot import compat, metrics_file
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch
from grpo_latent.verl_plugin.boot.registration import TRAINER_MODE, verify, verify_device
from grpo_latent.verl_plugin.boot.renamed import take_new_names
from grpo_latent.verl_plugin.rollout.apart import ApartServers
from grpo_latent.verl_plugin.trainer.alarms import Line
from grpo_latent.verl_plugin.trainer.commit import check_checkpoint
from grpo_latent.verl_plugin.trainer.committing_trainer import CommittingTrainer
from grpo_latent.verl_plugin.trainer.config_check import check_config
from grpo_latent.verl_plugin.trainer.console_line import held_out, held_out_names
from grpo_latent.verl_plugin.trainer.dropped import mask_dropped, without_dropped
from grpo_latent.verl_plugin.trainer.helpers import helpers_first
from grpo_latent.verl_plugin.trainer.latent_watch import LatentWatch, as_metrics
from grpo_latent.verl_plugin.trainer.replay_buffer import LatentReplayBuffer
from grpo_latent.verl_plugin.trainer.replay_gap import check_replay, replay_columns
from grpo_latent.verl_plugin.trainer.rollout_dump import dump_step
from grpo_latent.verl_plugin.trainer.spread import held_out_error
from grpo_latent.verl_plugin.trainer.step_metrics import step_metrics
from grpo_latent.verl_plugin.trainer.step_rows import (
    StepRows,
    for_workers,
    number_rows,
    whole_groups,
)
from grpo_latent.verl_plugin.trainer.usage_server import UsageServer
from grpo_latent.verl_plugin.trainer.wandb_board import make_board
from grpo_latent.verl_plugin.worker import gradients

SKIPPED = "actor/skipped_updates"


@register_trainer(TRAINER_MODE)
class LatentPPOTrainer(CommittingTrainer):
    """See the module."""

    replay_buffer: LatentReplayBuffer

    def __init__(self, config):
        verify("trainer")
        verify_device("trainer", config.trainer.device)
        # again, beside the driver's: a config may come from verl's own command
        for note in take_new_names(config):
            print(f"warning: {note}")
        super().__init__(config, check_config(config))
        self._enable_hybrid_replicas = self.options.placement == "beside"  # verl's name for it
        self.watch = LatentWatch(config, self.options)
        self.board = make_board(config)
        self.usage_server: UsageServer | None = None

    # ---- parts ----------------------------------------------------------------------------------

    def _build_replay_buffer(self) -> LatentReplayBuffer:
        buffer = LatentReplayBuffer.adopt(super()._build_replay_buffer())
        buffer.watch = ActorWatch(grace_s=0.0, killed_grace_s=0.0)
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        import ray

        from grpo_latent.verl_plugin.worker.worker import LatentActorRolloutRefWorker

        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(LatentActorRolloutRefWorker)
        if compat.is_cpu():
            self.resource_pool_manager = compat.cpu_pool_manager(self.resource_pool_manager)

    def _setup(self) -> None:
        with helpers_first(self.config) as self._helpers:
            super()._setup()
        if not self._enable_hybrid_replicas:
            ApartServers(self.config, self.actor_rollout_wg).serve(self)

    def get_llm_client(self):
        from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient

        return self.llm_server_manager.get_client(
            LatentRolloutClient, servers=self.llm_server_manager.server_handles
        )

    # ---- the loop -------------------------------------------------------------------------------

    def fit(self, agent_loop_manager) -> None:
        self.replay_buffer.manager = agent_loop_manager
        trainer = self.config.trainer
        if not trainer.val_only:  # which takes no step, so it has no line to take back
            path = metrics_file.metrics_path(trainer.project_name, trainer.experiment_name)
            metrics_file.rewind_metrics(path, self.global_steps)
            for folder in {path.parent, self._dump_folder, self.guards.root}:
                remove_unfinished(folder)
        if self.global_steps > 0 and not trainer.val_only:
            with open_dict(self.config):  # the run that saved this checkpoint has validated it
                trainer.val_before_train = False
        self.reporter.report("start", self.global_steps, self.total_training_steps, {})
        if self.global_steps == 0 and not trainer.val_before_train:
            self._measure_usage()  # drift is counted from here
        super().fit(agent_loop_manager)
        if self.board is not None:
            self.board.log_page(self.global_steps)

    def _balance_batch(
        self, batch: KVBatchMeta, metrics, logging_prefix="global_seqlen", keep_minibatch=False
    ) -> KVBatchMeta:
        workers, lengths = self.actor_rollout_wg, [tag["seq_len"] for tag in batch.tags]
        if "actor" not in workers._dispatch_info:  # asked once, as by verl
            workers._dispatch_info["actor"] = workers._query_dispatch_info("actor")
        num_ranks = max(workers._dispatch_info["actor"]) + 1
        is_full = len(batch) % self._get_required_batch_multiple(num_ranks) == 0
        # verl tears groups apart between ranks: they would share their prompt only in part
        shares = self.options.share_prompt and is_full
        parts = whole_groups(batch.keys, lengths, num_ranks) if shares else None
        if parts is None:
            return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        batch.reorder([row for part in parts for row in part])
        metrics.update(log_seqlen_unbalance(lengths, parts, logging_prefix))
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        mask_dropped(batch)
        number_rows(batch)
        batch = super()._compute_old_log_prob(for_workers(batch, self.global_steps), metrics)
        rows = StepRows(batch, replay_columns(self.options))
        metrics.update(check_replay(rows, self.options, self.global_steps))
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(for_workers(batch, self.global_steps), metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(for_workers(batch, self.global_steps), metrics)
        self._count_skipped(metrics)
        # verl puts `actor/` before all that a loss reports
        for name in [name for name in metrics if name.startswith("actor/latent/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch

    def _count_skipped(self, metrics: dict) -> None:
        """Makes the mean over a step's updates a count, and says it on the console."""
        actor, data = self.config.actor_rollout_ref.actor, self.config.data
        num_updates = data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
        skipped = round(metrics.get(SKIPPED, 0.0) * num_updates)
        metrics[SKIPPED] = float(skipped)
        if skipped:
            text = f"{skipped} of {num_updates} updates skipped: the gradient's norm overflows"
            line = Line("skipped", text)
            self.reporter.say([line], self.global_steps, self.total_training_steps)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics, timing_raw, global_steps, epoch
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        metrics.update(step_metrics(batch))
        gradients.rename(metrics)
        if self.options.dump_every and global_steps % self.options.dump_every == 0:
            self._dump(batch, global_steps)
        lines = self.guards.after_step(metrics)
        reasons = self.guards.reasons_to_go_back(global_steps >= self.total_training_steps)
        if reasons:
            lines.append(self._roll_back(metrics, reasons))
        elif self.guards.is_best(held_out(metrics)):
            self._keep_best(metrics)
        self.reporter.report("step", global_steps, self.total_training_steps, scalars(metrics))
        self.reporter.say(lines, global_steps, self.total_training_steps)
        if self.guards.should_stop:
            self._stop_early()

    def _stop_early(self) -> None:
        """Ends training after this step, with a checkpoint of it."""
        if self._saved_step != self.global_steps:
            self._save_between()
        self.total_training_steps = self.global_steps  # the base class loops up to it

    def _keep_best(self, metrics: dict) -> None:
        """Names this step's checkpoint as the best one; saves it where verl has not."""
        is_extra = self._saved_step != self.global_steps
        if is_extra:
            self._save_between()
        score = held_out(metrics)
        assert score is not None, "`is_best` takes no other"
        names = ", ".join(held_out_names(metrics))
        self.guards.keep(Best.of_step(self.global_steps, float(score), names), is_extra)

    def _save_between(self) -> None:
        """Saves after the weights went to the rollout: it sleeps meanwhile, as in verl's save."""
        self.checkpoint_manager.sleep_replicas()
        self._save_checkpoint()
        self.checkpoint_manager.update_weights(self.global_steps)

    def _roll_back(self, metrics: dict, reasons: list[str]) -> Line:
        """Goes back to the last good weights and optimizer, with smaller learning rates.

        Step counter and data go on: a run takes its number of steps, its log has each once, and
        the rows that it fell on are not the next ones again (as PaLM's restarts, 2204.02311,
        section 5.1). What it went back to is saved as this step, so resuming is the ordinary one.
        """
        folder = self.guards.last_good
        if folder is None:
            return self.guards.give_up()
        step = step_of(folder)
        assert step is not None, "good checkpoints are named after steps"
        check_checkpoint(folder, self.actor_rollout_wg, self.options)
        self.checkpoint_manager.sleep_replicas()
        # not deleted: a later alarm may go back to it, too
        self.actor_rollout_wg.load_checkpoint(
            local_path=str(folder / "actor"), del_local_after_load=False
        )
        self.actor_rollout_wg.scale_learning_rate(self.guards.go_back(folder))
        self._save_checkpoint()
        self.checkpoint_manager.update_weights(self.global_steps)
        metrics |= {
            "latent/rolled_back_to": float(step),
            "latent/rollbacks": float(self.guards.rollbacks),
            "latent/lr_factor": self.guards.lr_factor,
        }
        return self.guards.rollback_line(step, reasons)

    def _measure_usage(self) -> dict[str, float]:
        if self.usage_server is None:
            servers = self.llm_server_manager.server_handles
            self.usage_server = UsageServer(self.config, self.actor_rollout_wg, servers)
        holding, is_start = self.usage_server.holding(self.global_steps), self.global_steps == 0
        router = self.reward_loop_manager.reward_router_address
        usage = self.watch.measure(holding, self.val_dataset.dataframe, is_start, router)
        if usage is None:
            return {}
        lines = self.guards.alarms.after_usage(usage)
        self.reporter.say(lines, self.global_steps, self.total_training_steps)
        return as_metrics(usage)

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        score = held_out(metrics)
        lines = self.guards.alarms.after_validation(score, metrics["val-aux/standard_error"])
        self.reporter.say(lines, self.global_steps, self.total_training_steps)
        if self.global_steps == 0 and self.guards.is_best(score):
            assert score is not None, "`is_best` takes no other"
            start = self.config.actor_rollout_ref.model.path
            names = ", ".join(held_out_names(metrics))
            self.guards.keep(Best(0, float(score), names, start))
            self.guards.name_best()
        metrics |= self._measure_usage()
        self.reporter.report(
            "validation", self.global_steps, self.total_training_steps, scalars(metrics)
        )
        return metrics

    def _val_metrics_update(
        self, data_sources, sample_uids, reward_infos, sample_turns, expected_acc_counts=None
    ):
        kept = without_dropped(
            data_sources, sample_uids, reward_infos, sample_turns, expected_acc_counts
        )
        metrics = super()._val_metrics_update(
            *kept.columns, expected_acc_counts=kept.expected_acc_counts
        )
        sources, uids, infos, _ = kept.columns
        return metrics | {
            "val-aux/dropped_frac": kept.dropped_frac,
            "val-aux/standard_error": held_out_error(sources, uids, infos),
        }

    def _dump(self, batch: KVBatchMeta, step: int) -> None:
        records, summaries = dump_step(batch, step, self._dump_folder)
        if self.board is not None:
            self.board.log_rollouts(step, records, summaries)

    @property
    def _dump_folder(self) -> Path:
        default = Path(self.config.trainer.default_local_dir) / "rollouts"
        return Path(self.options.dump_dir or default)


def scalars(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if hasattr(value, "__float__")}
