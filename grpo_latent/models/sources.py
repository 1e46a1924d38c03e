"""What latents come from, in a forward of ours or of somebody else's: the mechanism's `sources`.

position    …   t - 1        t
kind            START        LATENT
source          h_{t-1}  ──▶ z_t (its mean, its density)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms import HiddenSource, Mechanism
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.trajectory import PositionKind


def source_of_latents(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    hidden_BTH: Tensor,
    temperature: float = 1.0,
    treatment: Treatment | None = None,
) -> LatentSource:
    """What this model would make the recorded LATENT positions of.

    Arguments as `latent_log_densities`.
    """
    hidden_MH = hidden_BTH[sequences.sources(adapter.mechanism)]
    features_MF = None if treatment is None else treatment.features(adapter.model, hidden_MH)
    return LatentSource(
        adapter.make(hidden_MH), lambda: adapter.logits(hidden_MH) / temperature, features_MF
    )


def latent_log_densities(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    hidden_BTH: Tensor,
    treatment: Treatment,
    temperature: float = 1.0,
) -> Tensor:
    """Log-densities of the recorded latents under this model, float32 [B, T], 0 elsewhere.

    Each stands at its latent's own position; in nats.

    Args:
        hidden_BTH: of the same sequences, by `replay_hidden`.
        temperature: of the rollout.
    """
    source = source_of_latents(adapter, sequences, hidden_BTH, temperature, treatment)
    kinds_BT = sequences.kinds_BT.masked_fill(~sequences.valid_BT, int(PositionKind.PROMPT))
    density_M = treatment.log_density(
        source, sequences.latents_NH[sequences.is_made_N], sequences.latent_aux_MA
    )
    is_own_BT = kinds_BT == PositionKind.LATENT
    return torch.zeros(
        is_own_BT.shape, dtype=density_M.dtype, device=density_M.device
    ).masked_scatter(is_own_BT, density_M)


class Taken(NamedTuple):
    """What a tap took: means [M, H], and where wanted logits [M, V] and features [M, F]."""

    means_MH: Tensor
    logits_MV: Tensor | None
    features_MF: Tensor | None


class _CausalOutput(Protocol):
    """What is asked of a model's output, whichever class of transformers' it is."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


class SourceTap:
    """Takes the sources out of a forward that is not ours (verl's, under FSDP).

    The parameters of the head and of the treatment belong to the FSDP root, which has gathered
    them only within its forward. So means and features are made there, in front of `lm_head`, and
    are handed out as the model's `hidden_states`: FSDP registers its backward on every output, so
    it gathers the parameters again whichever output's gradient arrives first.
    """

    _ATTRIBUTE = "_grpo_latent_source_tap"

    def __init__(self, model: PreTrainedModel, mechanism: Mechanism):
        self._model = model
        self.mechanism = mechanism
        self._where: tuple[Tensor, Tensor] | None = None
        self._means_MH: Tensor | None = None
        self._logits_MV: Tensor | None = None
        self._make_features: Callable[[nn.Module, Tensor], Tensor | None] | None = None
        self._features_MF: Tensor | None = None
        self._wants_logits = False
        self._is_sources_only = False

    @classmethod
    def install(cls, model: PreTrainedModel, mechanism: Mechanism) -> SourceTap:
        """The model's tap; installs the hooks the first time, before any FSDP wrapping."""
        tap = getattr(model, cls._ATTRIBUTE, None)
        if tap is None:
            tap = cls(model, mechanism)
            model.get_output_embeddings().register_forward_pre_hook(tap._before_logits)
            model.register_forward_hook(tap._after_forward)
            object.__setattr__(model, cls._ATTRIBUTE, tap)
        tap.mechanism = mechanism
        return tap

    def arm(
        self,
        rows_M: Tensor,
        columns_M: Tensor,
        wants_logits: bool = False,
        is_sources_only: bool = False,
        features: Callable[[nn.Module, Tensor], Tensor | None] | None = None,
    ) -> None:
        """Makes the tap take the sources (row, column) of the next forward.

        Args:
            wants_logits: keep the logits at the sources, too.
            is_sources_only: the forward is run for its sources: logits are made of one column
                instead of all.
            features: `Treatment.features`, of the same hidden states.
        """
        self._make_features = features
        self._where = (rows_M, columns_M)
        self._wants_logits = wants_logits
        self._is_sources_only = is_sources_only
        self._means_MH = self._logits_MV = self._features_MF = None

    def take(self) -> Taken:
        """What the forward since `arm` left; disarms.

        Raises:
            LatentMismatchError: no forward has made logits.
        """
        means_MH, logits_MV, features_MF = self._means_MH, self._logits_MV, self._features_MF
        self.disarm()
        if means_MH is None:
            raise LatentMismatchError(
                "the forward made no logits",
                where="SourceTap",
                got="no call of lm_head",
                expected="one forward",
            )
        return Taken(means_MH, logits_MV, features_MF)

    def disarm(self) -> None:
        """Lets forwards pass untouched, and drops what was taken."""
        self._where = self._make_features = None
        self._means_MH = self._logits_MV = self._features_MF = None

    def _before_logits(self, module: nn.Module, args: tuple) -> tuple | None:
        if self._where is None:
            return None
        hidden_BTH = args[0]
        rows_M, columns_M = self._where
        hidden_MH = hidden_BTH[rows_M, columns_M]
        source = HiddenSource(hidden_MH, lambda: self._logits(module, hidden_MH), self._embed)
        self._means_MH = self.mechanism.make(self._model, source)
        if self._wants_logits:
            self._logits_MV = self._logits(module, hidden_MH)
        if self._make_features is not None:
            self._features_MF = self._make_features(self._model, hidden_MH)
        return (hidden_BTH[:, -1:],) if self._is_sources_only else None

    def _logits(self, module: nn.Module, hidden_MH: Tensor) -> Tensor:
        # the module's own forward: a call would come back to the hook that asks for this
        return backbone_of(self._model).mask_unpredicted(module.forward(hidden_MH))

    def _embed(self, token_ids: Tensor) -> Tensor:
        # a call: FSDP gathers the weight for it; but the latents of this forward belong to its
        # own ids
        embedding = self._model.get_input_embeddings()
        return LatentInjector.install(self._model).embed(embedding, token_ids)

    def _after_forward(
        self, module: nn.Module, args: tuple, output: _CausalOutput
    ) -> _CausalOutput | None:
        if self._where is None:
            return None
        made = (self._means_MH, self._logits_MV, self._features_MF)
        output.hidden_states = tuple(values for values in made if values is not None)
        return output
