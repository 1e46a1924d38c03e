"""The protocol of the treatment axis: what RL makes of a latent position.

    rollout    h_{t-1} ──▶ LatentSource ──draw──▶ vector fed at t, aux recorded beside it
    training   h_{t-1} of the current model ──▶ LatentSource ──log_density(vector, aux)──▶ log_probs[t]
               vectors enter the forward as recorded, or made anew (`gradient`)

z_t pairs with the source at t - 1; that shift is made by `models.shift`, not by a treatment.

Legend: M latents of one call, H hidden, V vocabulary, U uniforms a latent, A numbers of aux a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig

GRADIENTS = ("cut", "one_hop", "bptt")


@dataclass(frozen=True)
class LatentSource:
    """What a latent is made of: one hidden state, that of the position before it.

    Attributes:
        mean_MH: h through the head, if the model has one.
        logits: makes the logits [M, V] of the same hidden states, divided by the sampling temperature (by 1 when greedy).
    """

    mean_MH: Tensor
    logits: Callable[[], Tensor]


@dataclass(frozen=True)
class Treatment:
    """Base of all treatments; what it does by itself is `mask`. The fields of a subclass are its options.

    Attributes:
        is_action: whether the policy acts at latents; then `log_density` enters a loss of its own.
        gradient: how the current model's latents enter the training forward: `cut`, `one_hop` or `bptt` (see
            `models.recompute`). None: the recorded vectors do.
        reads_logits: whether `log_density` needs logits.
        aux_size: A.
    """

    is_action = False
    gradient = None
    reads_logits = False
    aux_size = 0

    def check(self, config: LatentConfig) -> None:
        """Raises `ConfigError` where the checkpoint's latents cannot be treated so."""
        if self.is_action and config.trigger != "emitted":
            raise ConfigError(
                "slots are shared by the group, so a trajectory cannot draw its own",
                where="latent.treatment.name",
                got=f"{type(self).__name__} with trigger {config.trigger} ({config.mechanism})",
                expected="mask or recompute with prompt slots",
            )

    def notes(self) -> list[str]:
        """What the user should know before the run; printed once."""
        return []

    @property
    def feeds_mean(self) -> bool:
        """Whether a rollout feeds and records the source's own mean at latents."""
        return type(self).draw is Treatment.draw

    def num_uniforms(self, hidden_size: int) -> int:
        """U, uniform numbers that `draw` takes a latent."""
        return 0

    def draw(
        self, source: LatentSource, uniforms_MU: Tensor | None, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors [M, H] to feed, and what has to be recorded beside them, float32 [M, A] (None for nothing).

        Args:
            uniforms_MU: float64 in (0, 1), of the trajectory's seed and the position; None when greedy: then the mode.
            embed: token embeddings of ids of any shape.
        """
        return source.mean_MH, None

    def log_density(self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None) -> Tensor:
        """float32 [M], nats, with gradient to `source`. Says in its docstring which constants it drops."""
        raise NotImplementedError(f"{type(self).__name__} is no action")
