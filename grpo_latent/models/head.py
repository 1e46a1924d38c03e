"""The optional head on the hidden state inside a latent span (LVR, 2509.24251 section 3: off by default, and worse)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from grpo_latent.errors import ConfigError

HEAD_ATTRIBUTE = "lvr_head"  # also the weights' prefix in the published LVR checkpoints


class MLPHead(nn.Module):
    """LayerNorm-Linear-GELU-Linear."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(hidden))))


class GLUHead(nn.Module):
    """LayerNorm, then a SiLU-gated linear unit."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


_HEADS = {"mlp": MLPHead, "glu": GLUHead}


def attach_head(model: nn.Module, kind: str) -> None:
    """Makes the head a submodule of `model`, so that optimizers, FSDP and `state_dict` see it. `none` attaches nothing."""
    if kind == "none":
        return
    if kind not in _HEADS:
        raise ConfigError("unknown head", where="latent.head", got=kind, expected=f"none or one of {sorted(_HEADS)}")
    weight = model.get_input_embeddings().weight
    head = _HEADS[kind](model.config.get_text_config().hidden_size)
    setattr(model, HEAD_ATTRIBUTE, head.to(device=weight.device, dtype=weight.dtype))


def feedback(model: nn.Module, hidden: Tensor) -> Tensor:
    """The vector that a latent step feeds: h itself, or the head's output where the model has one. Same shape as `hidden`."""
    head = getattr(model, HEAD_ATTRIBUTE, None)
    return hidden if head is None else head(hidden)
