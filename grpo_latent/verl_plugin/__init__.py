"""The verl plug-in: the only package that imports verl or ray.

    trainer ──prompts──▶ agent loops ──groups──▶ rollout servers (engine hf or vllm)
       ▲                      │ trajectories with latents, rewards
       │                      ▼
       └──metrics──── workers (latent FSDP2 engine: replay, loss, update) ──weights──▶ servers

verl loads this package in every process through its `verl.plugins` entry point. That must be
cheap, so only the CPU platform is registered here, which has to happen before verl settles on a
device. With VERL_USE_EXTERNAL_MODULES=grpo_latent.verl_plugin, which `grpo_latent.train` sets,
everything is registered at once.
"""

import os

from grpo_latent.verl_plugin.boot import platform  # noqa: F401

if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    from grpo_latent.common.collector import forget_imports
    from grpo_latent.common.lean_imports import import_generation
    from grpo_latent.verl_plugin.boot.registration import register_all

    import_generation()
    register_all()
    # nearly all that this process will import
    forget_imports()
