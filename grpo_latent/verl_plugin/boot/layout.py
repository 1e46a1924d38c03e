"""Which models and layouts of verl's can carry latents: asked by the driver and by each worker."""

from __future__ import annotations

from transformers import PreTrainedConfig

from grpo_latent.backbones.registry import find_backbone
from grpo_latent.errors import ConfigError
from grpo_latent.verl_plugin.boot.options import LatentOptions


def check_model(hf_config: PreTrainedConfig) -> None:
    """Raises `ConfigError` at a model that the engine cannot train."""
    key = "actor_rollout_ref.model.path"
    find_backbone(hf_config, key).check_verl(key)


def check_layout(model, visibility: str | None, draws_images: bool) -> None:
    """Raises `ConfigError` where verl's layout cannot carry the latents.

    Args:
        model: `actor_rollout_ref.model`, or verl's dataclass of it.
        visibility: None where only the checkpoint says it.
        draws_images: whether slots draw their image positions (Plackett–Luce).
    """
    check_padding(visibility, model.use_remove_padding)
    refused = {"use_fused_kernels": "the latent engine reads logits"}
    if draws_images:
        refused |= {
            "use_remove_padding": "latent.selection=plackett_luce reads attention in the "
            "padded layout",
            "enable_gradient_checkpointing": "latent.selection=plackett_luce records "
            "attention, which a checkpointed layer computes again when nothing records any more",
        }
    for name, reason in refused.items():
        if getattr(model, name):
            key = f"actor_rollout_ref.model.{name}"
            raise ConfigError(
                "not supported with latents",
                where=key,
                got=True,
                expected=f"False ({reason})",
                fix=f"Set {key}=False.",
            )


def check_padding(visibility: str | None, use_remove_padding: bool) -> None:
    """Raises `ConfigError` where the packed layout cannot carry the mask of `visibility`."""
    if visibility == "latents_only" and use_remove_padding:
        raise ConfigError(
            "visibility latents_only needs the padded layout",
            where="actor_rollout_ref.model.use_remove_padding",
            got=True,
            expected="False",
            fix="Set actor_rollout_ref.model.use_remove_padding=False, or latent.visibility=full.",
        )


def can_share_prompt(use_remove_padding: bool, attention: str) -> bool:
    """Whether groups run their prompt once: in the padded layout, with `sdpa`."""
    return not use_remove_padding and attention == "sdpa"


def sharing_notes(actor_rollout_ref, options: LatentOptions) -> list[str]:
    """Where `latent.share_prompt` does not apply, or less than it could.

    Args:
        actor_rollout_ref: verl's config.
    """
    if not options.share_prompt:
        return []
    model, actor = actor_rollout_ref.model, actor_rollout_ref.actor
    attention = (model.get("override_config") or {}).get("attn_implementation", "sdpa")
    key = "actor_rollout_ref.model"
    if not can_share_prompt(model.use_remove_padding, attention):
        return [
            "latent.share_prompt: each trajectory runs its own prompt; groups share it with "
            f"{key}.use_remove_padding=False and {key}.override_config.attn_implementation=sdpa"
        ]
    size, group_size = actor.ppo_micro_batch_size_per_gpu, actor_rollout_ref.rollout.n
    if actor.use_dynamic_bsz:
        return [
            "latent.share_prompt: use_dynamic_bsz sorts trajectories by length; those of a group "
            "share their prompt where they meet in a micro-batch"
        ]
    if size % group_size:
        return [
            f"latent.share_prompt: micro-batches of {size} trajectories tear groups of "
            f"{group_size} apart, and their prompt runs once in each; "
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is best a multiple of rollout.n"
        ]
    return []
