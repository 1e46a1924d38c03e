"""HRPO (2505.18454 section 3.1): tokens mixed by a gate with what they were drawn from.

While the model thinks, each sampled token is fed as itself and, by a share that a gate says, as
the distribution that it was drawn from. The gate is learned by RL alone.

    position   …   t                      t + 1
    kind           MIXED (a token x)      MIXED … MIXED (the delimiter), then TEXT
    recorded       r                      of the distribution at t - 1, nothing masked:
                   r = Σ_v p_v e_v / √(Σ_v p_v²),   p = softmax(logits / `mixture_temperature`)
    input          a ⊙ e(x) + √(1 - a²) ⊙ i ⊙ r,    i = σ(W_i e(x) + b_i)
                   a = exp(-c · softplus(Λ) ⊙ σ(W_a e(x) + b_a)),   c = 8

There are no spans and nothing is fed that was not sampled, so tokens have their ordinary log-probs
and the policy gradient needs no treatment of latents. r is replayed as it was recorded, as a
constant; the gate is computed anew, with gradient.

Taken from the paper and its code: the equations; c = 8; at the start exp(-c · softplus(Λ)) is
uniform in [0.99, 0.999] (the scripts' `residual_r_min`): a, with σ about 1/2, is about its square
root, and the model reads almost only tokens; thinking ends at "####". Λ has the sign of the paper
(the code's softplus(-Λ) is the same function of -Λ).

Differs: the delimiter is one token, and is itself still mixed (the code compares decoded text
after each token, so the token that completes it is plain); r is of the whole distribution at a
temperature of its own, 1 by default, not of what top-k, top-p and the sampling temperature leave
(set it to the rollout's to have the code's); √(1 - a²) is computed from log a, in float32, which
needs no ε.
Dropped: learning rates of their own for W (20 times) and Λ (200 times the model's); LoRA on the
rest of the model.

Legend: N rows, M positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms.hidden_source import HiddenSource
from grpo_latent.latent.mechanisms.protocol import Mechanism
from grpo_latent.latent.mechanisms.registry import register
from grpo_latent.latent.mechanisms.row_states import RowStates
from grpo_latent.trajectory import PositionKind

GATE_ATTRIBUTE = "hybrid_gate"
SHARPNESS = 8.0  # c


class Gate(nn.Module):
    """What is kept of a token, and what is let in of r.

    Args:
        initial_range: bounds of a where σ(W_a e + b_a) is 1.
        std: of the weights; biases start at 0.
    """

    def __init__(self, hidden_size: int, initial_range: tuple[float, float], std: float):
        super().__init__()
        self.keep = nn.Linear(hidden_size, hidden_size)  # W_a, b_a
        self.let_in = nn.Linear(hidden_size, hidden_size)  # W_i, b_i
        for linear in (self.keep, self.let_in):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        kept_H = torch.empty(hidden_size).uniform_(*initial_range)
        # softplus(Λ) = -log(kept) / c
        self.decay = nn.Parameter((-kept_H.log() / SHARPNESS).expm1().log())

    def forward(self, embeds_MH: Tensor, mixture_MH: Tensor) -> Tensor:
        log_kept_MH = -SHARPNESS * nn.functional.softplus(self.decay.float())
        log_kept_MH = log_kept_MH * self.keep(embeds_MH).float().sigmoid()
        # in bfloat16 a is within one step of 1, and its square would round to 1
        rest_MH = (-torch.expm1(2 * log_kept_MH)).sqrt()
        let_in_MH = self.let_in(embeds_MH).float().sigmoid()
        fed_MH = log_kept_MH.exp() * embeds_MH.float() + rest_MH * let_in_MH * mixture_MH.float()
        return fed_MH.to(embeds_MH.dtype)


@register
@dataclass(frozen=True)
class HybridGate(Mechanism):
    """Tokens mixed with what they were drawn from, until a delimiter.

    Attributes:
        answer_token, answer_id: the delimiter: sampled like any other, it ends the thinking.
        mixture_temperature: of r's distribution.
        initial_min, initial_max: bounds of the start of exp(-c · softplus(Λ)).
    """

    answer_token: str
    answer_id: int
    mixture_temperature: float = 1.0
    initial_min: float = 0.99
    initial_max: float = 0.999

    name: ClassVar[str] = "hybrid_gate"
    published_tokens: ClassVar[Mapping[str, str]] = {"answer": "####"}
    parameter_prefixes: ClassVar[tuple[str, ...]] = (f"{GATE_ATTRIBUTE}.",)
    state_size: ClassVar[int] = 1
    # r is made of the logits that the token is sampled from: with this they are computed once
    reads_logits = True

    def __post_init__(self) -> None:
        if not _is_number(self.mixture_temperature) or not self.mixture_temperature > 0:
            raise ConfigError(
                "not a temperature",
                where="latent.mixture_temperature",
                got=self.mixture_temperature,
                expected="> 0",
            )
        bounds = (self.initial_min, self.initial_max)
        if not all(map(_is_number, bounds)) or not 0 < bounds[0] <= bounds[1] < 1:
            raise ConfigError(
                "not a range of the gate's start",
                where="latent.initial_min, latent.initial_max",
                got=bounds,
                expected="0 < initial_min <= initial_max < 1",
            )

    @property
    def banned_ids(self) -> frozenset[int]:
        return frozenset()

    def new_parameters(
        self, text_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Module | nn.Parameter]:
        bounds = (self.initial_min, self.initial_max)
        gate = Gate(text_config.hidden_size, bounds, text_config.initializer_range)
        return {GATE_ATTRIBUTE: gate.to(device, dtype)}

    def check_model(self, model: nn.Module) -> None:
        if not hasattr(model, GATE_ATTRIBUTE):
            raise CheckpointError(
                "mixed tokens without a gate", where="model", expected=GATE_ATTRIBUTE
            )

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> HybridRows:
        """`max_spans_N` 0: the row's tokens are plain."""
        return HybridRows(self, steps_N, max_spans_N)

    def make(self, model: nn.Module, source: HiddenSource) -> Tensor:
        """r."""
        probs_MV = (source.logits().float() / self.mixture_temperature).softmax(-1)
        mixture_MH = source.mix(probs_MV).float() / probs_MV.norm(dim=-1, keepdim=True)
        return mixture_MH.to(source.hidden_MH.dtype)

    def compose(self, model: nn.Module, embeds_MH: Tensor, recorded_MH: Tensor) -> Tensor:
        return getattr(model, GATE_ATTRIBUTE)(embeds_MH, recorded_MH)

    def requests_without_latents(self) -> dict:
        return {"max_spans": 0}


class HybridRows(RowStates):
    """Which rows still think."""

    def __init__(self, mechanism: HybridGate, like_N: Tensor, max_spans_N: Tensor | None):
        super().__init__(like_N)
        self.answer_id = mechanism.answer_id
        self.thinks_N = torch.ones_like(like_N, dtype=torch.bool)
        if max_spans_N is not None:
            self.thinks_N = max_spans_N > 0

    def plan(self, logits_NV: Tensor | None) -> Tensor:
        return self._text_N.masked_fill(self.thinks_N, int(PositionKind.MIXED))

    def advance(self, kinds_N: Tensor, token_ids_N: Tensor, latents_NH: Tensor | None) -> Tensor:
        self.thinks_N = self.thinks_N & (token_ids_N != self.answer_id)
        return kinds_N

    @property
    def is_after_span_N(self) -> Tensor:
        return ~self.thinks_N

    def keep_rows(self, rows_M: Tensor) -> None:
        super().keep_rows(rows_M)
        self.thinks_N = self.thinks_N[rows_M]

    def pack(self) -> tuple[Tensor, ...]:
        return (self.thinks_N,)

    def unpack(self, columns: tuple[Tensor, ...]) -> None:
        self.thinks_N = columns[0].bool()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
