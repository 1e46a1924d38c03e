"""`worker_cls` of vLLM on CPU.

A module of its own: vLLM's CPU worker, when imported, replaces CUDA streams, events and pinned
memory in this process.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from grpo_latent.rollout.vllm.worker import LatentWorker


class LatentCPUWorker(LatentWorker, CPUWorker):
    """`LatentWorker` over vLLM's."""
