"""`gumbel_soft`: a latent is a mixture of the k most probable tokens, drawn by Gumbel noise.

    ids, p      the k most probable tokens and their probabilities, normalised over the k
    g           = log p + Gumbel(0, 1)                                recorded, with ids
    fed         sum_k softmax(g / tau)_k e(id_k)                      e: token embedding
    density     mean_k [-x_k - exp(-x_k)],  x = clamp(g - log p, -1.5, 3)
                log p of the current policy, at the recorded ids

Source: SofT-GRPO (2511.06411): k = 5, tau = 0.1. With `joint` the mean is a sum and, unclamped,
the exact log-density of g given the ids, no constant dropped; which k ids were the most probable
counts as given. Dropped: the fed vector is replayed as recorded, so embeddings do not train
through the mixture. Feeds no h, hence no head, and no exit that measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_latent.algo.selection import gumbel_noise
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments.protocol import LatentSource, Treatment
from grpo_latent.latent.treatments.registry import register
from grpo_latent.latent.treatments.values import at_least_float, is_number


@register
@dataclass(frozen=True)
class GumbelSoft(Treatment):
    """Draws a weighting of the k likeliest tokens, and scores it by the Gumbel density.

    Aux [M, 2k] has the ids (exact as float32 below 2^24), then g.

    Attributes:
        top_k: k.
        tau: temperature of the mixture; small ones approach a single token.
        clamp: bounds of x, outside which a draw gives no gradient; null for none.
        joint: sum over k instead of the mean.
    """

    name: ClassVar[str] = "gumbel_soft"
    top_k: int = 5
    tau: float = 0.1
    clamp: tuple[float, float] | None = (-1.5, 3.0)
    joint: bool = False
    is_action = True
    reads_logits = True

    def __post_init__(self) -> None:
        where = "latent.treatment.gumbel_soft"
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise ConfigError(
                "not a count", where=f"{where}.top_k", got=self.top_k, expected="int >= 1"
            )
        if not is_number(self.tau) or not 0 < self.tau < float("inf"):
            raise ConfigError(
                "not a temperature", where=f"{where}.tau", got=self.tau, expected="finite, > 0"
            )
        bounds = self.clamp
        if bounds is not None and not (
            len(bounds) == 2 and all(map(is_number, bounds)) and bounds[0] < bounds[1]
        ):
            raise ConfigError(
                "not bounds", where=f"{where}.clamp", got=bounds, expected="[low, high] or null"
            )
        if not isinstance(self.joint, bool):
            raise ConfigError(
                "not a switch", where=f"{where}.joint", got=self.joint, expected="true or false"
            )

    def check(self, mechanism: Mechanism) -> None:
        super().check(mechanism)
        has_head = getattr(mechanism, "head", "none") != "none"
        for name, is_refused, allowed in (
            ("head", has_head, "none"),
            ("exit", mechanism.reads_latents, "steps or end_token"),
        ):
            if is_refused:
                raise ConfigError(
                    "a mixture of token embeddings is no h",
                    where=f"latent.{name}",
                    got=f"{getattr(mechanism, name)} with latent.treatment.name=gumbel_soft",
                    expected=allowed,
                    fix="Train SFT without it, or choose another treatment.",
                )

    @property
    def aux_size(self) -> int:
        return 2 * self.top_k

    def num_uniforms(self, hidden_size: int) -> int:
        return self.top_k

    def draw(
        self, source: LatentSource, uniforms_MU: Tensor | None, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits_MV = source.logits().float()
        if self.top_k > logits_MV.shape[-1]:
            raise ConfigError(
                "more tokens than the vocabulary has",
                where="latent.treatment.gumbel_soft.top_k",
                got=self.top_k,
                expected=f"<= {logits_MV.shape[-1]}",
            )
        logits_MK, ids_MK = logits_MV.topk(self.top_k, dim=-1)
        g_MK = logits_MK.log_softmax(-1)
        if uniforms_MU is not None:
            g_MK = g_MK + gumbel_noise(uniforms_MU).float()
        weights_MK = (g_MK / self.tau).softmax(-1)
        embeds_MKH = embed(ids_MK)
        fed_MH = torch.einsum("mk,mkh->mh", weights_MK, embeds_MKH.float())
        return fed_MH.to(embeds_MKH.dtype), torch.cat([ids_MK.float(), g_MK], dim=-1)

    def log_density(
        self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None
    ) -> Tensor:
        """Log-density of the recorded g at the recorded ids; no constant dropped."""
        assert aux_MA is not None, "ids and g are recorded as aux"
        ids_MK, g_MK = aux_MA[:, : self.top_k].long(), aux_MA[:, self.top_k :]
        log_probs_MK = at_least_float(source.logits()).gather(1, ids_MK).log_softmax(-1)
        x_MK = g_MK - log_probs_MK
        if self.clamp is not None:
            x_MK = x_MK.clamp(*self.clamp)
        terms_MK = -x_MK - (-x_MK).exp()
        return terms_MK.sum(-1) if self.joint else terms_MK.mean(-1)
