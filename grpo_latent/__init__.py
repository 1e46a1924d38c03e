"""GRPO over latent trajectories, on verl and Ray.

`from grpo_latent import LatentLLM, SamplingParams` loads torch and transformers; the package alone
loads nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
# names of the package -> the module that they are taken from when they are asked for
_LAZY = {
    "LatentLLM": "grpo_latent.rollout.llm",
    "SamplingParams": "grpo_latent.rollout.protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
