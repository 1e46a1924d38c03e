"""The protocol of the treatment axis: what RL makes of a latent position.

    rollout    h_{t-1} ──▶ LatentSource ──draw──▶ vector fed at t, aux recorded beside it
    training   h_{t-1} of the current model ──▶ LatentSource
                   ──log_density(vector, aux)──▶ log_probs[t]
                   ──statistics──▶ of policy and reference
               vectors enter the forward as recorded, or made anew (`gradient`)
    loss       log-densities, statistics, advantages ──components──▶ terms beside the text's

z_t pairs with the source at t - 1; that shift is made by `models.shift`, not by a treatment.

A treatment may have parameters of its own (`attach`). FSDP has them gathered within the model's
forward only, so they are applied there, by `features`; draw, density and statistics take their
results from the source.

Legend: M latents of one call, H hidden, V vocabulary, U uniforms a latent, A numbers of aux a
latent, F features a latent, S statistics a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments.loss_components import (
    Component,
    LatentView,
    anchor,
    clipped_ratio,
    density_kl,
)
from grpo_latent.latent.treatments.terms import LatentTerms

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GRADIENTS = ("cut", "one_hop", "bptt")
# all parameters of treatments stand below this attribute of the model, so that a folder's are
# known whoever wrote them
PARAMETERS_ATTRIBUTE = "latent_treatment"


@dataclass(frozen=True)
class LatentSource:
    """What a latent is made of: one hidden state, that of the position before it.

    Attributes:
        mean_MH: h through the head, if the model has one.
        logits: makes the logits [M, V] of the same hidden states, divided by the sampling
            temperature (by 1 when greedy).
        features_MF: `Treatment.features` of the same hidden states; None without parameters.
    """

    mean_MH: Tensor
    logits: Callable[[], Tensor]
    features_MF: Tensor | None = None


@dataclass(frozen=True)
class Treatment:
    """Base of all treatments; by itself it is `mask`. A subclass's fields are its options.

    A subclass with parameters overrides `build` and `features`; one with a loss of its own
    `components`, and `reads_statistics` and `reference_weights` if that compares with the
    reference.

    Attributes:
        name: in the registry; a class of a user's own has none.
        is_action: whether the policy acts at latents; then `log_density` enters a loss of its own.
        gradient: how the current model's latents enter the training forward: `cut`, `one_hop` or
            `bptt` (see `models.recompute`). None: the recorded vectors do.
        reads_logits: whether `log_density` needs logits.
        aux_size: A.
    """

    name: ClassVar[str] = ""
    is_action = False
    reads_logits = False

    # properties, since a subclass makes the one an option and computes the other
    @property
    def gradient(self) -> str | None:
        return None

    @property
    def aux_size(self) -> int:
        return 0

    def check(self, mechanism: Mechanism) -> None:
        """Raises `ConfigError` where the checkpoint's latents cannot be treated so."""
        if mechanism.feeds_start and not self.feeds_mean:
            raise ConfigError(
                "the first latent stands where a token acts, and cannot be drawn beside it",
                where="latent.treatment.name",
                got=f"{type(self).__name__} with latent.first_latent=at_start",
                expected="mask or recompute, or latent.first_latent=after_start",
            )
        if self.is_action and mechanism.has_slots:
            raise ConfigError(
                "slots are shared by the group, so a trajectory cannot draw its own",
                where="latent.treatment.name",
                got=f"{type(self).__name__} with mechanism {mechanism.key()}",
                expected="mask or recompute with slots of the prompt",
            )
        if self.is_action and mechanism.composes:
            raise ConfigError(
                "a sampled token is the action already where its vector is recorded beside it",
                where="latent.treatment.name",
                got=f"{type(self).__name__} with mechanism {mechanism.key()}",
                expected="mask or recompute",
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
        """Makes the vectors [M, H] to feed, and the aux to record, float32 [M, A] or None.

        Args:
            uniforms_MU: float64 in (0, 1), of the trajectory's seed and the position; None when
                greedy: then the mode.
            embed: token embeddings of ids of any shape.
        """
        return source.mean_MH, None

    def log_density(
        self, source: LatentSource, latents_MH: Tensor, aux_MA: Tensor | None
    ) -> Tensor:
        """Log-density of recorded latents, float32 [M], nats, with gradient to `source`.

        An override says in its docstring which constants it drops.
        """
        raise NotImplementedError(f"{type(self).__name__} is no action")

    # ---- parameters

    def build(self, text_config: PretrainedConfig) -> nn.Module | None:
        """A fresh module of this treatment's parameters, float32 on the CPU; None for none.

        The caller has seeded torch.
        """
        return None

    @property
    def has_parameters(self) -> bool:
        """Whether the model gets parameters of this treatment."""
        return type(self).build is not Treatment.build

    @property
    def parameter_prefixes(self) -> tuple[str, ...]:
        """Prefixes of its parameters' names in the model's `state_dict`."""
        return (f"{PARAMETERS_ATTRIBUTE}.",) if self.has_parameters else ()

    def attach(self, model: PreTrainedModel) -> None:
        """Gives the model this treatment's parameters, fresh, in its dtype and on its device.

        To be called before FSDP wraps the model: then they are trained, saved, loaded and sent to
        rollouts as all others.
        """
        module = self.build(model.config.get_text_config())
        if module is not None:
            weight = model.get_input_embeddings().weight
            assert isinstance(weight, Tensor)
            setattr(
                model, PARAMETERS_ATTRIBUTE, module.to(device=weight.device, dtype=weight.dtype)
            )

    def check_model(self, model: nn.Module) -> None:
        """Raises `CheckpointError` where the model lacks this treatment's parameters."""
        if self.has_parameters and not hasattr(model, PARAMETERS_ATTRIBUTE):
            raise CheckpointError(
                "a treatment without its parameters",
                where=f"model, latent.treatment.name={type(self).__name__}",
                got=f"no {PARAMETERS_ATTRIBUTE}",
                expected="the treatment's module",
                fix="Load the model with load_latent_model(…, treatment=…).",
            )

    def features(self, model: nn.Module, hidden_MH: Tensor) -> Tensor | None:
        """What this treatment's parameters make of hidden states, [M, F].

        It is called with M = 0, too: a rank without latents has to gather with the others.
        """
        return None

    # ---- loss

    def statistics(self, source: LatentSource) -> Tensor:
        """What `components` gets of each latent, [M, S], of policy and of reference."""
        return source.mean_MH

    def reads_statistics(self, terms: LatentTerms) -> bool:
        """Whether `components` reads them; the reference's are made where there is a reference."""
        return terms.anchor_weight > 0

    def reference_weights(self, terms: LatentTerms) -> dict[str, float]:
        """Weights of what compares with the reference, by config key below `latent.treatment`.

        Without a reference all must be 0.
        """
        return {"anchor_weight": terms.anchor_weight, "kl_coef": terms.kl_coef}

    def components(self, view: LatentView, terms: LatentTerms) -> list[Component]:
        """The loss at latents, of one micro-batch.

        Every micro-batch gives the same names and weights, also one without latents: ranks must
        agree on which parameters get a gradient.
        """
        found = (
            []
            if view.acts is None
            else clipped_ratio(view.acts, terms) + density_kl(view.acts, terms)
        )
        return found + anchor(view, terms)
