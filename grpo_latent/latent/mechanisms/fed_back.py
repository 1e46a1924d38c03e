"""What LVR, ILVR, IVT-LR and Coconut share: tokens, a number of steps, and h as next input.

The head's names are those of the published LVR checkpoints, which therefore load without a
mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms.hidden_source import HiddenSource
from grpo_latent.latent.mechanisms.protocol import Mechanism
from grpo_latent.trajectory import PositionKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD_ATTRIBUTE = "lvr_head"


class MLPHead(nn.Module):
    """LayerNorm-Linear-GELU-Linear (LVR, 2509.24251 section 3: off by default, and worse)."""

    def __init__(self, text_config: PretrainedConfig) -> None:
        super().__init__()
        hidden_size = text_config.hidden_size
        self.ln_q = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden))


class GLUHead(nn.Module):
    """Gated linear unit of the decoder's own MLP size (LVR's second variant)."""

    def __init__(self, text_config: PretrainedConfig) -> None:
        super().__init__()
        hidden_size, inner_size = text_config.hidden_size, text_config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, inner_size)
        self.up_proj = nn.Linear(hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, hidden_size)
        self.act_fn = ACT2FN[text_config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class ProjectionHead(nn.Module):
    """Linear-GELU-Linear-LayerNorm (CODI, 2502.21074), between equal sizes."""

    def __init__(self, text_config: PretrainedConfig) -> None:
        super().__init__()
        hidden_size = text_config.hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.ln = nn.LayerNorm(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ln(self.mlp(hidden))


_HEADS = {"mlp": MLPHead, "glu": GLUHead, "projection": ProjectionHead}
HEADS = ("none", *_HEADS)


@dataclass(frozen=True)
class FedBack(Mechanism):
    """Base of the mechanisms that feed h back.

    Attributes:
        start_token, latent_token, end_token: tokens of a span; `latent_token` is a placeholder,
            the only one that slots use.
        start_id, latent_id, end_id: their ids.
        steps: latent steps of a span or their cap; slots of the prompt.
        head: module applied to h before it is fed back: none, mlp, glu or projection.
    """

    start_token: str
    latent_token: str
    end_token: str
    start_id: int
    latent_id: int
    end_id: int
    steps: int = 8
    head: str = "none"

    parameter_prefixes: ClassVar[tuple[str, ...]] = (f"{HEAD_ATTRIBUTE}.",)
    structural: ClassVar[tuple[str, ...]] = ("head",)
    min_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("steps", self.steps, self.min_steps)
        check_choice("head", self.head, HEADS)
        ids = {f"{role}_id": token_id for role, (_, token_id) in self.roles.items()}
        are_ids = all(
            isinstance(value, int) and not isinstance(value, bool) and value >= 0
            for value in ids.values()
        )
        if not are_ids or len(set(ids.values())) != len(ids):
            raise ConfigError(
                "latent tokens need different ids",
                where="latent",
                got=ids,
                expected="distinct ids >= 0",
            )

    def placeholder_id(self, kind: PositionKind) -> int:
        return {PositionKind.LATENT: self.latent_id, PositionKind.SELECTED: self.latent_id}.get(
            kind, 0
        )

    def new_parameters(
        self, text_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Module | nn.Parameter]:
        if self.head == "none":
            return {}
        return {HEAD_ATTRIBUTE: _HEADS[self.head](text_config).to(device=device, dtype=dtype)}

    def make(self, model: nn.Module, source: HiddenSource) -> Tensor:
        """h itself, or the head's output."""
        return (
            source.hidden_MH
            if self.head == "none"
            else getattr(model, HEAD_ATTRIBUTE)(source.hidden_MH)
        )


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless the setting has one of the allowed values."""
    if value not in allowed:
        raise ConfigError(
            "unknown value", where=f"latent.{name}", got=value, expected=f"one of {allowed}"
        )


def check_count(name: str, value: object, minimum: int) -> None:
    """Raises `ConfigError` unless the setting is an int of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(
            "not a valid count", where=f"latent.{name}", got=value, expected=f"int >= {minimum}"
        )


def check_switch(name: str, value: object) -> None:
    """Raises `ConfigError` unless the setting is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(
            "not a switch", where=f"latent.{name}", got=value, expected="true or false"
        )
