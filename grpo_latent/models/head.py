"""Parameters that a latent model has beyond its base model: the head on h, and the learned end vector.

Both are submodules or parameters of the Hugging Face model, so that optimizers, FSDP, `state_dict` and `save_pretrained`
see them; their names are those of the published LVR checkpoints, which therefore load without a mapping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig

HEAD_ATTRIBUTE = "lvr_head"
END_VECTOR_ATTRIBUTE = "lvr_latent_end_emb"
LATENT_PARAMETER_PREFIXES = (f"{HEAD_ATTRIBUTE}.", END_VECTOR_ATTRIBUTE)


class MLPHead(nn.Module):
    """LayerNorm-Linear-GELU-Linear (LVR, 2509.24251 section 3: off by default, and worse)."""

    def __init__(self, text_config):
        super().__init__()
        hidden_size = text_config.hidden_size
        self.ln_q = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden))


class GLUHead(nn.Module):
    """Gated linear unit of the decoder's own MLP size (LVR's second variant)."""

    def __init__(self, text_config):
        super().__init__()
        hidden_size, inner_size = text_config.hidden_size, text_config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, inner_size)
        self.up_proj = nn.Linear(hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, hidden_size)
        self.act_fn = ACT2FN[text_config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


_HEADS = {"mlp": MLPHead, "glu": GLUHead}


def build_head(kind: str, text_config) -> nn.Module:
    """A head of `kind`, freshly initialised.

    Raises:
        ConfigError: `kind` is neither `mlp` nor `glu`.
    """
    if kind not in _HEADS:
        raise ConfigError("unknown head", where="latent.head", got=kind, expected=f"{sorted(_HEADS)}")
    return _HEADS[kind](text_config)


def attach_latent_modules(model: nn.Module, config: LatentConfig) -> None:
    """Adds the head and the end vector that `config` names, freshly initialised, in the model's dtype and device."""
    weight = model.get_input_embeddings().weight
    text_config = model.config.get_text_config()
    if config.head != "none":
        head = build_head(config.head, text_config)
        setattr(model, HEAD_ATTRIBUTE, head.to(device=weight.device, dtype=weight.dtype))
    if config.latent_end_id is not None:
        end_vector = torch.empty(text_config.hidden_size, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(end_vector, std=text_config.initializer_range)
        setattr(model, END_VECTOR_ATTRIBUTE, nn.Parameter(end_vector))


def feedback(model: nn.Module, hidden: Tensor) -> Tensor:
    """The vector that a latent step feeds: h itself, or the head's output where the model has one; same shape."""
    head = getattr(model, HEAD_ATTRIBUTE, None)
    return hidden if head is None else head(hidden)


def end_vector(model: nn.Module) -> Tensor:
    """The learned end vector [H] of exit `latent_end`."""
    return getattr(model, END_VECTOR_ATTRIBUTE)
