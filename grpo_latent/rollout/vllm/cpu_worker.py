"""Runs latents in vLLM's worker on CPU.

A module of its own, since vLLM's CPU worker, when imported, replaces CUDA streams, events and
pinned memory in this process.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from grpo_latent.rollout.vllm.worker import LatentWorker


class LatentCPUWorker(LatentWorker, CPUWorker):
    """`worker_cls` of vLLM on CPU; its hooks go before those of vLLM's CPU worker."""
