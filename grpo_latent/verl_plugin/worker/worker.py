"""Ray workers: verl's, with the latent engine, one thread a process on CPU, and gloo."""

from __future__ import annotations

import os
import random
from functools import partial

import numpy as np
import ray
import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from grpo_latent.common.listeners import listen_on
from grpo_latent.common.manifest import Entries, check_files
from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import NAME, verify
from grpo_latent.verl_plugin.worker.engine import LatentFSDPEngine
from grpo_latent.verl_plugin.worker.group_images import GroupImages
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss
from grpo_latent.verl_plugin.worker.learning_rate import scale_learning_rate
from grpo_latent.verl_plugin.worker.parts import share_of

# verl's dispatch modes are attributes that it adds when it is imported
ONE_TO_ALL: int = Dispatch.ONE_TO_ALL  # type: ignore[attr-defined]


def prepare_process(options: LatentOptions) -> None:
    """Selects the latent engine and where its collectives listen; idempotent.

    On CPU it also limits threads and starts gloo.
    """
    # verl looks an engine up by (device, vendor) before it does by device: so ours is taken on
    # GPUs, too, where verl has one of its own
    os.environ["VERL_ENGINE_VENDOR"] = NAME
    listen_on(ray.util.get_node_ip_address())
    if compat.is_cpu():
        # OpenMP's threads spin while they wait: on shared cores runs were ten times slower
        torch.set_num_threads(options.cpu_threads)
        compat.init_cpu_process_group()


def seed_process(seed: int, rank: int) -> None:
    """Starts all generators from a fixed seed.

    Checkpoints hold the generators' states: so a resumed run ends with those of an uninterrupted
    one.
    """
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed * 1000 + rank) % 2**32)
    torch.manual_seed(seed * 1000 + rank)


class LatentTrainingWorker(TrainingWorker):
    """One model of one role on one rank."""

    def __init__(
        self,
        config,
        options: LatentOptions | None = None,
        freeze_vision: bool = False,
        group_images: GroupImages | None = None,
    ):
        verify(f"training worker, rank {os.environ.get('RANK', 0)}")
        options = options or LatentOptions()
        prepare_process(options)
        super().__init__(config)
        if not isinstance(self.engine, LatentFSDPEngine):
            raise PluginError(
                "verl built another engine",
                where="training worker",
                got=type(self.engine).__name__,
                expected=f"{LatentFSDPEngine.__name__}, as VERL_ENGINE_VENDOR={NAME} chooses it",
                fix="Set actor_rollout_ref.actor.strategy=fsdp2, and the reference's.",
            )
        self.engine.configure(options, freeze_vision, group_images)


class LatentActorRolloutRefWorker(ActorRolloutRefWorker):
    """Actor, reference and rollout adapter of one rank."""

    def __init__(self, config, role, distillation_config=None, **kwargs):
        verify(f"{role} worker, rank {os.environ.get('RANK', 0)}")
        options = LatentOptions.from_rollout(config.rollout)
        prepare_process(options)
        seed_process(options.seed, int(os.environ.get("RANK", 0)))
        # verl 0.9.1 has `freeze_vision_tower` in its config and reads it nowhere; the merger is
        # frozen with the tower
        freeze_vision = bool(config.actor.get("freeze_vision_tower", False))
        make = partial(
            LatentTrainingWorker,
            options=options,
            freeze_vision=freeze_vision,
            group_images=GroupImages(),  # one for actor and reference
        )
        # verl calls them and asks nothing else of them: a class is not needed
        self.actor_worker_cls = make  # type: ignore[assignment]
        self.ref_worker_cls = make  # type: ignore[assignment]
        super().__init__(config, role, distillation_config, **kwargs)
        self.options = options

    @register(dispatch_mode=ONE_TO_ALL, blocking=False)
    async def send_weights_to(self, servers: list, policy_version: int):
        """Sends the actor's weights to servers with engine hf; every rank gathers with it."""
        from grpo_latent.verl_plugin.rollout.replica import send_weights

        weights, _ = self._latent_engine().get_per_tensor_param()
        if torch.distributed.get_rank() == 0:
            await send_weights(servers, weights, self.config.rollout, policy_version)
        else:
            # each weight is gathered by all ranks together, for the one that sends it
            for _ in weights:
                pass

    @register(dispatch_mode=ONE_TO_ALL)
    def scale_learning_rate(self, factor: float) -> None:
        """Multiplies the actor's learning rates, those of its schedule too."""
        engine = self._latent_engine()
        scale_learning_rate(engine.optimizer, engine.lr_scheduler, factor)

    @register(dispatch_mode=ONE_TO_ALL)
    def digest_parts(self) -> Entries:
        """Digests of the files below `actor` that this rank has written in the last save."""
        parts = self._latent_engine().parts
        assert parts is not None, "asked after a save"
        return parts.result()

    @register(dispatch_mode=ONE_TO_ALL)
    def check_parts(self, folder: str, entries: Entries) -> None:
        """Compares this rank's share of the files below `actor` with the manifest's entries."""
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        share = share_of(entries, rank, num_ranks)
        check_files(folder, share, self.options.verify_digests)

    def _latent_engine(self) -> LatentFSDPEngine:
        assert self.actor is not None, "the trainer asks the actor's workers only"
        engine = self.actor.engine
        assert isinstance(engine, LatentFSDPEngine), "checked when it was built"
        return engine

    @register(dispatch_mode=ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        if self.actor is not None:
            actor, options = self.config.actor, self.options
            loss = LatentLoss(
                self.loss_fn,
                options.terms,
                options.act_kinds,
                actor.loss_agg_mode,
                actor.get("loss_scale_factor", None),
                options.treatment,
            )
            self.actor.set_loss_fn(loss)
