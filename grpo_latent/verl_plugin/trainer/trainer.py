"""Trainer mode `latent_sync`: verl's synchronous PPO trainer, made deterministic, resumable and loud for latents.

One training step, in verl's order (`PPOTrainer._step_once`); what this class adds stands to the right:

    dispatch prompts        ticketed, so that rollout batches do not depend on timing
    wait for groups         sorted; a failed rollout raises here
    old log-probs           dropped rows masked before it, replay gap checked after it
    reference log-probs
    advantages, update      `grpo_latent`
    save                    tracker written last, atomically
    weights to rollout
    validate, log           latent and reward metrics, use of the latents, rollout dump, report to the driver
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.boot import compat, metrics_file
from grpo_latent.verl_plugin.boot.registration import TRAINER_MODE, verify, verify_device
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer import step_rows as rows
from grpo_latent.verl_plugin.trainer.config_check import check_config
from grpo_latent.verl_plugin.trainer.latent_watch import LatentWatch
from grpo_latent.verl_plugin.trainer.replay_buffer import LatentReplayBuffer
from grpo_latent.verl_plugin.trainer.reports import Reporter
from grpo_latent.verl_plugin.trainer.usage_server import UsageServer
from grpo_latent.verl_plugin.trainer.wandb_board import make_board
from grpo_latent.verl_plugin.worker import gradients
from grpo_latent.verl_plugin.worker.treated_forward import STATE_ERRORS

# names in TransferQueue -> names in dumps
DUMP_FIELDS = {
    "prompts": "prompt_ids",
    "responses": "token_ids",
    "position_kinds": "kinds",
    "selected_idx": "selected_idx",
    "response_mask": "response_mask",
    "advantages": "advantages",
    "rollout_log_probs": "rollout_log_probs",
    "old_log_probs": "old_log_probs",
    "ref_log_prob": "ref_log_probs",
}
# all that a training worker reads of a row. The rest, texts and rewards' details, stays in TransferQueue: fetching every
# column, which is what verl does, took most of an update of a small model
WORKER_FIELDS = (
    "input_ids",
    "position_ids",
    "multi_modal_inputs",
    "position_kinds",
    "latent_embeds",
    "latent_aux",
    "selected_idx",
    "ref_latent_means",
    "prompts",
    "responses",
    "response_mask",
    "loss_mask",
    "old_log_probs",
    "ref_log_prob",
    "advantages",
    "rollout_is_weights",
)


@register_trainer(TRAINER_MODE)
class LatentPPOTrainer(PPOTrainerSync):
    """See the module."""

    def __init__(self, config):
        verify("trainer")
        verify_device("trainer", config.trainer.device)
        self.options = check_config(config)
        checkpoint.resume_folder(config.trainer)  # what cannot be resumed is refused before workers start
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # the base class branches on this literal
        super().__init__(config)
        self.reporter = Reporter()
        self.watch = LatentWatch(config, self.options)
        self.board = make_board(config)
        self.usage_server: UsageServer | None = None
        self.resumed_from = 0

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _build_replay_buffer(self) -> LatentReplayBuffer:
        return LatentReplayBuffer.adopt(super()._build_replay_buffer())

    def _init_resource_pool_mgr(self) -> None:
        import ray

        from grpo_latent.verl_plugin.worker.worker import LatentActorRolloutRefWorker

        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(LatentActorRolloutRefWorker)
        if compat.is_cpu():
            self.resource_pool_manager = compat.cpu_pool_manager(self.resource_pool_manager)

    def get_llm_client(self):
        from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient

        return self.llm_server_manager.get_client(LatentRolloutClient, servers=self.llm_server_manager.server_handles)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self, agent_loop_manager) -> None:
        self.replay_buffer.manager = agent_loop_manager
        trainer = self.config.trainer
        if not trainer.val_only:  # which takes no step, so it has no line to take back
            path = metrics_file.metrics_path(trainer.project_name, trainer.experiment_name)
            metrics_file.rewind_metrics(path, self.global_steps)
        if self.global_steps > 0 and not trainer.val_only:
            with open_dict(self.config):  # the run that saved this checkpoint has validated it
                trainer.val_before_train = False
        self.reporter.report("start", self.global_steps, self.total_training_steps, {})
        if self.global_steps == 0 and not trainer.val_before_train:
            self._measure_usage()  # drift is counted from here
        super().fit(agent_loop_manager)
        if self.board is not None:
            self.board.log_page(self.global_steps)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self._mask_dropped(batch)
        batch = super()._compute_old_log_prob(_for_workers(batch), metrics)
        names = ["rollout_log_probs", "old_log_probs", "response_mask"]
        names += ["position_kinds"] if self.options.act_kinds else []
        names += [STATE_ERRORS] if self.options.treatment.feeds_mean else []
        fields = self._fetch(batch, tuple(names))
        rollout, old, mask = (fields[n].unbind() for n in ("rollout_log_probs", "old_log_probs", "response_mask"))
        gap = rows.replay_gap(rollout, old, mask)
        metrics["latent/replay_logp_gap_max"] = gap.maximum
        metrics["latent/replay_logp_gap_mean"] = gap.mean
        if self.options.treatment.feeds_mean:
            metrics |= rows.state_error_metrics(fields[STATE_ERRORS].unbind())
        gap.check(self.options.replay_logp_gap_bound, self.global_steps, f"trajectory {batch.keys[gap.row]}")
        if self.options.act_kinds:
            acts = rows.act_masks(fields["position_kinds"].unbind(), mask, self.options.act_kinds)
            gap = rows.replay_gap(rollout, old, acts)
            metrics["latent/replay_density_gap_max"] = gap.maximum
            describe = f"latent log-density, trajectory {batch.keys[gap.row]}"
            gap.check(self.options.density_gap_bound, self.global_steps, describe, "latent.treatment.density_gap_bound")
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(_for_workers(batch), metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(_for_workers(batch), metrics)
        for name in [name for name in metrics if name.startswith("actor/latent/")]:  # verl puts `actor/` before all
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch

    def _mask_dropped(self, batch: KVBatchMeta) -> None:
        """Trajectories that the reward manager dropped act nowhere: no loss, and no part in their group's baseline."""
        fields = self._fetch(batch, ("extra_fields", "response_mask", "rm_scores"))
        dropped = [rows.is_dropped(extra) for extra in unwrap(fields["extra_fields"])]
        if not any(dropped):
            return
        keys = [key for key, drop in zip(batch.keys, dropped, strict=True) if drop]
        empty = [torch.zeros_like(m) for m, drop in zip(fields["response_mask"].unbind(), dropped, strict=True) if drop]
        nested = torch.nested.as_nested_tensor(empty, layout=torch.jagged)
        update = {"response_mask": nested, "loss_mask": nested.clone(), "rm_scores": nested.float()}
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(update, batch_size=len(keys)))

    def _compute_metrics(self, batch: KVBatchMeta, metrics, timing_raw, global_steps, epoch) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        fields = self._fetch(batch, ("extra_fields", "rm_scores"))
        extra_fields = unwrap(fields["extra_fields"])
        rewards_N = torch.stack([scores.sum() for scores in fields["rm_scores"].unbind()])
        metrics.update(rows.score_metrics(extra_fields, rewards_N))
        metrics.update(rows.latent_metrics(extra_fields))
        metrics.update(rows.latent_geometry(batch.keys, lambda keys: self._fetch_keys(keys, batch, "latent_embeds")))
        gradients.rename(metrics)
        metrics.update(rows.reward_metrics(extra_fields, rewards_N, [key.rsplit("_", 2)[0] for key in batch.keys]))
        if self.options.dump_every and global_steps % self.options.dump_every == 0:
            self._dump(batch, global_steps)
        line = self.watch.after_step(metrics)
        self.reporter.report("step", global_steps, self.total_training_steps, scalars(metrics))
        self.reporter.alarm(line, global_steps, self.total_training_steps)
        if self.watch.should_stop:
            self._stop_early()

    def _stop_early(self) -> None:
        """Ends training after this step, with a checkpoint of it."""
        trainer, is_last = self.config.trainer, self.global_steps >= self.total_training_steps
        is_saved = trainer.save_freq > 0 and (is_last or self.global_steps % trainer.save_freq == 0)
        if not is_saved:
            self._save_checkpoint()
        self.total_training_steps = self.global_steps  # the base class loops up to it

    def _measure_usage(self) -> dict[str, float]:
        if self.usage_server is None:
            servers = self.llm_server_manager.server_handles
            self.usage_server = UsageServer(self.config, self.actor_rollout_wg, servers)
        holding, is_start = self.usage_server.holding(self.global_steps), self.global_steps == 0
        router = self.reward_loop_manager.reward_router_address
        metrics, line = self.watch.measure(holding, self.val_dataset.dataframe, is_start, router)
        self.reporter.alarm(line, self.global_steps, self.total_training_steps)
        return metrics

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        metrics |= self._measure_usage()
        self.reporter.report("validation", self.global_steps, self.total_training_steps, scalars(metrics))
        return metrics

    def _val_metrics_update(self, data_sources, sample_uids, reward_infos, sample_turns, expected_acc_counts=None):
        kept = rows.without_dropped(data_sources, sample_uids, reward_infos, sample_turns, expected_acc_counts)
        metrics = super()._val_metrics_update(*kept.columns, expected_acc_counts=kept.expected_acc_counts)
        return metrics | {"val-aux/dropped_frac": kept.dropped_frac}

    def _dump(self, batch: KVBatchMeta, step: int) -> None:
        """All trajectories of the step by data row and index in the group."""
        columns = ("latent_embeds", "rm_scores", "extra_fields", "extra_info", "session_id", "reward_model")
        fields = self._fetch(batch, (*DUMP_FIELDS, *columns))
        extra_fields, infos = unwrap(fields["extra_fields"]), unwrap(fields["extra_info"])
        sessions = [int(session) for session in unwrap(fields["session_id"])]
        truths = [model.get("ground_truth") for model in unwrap(fields["reward_model"])]
        tensors = {name: fields[field].unbind() for field, name in DUMP_FIELDS.items() if field in fields.keys()}
        latent_rows, scores = fields["latent_embeds"].unbind(), fields["rm_scores"].unbind()
        records, latents = [], {}
        order = sorted(range(len(batch)), key=lambda i: (str(infos[i]["index"]).zfill(12), sessions[i]))
        for i in order:
            record = {"step": step, "id": f"{infos[i]['index']}/{sessions[i]}", "ground_truth": truths[i]}
            record["text"] = extra_fields[i]["solution_str"]
            record["stop_reason"] = extra_fields[i]["stop_reason"]
            record["sampling_log_probs"] = extra_fields[i]["sampling_log_probs"].tolist()
            record["reward"] = float(scores[i].sum())
            record["reward_terms"] = jsonable(extra_fields[i].get("reward_extra_info", {}))
            record |= {name: rows_of[i].tolist() for name, rows_of in tensors.items()}
            records.append(record)
            latents[record["id"]] = latent_rows[i]
        folder = self.options.dump_dir or Path(self.config.trainer.default_local_dir) / "rollouts"
        rows.dump_rollouts(folder, step, records, latents)
        if self.board is not None:
            self.board.log_rollouts(step, records, [extra_fields[i]["latent"] for i in order])

    def _fetch(self, batch: KVBatchMeta, names: tuple[str, ...]) -> TensorDict:
        return self._fetch_keys(batch.keys, batch, *names)

    @staticmethod
    def _fetch_keys(keys: list[str], batch: KVBatchMeta, *names: str) -> TensorDict:
        return tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(names))

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """verl's layout; the tracker names a checkpoint only once all of it is on disk."""
        trainer = self.config.trainer
        root = Path(trainer.default_local_dir)
        checkpoint.make_room(root, self.global_steps, self.resumed_from)
        folder = root / f"{checkpoint.STEP_PREFIX}{self.global_steps}"
        remote = trainer.default_hdfs_dir and f"{trainer.default_hdfs_dir}/{folder.name}/actor"
        self.actor_rollout_wg.save_checkpoint(str(folder / "actor"), remote, self.global_steps, max_ckpt_to_keep=None)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.train_dataloader.state_dict(), folder / "data.pt")
        self.watch.save(folder)
        checkpoint.write_tracker(root, self.global_steps)
        checkpoint.prune(root, trainer.get("max_actor_ckpt_to_keep", None))
        self.checkpoint_callback.on_save(
            trainer=self, global_step=self.global_steps, checkpoint_dir=str(folder), async_save=False
        )

    def _load_checkpoint(self) -> None:
        trainer = self.config.trainer
        folder = checkpoint.resume_folder(trainer)
        if folder is not None:
            self._check_world_size(folder)
            if trainer.resume_mode == "resume_path":  # verl would choke on a slash at its end
                trainer.resume_from_path = str(folder)
        super()._load_checkpoint()
        self.resumed_from = self.global_steps
        for note in self.watch.load(folder) if folder is not None else []:
            print(f"resume: {note}", flush=True)

    def _check_world_size(self, folder: Path) -> None:
        path = folder / "actor" / "fsdp_config.json"
        if not path.is_file():
            raise CheckpointError(
                "not a checkpoint", where=str(folder), got="no actor/fsdp_config.json", expected="one"
            )
        saved = json.loads(path.read_text())["world_size"]
        if saved != self.actor_rollout_wg.world_size:
            raise CheckpointError(
                "saved at another world size",
                where=str(folder),
                got=saved,
                expected=str(self.actor_rollout_wg.world_size),
                fix="Resume at the saved world size, or start anew from actor/huggingface as model.path.",
            )


def _for_workers(batch: KVBatchMeta) -> KVBatchMeta:
    """The batch, to be sent to workers: those of `WORKER_FIELDS` that it has."""
    batch.fields = list(WORKER_FIELDS)
    return batch


def unwrap(column) -> list:
    """A column of Python objects as TransferQueue returns it, as a list."""
    return [getattr(value, "data", value) for value in column]


def scalars(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if hasattr(value, "__float__")}


def jsonable(values: dict) -> dict:
    """Numbers as they are, everything else as text."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in values.items()}
