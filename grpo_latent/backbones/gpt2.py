"""GPT-2: positions are learned embeddings, so that there are only so many of them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from grpo_latent.backbones.registry import register
from grpo_latent.backbones.text import TextBackbone
from grpo_latent.errors import ConfigError

# switches of its config that vLLM asserts to be off
VARIANTS = ("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


@register
class GPT2(TextBackbone):
    """A GPT-2 model."""

    model_types = ("gpt2",)
    base_name = "transformer"

    @classmethod
    def check_vllm(cls, hf_config: PreTrainedConfig, where: str) -> None:
        for name in VARIANTS:
            if getattr(hf_config, name):
                raise ConfigError(
                    "a variant of GPT-2 that vLLM does not build",
                    where=f"{where}: {name}",
                    got=True,
                    expected="False",
                    fix="Use engine hf.",
                )

    @classmethod
    def check_verl(cls, where: str) -> None:
        raise ConfigError(
            "verl asks a config for num_key_value_heads, which GPT-2's has not",
            where=where,
            got="a GPT-2 model",
            expected="a model with rotary attention, such as Llama or Qwen",
            fix="GPT-2 runs in SFT, rollout, replay, evaluation and serving.",
        )

    @property
    def num_positions(self) -> int:
        return self.text_config.max_position_embeddings
