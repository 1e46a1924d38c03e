"""Causal language models: Qwen2, Qwen3, Llama and their like.

`registry.is_text_model` says which configs are these.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from grpo_latent.backbones.protocol import Backbone


class TextBackbone(Backbone):
    """A decoder over tokens; it takes no images."""

    auto_class = AutoModelForCausalLM
    has_vision = False
    image_arguments = ()
