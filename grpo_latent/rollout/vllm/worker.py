"""Runs latents in vLLM's worker: the stock one, with hooks in its model runner."""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.v1.worker.gpu_worker import Worker

from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.registry import BACKBONES
from grpo_latent.common.listeners import bind_stores
from grpo_latent.errors import PluginError
from grpo_latent.rollout.vllm.contract import check_symbols
from grpo_latent.rollout.vllm.model import register_latent_model
from grpo_latent.rollout.vllm.skeleton import check_pixels, worker_options
from grpo_latent.rollout.vllm.steps import LatentSteps
from grpo_latent.rollout.vllm.supported import (
    ENGINE_HF,
    RUNNERS,
    check_builds,
    check_version,
    check_vllm_config,
)
from grpo_latent.rollout.vllm.wire import digest, pack


class LatentWorker(Worker):
    """vLLM's worker, which also gives out records and takes weights."""

    def init_device(self) -> None:
        bind_stores()
        is_v2 = self.use_v2_model_runner
        check_version(vllm.__version__)
        check_symbols(is_v2)
        model_type = self.vllm_config.model_config.hf_config.model_type
        backbone = BACKBONES.get(model_type, Backbone)
        check_builds(model_type, backbone.vllm_cannot_build, vllm.__version__)
        check_vllm_config(self.vllm_config)
        check_pixels(self.vllm_config)
        model_config = self.vllm_config.model_config
        register_latent_model(model_config.architecture)
        if not is_v2 and not model_config.is_multimodal_model:
            # makes this runner feed vectors; here, not as an option of vLLM, so that a server does
            # not begin to take tensors from its clients
            model_config.enable_prompt_embeds = True
        super().init_device()
        got = f"{type(self.model_runner).__module__}.{type(self.model_runner).__qualname__}"
        if got not in RUNNERS[is_v2]:
            raise PluginError(
                "vLLM made another model runner",
                where="worker",
                got=got,
                expected=" or ".join(RUNNERS[is_v2]),
                fix=f"Use stock vLLM on CPU or CUDA, or {ENGINE_HF}.",
            )

    def load_model(self, *args: object, **kwargs: object) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        model = runner.get_model()
        if not getattr(type(model), "is_latent", False):
            raise PluginError(
                "vLLM built its own model class",
                where="worker",
                got=type(model).__qualname__,
                expected="the class that register_latent_model registered",
                fix="Leave model_impl and the registry of models as they are.",
            )
        parameters = model.latent_parameters
        model_config = self.vllm_config.model_config
        parameters.check_loaded(model_config.model)
        # after the weights and outside their memory pool, which level 2 of sleep throws away
        self.latent_steps = LatentSteps(
            worker_options(self.vllm_config),
            parameters.modules,
            lambda ids: model.embed_input_ids(ids),
            num_seats=self.vllm_config.scheduler_config.max_num_seqs,
            max_length=model_config.max_model_len,
            hidden_size=model_config.get_inputs_embeds_size(),
            dtype=model_config.dtype,
            device=self.device,
        )
        if self.use_v2_model_runner:
            # imports what needs Triton
            from grpo_latent.rollout.vllm.model_state import install
        else:
            from grpo_latent.rollout.vllm.runner import install
        install(runner, self.latent_steps)

    def latent_pop(self, keys: list[str] | None = None) -> dict[str, Any]:
        """Records of finished requests by key, as bytes; of other ranks than 0 their digests.

        Tensors inside an RPC's answer do not survive multi-processing.
        """
        packed = {
            key: {name: pack(tensor) for name, tensor in record.items()}
            for key, record in self.latent_steps.table.pop(keys).items()
        }
        if self.rank == 0:
            return packed
        return {key: digest(record) for key, record in packed.items()}

    def latent_stats(self) -> dict[str, int]:
        """Counters and leftovers, for tests and for `VllmRolloutEngine.stats`.

        `num_replayed_rows`: completion positions fed again, after preemption or in chunks;
        `num_seats` in use; `num_records` that no one has popped.
        """
        steps = self.latent_steps
        return {
            "num_replayed_rows": steps.num_replayed_rows,
            "num_seats": len(steps.table.seats),
            "num_records": len(steps.table.records),
        }

    @torch.no_grad()
    def latent_reload(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights, through vLLM's own repacking."""
        self.model_runner.reload_weights(weights_iterator=iter(weights))


class LatentGPUWorker(LatentWorker):
    """`worker_cls` of vLLM on CUDA."""
