"""verl's vLLM backend: how it is imported, and what `vllm_latent` leans on in it.

Importing this module imports vllm, so only processes of rollout backend `vllm_latent` do.
"""

from __future__ import annotations

from grpo_latent import torchvision_ops
from grpo_latent.rollout.vllm.supported import name_the_cpu_build
from grpo_latent.verl_plugin.boot.seams import Seam

_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer"
_WORKER = "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension"

VLLM_SEAMS = (
    Seam(
        "vLLM server",
        f"{_SERVER}.__init__",
        "subclassed: serves groups",
        (
            "self",
            "config",
            "model_config",
            "rollout_mode",
            "workers",
            "replica_rank",
            "node_rank",
            "gpus_per_node",
            "nnodes",
            "cuda_visible_devices",
            "disaggregation_role",
            "disaggregation_kv_transfer_config",
        ),
    ),
    Seam(
        "vLLM server: lengths",
        f"{_SERVER}._validate_configs",
        "max_model_len is set before it",
        ("self",),
    ),
    Seam(
        "vLLM server: arguments",
        f"{_SERVER}._preprocess_engine_kwargs",
        "worker, scheduler and latent options join vLLM's arguments",
        ("self", "engine_kwargs"),
    ),
    Seam(
        "vLLM server: extension", f"{_SERVER}._get_worker_extension_cls", "names ours", ("self",)
    ),
    Seam(
        "vLLM server: start",
        f"{_SERVER}.launch_server",
        "called by the CPU replica, without arguments",
        ("self", "master_address", "master_port", "dp_rpc_port"),
    ),
    Seam(
        "vLLM server: address",
        f"{_SERVER}.get_server_address",
        "called by the CPU replica",
        ("self",),
    ),
    Seam(
        "vLLM server: version",
        f"{_SERVER}.set_global_steps",
        "the adapter calls it after each update of the weights",
        ("self", "global_steps"),
    ),
    Seam(
        "vLLM replica",
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMReplica.launch_servers",
        "replaced on CPU: it asks workers for their accelerator",
        ("self",),
    ),
    Seam(
        "vLLM adapter",
        "verl.workers.rollout.vllm_rollout:ServerAdapter.update_weights",
        "sends weights over shared memory where the platform has no IPC",
        ("self", "weights", "global_steps", "wire_format", "kwargs"),
    ),
    Seam(
        "vLLM worker: weights",
        f"{_WORKER}.update_weights_from_ipc",
        "replaced on CPU: packed weights are reloaded as a whole",
        ("self", "peft_config", "base_sync_done", "use_shm"),
    ),
    Seam(
        "vLLM worker: address",
        f"{_WORKER}._get_zmq_handle",
        "where the adapter sends from",
        ("self",),
    ),
    Seam(
        "vLLM worker: masks",
        f"{_WORKER}.monkey_patch_model",
        "replaced: masked logits would change the log-probs that replay compares",
        ("self", "vocab_size", "banned_token_ids"),
    ),
    Seam(
        "weight transfer",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights",
        "the receiving end on CPU",
        ("self", "on_bucket_received"),
    ),
)


torchvision_ops.install()
name_the_cpu_build()  # verl asks for the version of `vllm`

from verl.workers.rollout.vllm_rollout import ServerAdapter  # noqa: E402
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import (  # noqa: E402
    BucketedWeightReceiver,
)
from verl.workers.rollout.vllm_rollout.utils import (  # noqa: E402
    patch_vllm_moe_model_weight_loader,
    vLLMColocateWorkerExtension,
)

__all__ = [
    "VLLM_SEAMS",
    "BucketedWeightReceiver",
    "ServerAdapter",
    "patch_vllm_moe_model_weight_loader",
    "vLLMColocateWorkerExtension",
]
