"""Backbones by model type; `common.registry` says how all registries work.

Beside it, which family a config, a model or a processor belongs to; an unknown one is an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.text import TextBackbone
from grpo_latent.common.registry import Registry, subclass_of
from grpo_latent.errors import ConfigError

# comma-separated `package.module:Class`; an environment variable, as it must reach every process:
# torchrun's, Ray's, vLLM's
VARIABLE = "GRPO_LATENT_BACKBONES"

# by the `model_type` of config.json
BACKBONES: Registry[type[Backbone]] = Registry(
    "backbone", subclass_of(Backbone), lambda cls: cls.model_types
)
register = BACKBONES.register


def load_named_backbones() -> None:
    """Imports and registers the classes that `GRPO_LATENT_BACKBONES` names; idempotent.

    Raises:
        ConfigError: a name that is not `package.module:Class` of a `Backbone`.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        register(BACKBONES.imported(name.strip(), VARIABLE))


def known_model_types() -> list[str]:
    """All registered values of `model_type`, sorted."""
    load_named_backbones()
    return sorted(BACKBONES)


def find_backbone(hf_config: PreTrainedConfig, where: str = "model") -> type[Backbone]:
    """The family of a config: auto class, vision or not, what the engines refuse.

    Args:
        where: folder or key, for the error.

    Raises:
        ConfigError: no family has this model type.
    """
    load_named_backbones()
    cls = BACKBONES.get(hf_config.model_type)
    if cls is not None:
        return cls
    if is_text_model(hf_config):
        return TextBackbone
    raise ConfigError(
        "no backbone for this family of models",
        where=f"{where}: model_type",
        got=hf_config.model_type,
        expected=f"one of {', '.join(known_model_types())}, or a text model "
        "(…ForCausalLM: rotary attention over all positions in every layer, no sliding_window, "
        "no part for images or sound)",
        fix="Write one: a file with a subclass of Backbone, "
        "see grpo_latent/backbones/protocol.py for what to implement, "
        "in grpo_latent/backbones/ or anywhere else, "
        f"named by the environment variable {VARIABLE}=package.module:Class.",
    )


def is_text_model(hf_config: PreTrainedConfig) -> bool:
    """Whether a config is that of a decoder over tokens, with rotary attention at every layer.

    A config with a part (vision, audio, a code book) is none, whatever else it is registered as;
    nor is one whose model carries a recurrent state or looks back over a window only, which the
    latents' cache and attention mask do not express.
    """
    if (
        type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or hf_config.sub_configs
        or hf_config.is_encoder_decoder
    ):
        return False
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)], "_is_stateful", False):
        return False
    has_rotary_attention = bool(getattr(hf_config, "rope_parameters", None))
    # where layers are named, `Backbone` itself refuses those that it cannot run
    says_its_layers = bool(getattr(hf_config, "layer_types", None))
    return has_rotary_attention and (
        says_its_layers or not getattr(hf_config, "sliding_window", None)
    )


def backbone_of(model: PreTrainedModel) -> Backbone:
    """The model as a member of its family; as `find_backbone`, and the errors of `Backbone`."""
    return find_backbone(model.config, where=type(model).__name__)(model)


def read_backbone(folder: str | Path) -> tuple[PreTrainedConfig, type[Backbone]]:
    """Config and family of a folder (or of owner/name on the hub)."""
    hf_config = AutoConfig.from_pretrained(folder)
    return hf_config, find_backbone(hf_config, where=f"{folder}/config.json")


def backbone_of_processor(processor: ProcessorMixin) -> type[Backbone]:
    """The family that reads what a processor returns, found by the name of the processor's class.

    Raises:
        ConfigError: no family has it.
    """
    load_named_backbones()
    names = [cls.__name__ for cls in type(processor).__mro__]
    for cls in BACKBONES.values():
        if not set(names).isdisjoint(cls.processor_names):
            return cls
    known = sorted({name for cls in BACKBONES.values() for name in cls.processor_names})
    raise ConfigError(
        "no backbone for this processor",
        where="processor",
        got=names[0],
        expected=f"one of {known}",
        fix="Name it in the processor_names of the model's Backbone.",
    )
