"""Names that configs of earlier releases hold, and what they are called now."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from grpo_latent.verl_plugin.boot.registration import MANAGER_PATH

# key of the config -> {old value: new value}
RENAMED = {
    "data.custom_cls.path": {
        "pkg://grpo_latent.verl_plugin.dataset": "pkg://grpo_latent.verl_plugin.trainer.dataset",
    },
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": {
        "grpo_latent.verl_plugin.agent_loop.LatentAgentLoopManager": MANAGER_PATH,
    },
}


def take_new_names(config: DictConfig) -> list[str]:
    """Replaces old names in the config, in place; idempotent.

    Returns:
        one note for each that it replaced, none for a config of today.
    """
    notes = []
    for key, names in RENAMED.items():
        old = OmegaConf.select(config, key)
        if old in names:
            OmegaConf.update(config, key, names[old])
            notes.append(f"{key}={old} is called {names[old]} now")
    return notes
