"""Worker classes, `worker_cls` of vLLM: a stock worker whose V1 runner has the latent hooks."""

from __future__ import annotations

import torch
import vllm
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from grpo_latent.errors import PluginError
from grpo_latent.rollout.vllm.compat import check_symbols, check_version, check_vllm_config
from grpo_latent.rollout.vllm.model import register_latent_model
from grpo_latent.rollout.vllm.runner import install
from grpo_latent.rollout.vllm.skeleton import worker_options
from grpo_latent.rollout.vllm.wire import pack


class _LatentWorker:
    runner_class: type

    def init_device(self):
        check_version(vllm.__version__)
        check_symbols()
        check_vllm_config(self.vllm_config)
        register_latent_model(self.vllm_config.model_config.architecture)
        super().init_device()
        if type(self.model_runner) is not self.runner_class:
            raise PluginError(
                "vLLM chose another model runner",
                where="worker",
                got=type(self.model_runner).__qualname__,
                expected=self.runner_class.__qualname__,
                fix="Set VLLM_USE_V2_MODEL_RUNNER=0.",
            )

    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        if not getattr(type(self.model_runner.get_model()), "is_latent", False):
            raise PluginError(
                "vLLM had resolved its own model class before this worker started",
                where="worker",
                got="a worker process of its own, as under vllm serve",
                expected="vLLM in the process of VllmRolloutEngine",
                fix="Use LatentLLM(folder, engine='vllm'); serving over HTTP is not supported yet.",
            )
        self.model_runner.get_model().latent_parameters.check_loaded(self.vllm_config.model_config.model)
        install(self.model_runner, worker_options(self.vllm_config))

    def latent_pop(self, keys: list[str] | None = None) -> dict[str, dict]:
        """Records of finished requests by key, as bytes: tensors inside an RPC's answer do not survive multi-processing."""
        records = self.model_runner.latent_table.pop(keys)
        return {key: {name: pack(tensor) for name, tensor in record.items()} for key, record in records.items()}

    def latent_stats(self) -> dict[str, int]:
        """`num_replayed_rows`: completion positions fed again, after preemption or in chunks; `num_slots` in use."""
        runner = self.model_runner
        return {"num_replayed_rows": runner.num_replayed_rows, "num_slots": len(runner.latent_table.slots)}

    @torch.no_grad()
    def latent_reload(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights, through vLLM's own repacking."""
        self.model_runner.reload_weights(weights_iterator=iter(weights))


class LatentCPUWorker(_LatentWorker, CPUWorker):
    runner_class = CPUModelRunner


class LatentGPUWorker(_LatentWorker, Worker):
    runner_class = GPUModelRunner
