"""Keeps the latent parameters beside vLLM's own model.

A latent checkpoint holds a head and an end vector that vLLM's weight loader would refuse. They are
taken out of the stream of weights here, at the first load and at every later one, and kept outside
the module tree: vLLM repacks, moves to meta and counts every parameter that it finds there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm import ModelRegistry
from vllm.model_executor.model_loader import utils as loader_utils

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.mechanisms.published import TARGET_MODULES
from grpo_latent.rollout.vllm.skeleton import worker_options
from grpo_latent.rollout.vllm.supported import ENGINE_HF

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from grpo_latent.rollout.vllm.model_state import LatentModelState


class LatentParameters:
    """Holds what the mechanism adds to a model, in the model's dtype.

    `modules` stands in for the model wherever a mechanism asks one for its parameters.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        text_config: PretrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.mechanism = mechanism
        self.modules = nn.Module()
        for name, value in mechanism.new_parameters(text_config, dtype, device).items():
            setattr(self.modules, name, value)
        self.modules.requires_grad_(False)
        self._never_loaded = set(self.modules.state_dict())

    @torch.no_grad()
    def take(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes on the weights of the base model, copies the latent ones.

        Raises:
            CheckpointError: one of ours has another shape.
        """
        own = self.modules.state_dict(keep_vars=True)
        for name, tensor in weights:
            if name.startswith(TARGET_MODULES):
                continue
            if not name.startswith(self.mechanism.parameter_prefixes):
                yield name, tensor
                continue
            if name not in own:
                continue  # of a head or end vector that the latent config does not use
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    "weight does not fit",
                    where=name,
                    got=tuple(tensor.shape),
                    expected=str(tuple(own[name].shape)),
                )
            own[name].copy_(tensor)
            self._never_loaded.discard(name)

    def check_loaded(self, where: str) -> None:
        """Raises `CheckpointError` if the checkpoint lacked one of ours.

        Asked after the first load only: later ones may come in pieces.
        """
        if self._never_loaded:
            raise CheckpointError(
                "weights of the latent head are missing",
                where=where,
                got=f"no {sorted(self._never_loaded)}",
                expected="the parameters that latent_config.json names",
            )


def latent_class(base: Any) -> type[nn.Module]:
    """A subclass of `base` with `latent_parameters` and the hidden states of this step.

    Args:
        base: vLLM's class of the model, known at run time only.
    """

    class LatentModelClass(base):
        """vLLM's model; keeps its name, which vLLM logs and hashes."""

        is_latent = True
        # [N, H] after the final norm: what the last `compute_logits` was given, a row a request
        # when a runner samples
        scored_hidden: Tensor | None = None

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            model_config = vllm_config.model_config
            parameters = LatentParameters(
                worker_options(vllm_config).mechanism,
                model_config.hf_text_config,
                model_config.dtype,
                torch.get_default_device(),
            )
            # past `nn.Module`, which would take their modules into its tree
            object.__setattr__(self, "latent_parameters", parameters)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return super().load_weights(self.latent_parameters.take(weights))

        def compute_logits(
            self, hidden_states: Tensor, *args: object, **kwargs: object
        ) -> Tensor | None:
            self.scored_hidden = hidden_states
            return super().compute_logits(hidden_states, *args, **kwargs)

        @classmethod
        def get_model_state_cls(cls) -> type[LatentModelState]:
            """Asked for by the V2 runner only."""
            from grpo_latent.rollout.vllm.model_state import LatentModelState

            return LatentModelState

    LatentModelClass.__name__ = base.__name__
    LatentModelClass.__qualname__ = base.__qualname__
    LatentModelClass.__module__ = base.__module__
    return LatentModelClass


def register_latent_model(architecture: str) -> None:
    """Makes this process build `architecture` with latent parameters; idempotent.

    Registering the class, not its name, also spares vLLM the subprocess in which it would inspect
    the model. In a worker process of its own, as under `vllm serve`, vLLM asks for the class
    before it makes the worker and remembers the answer.
    """
    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        raise ConfigError(
            "vLLM does not know this architecture",
            where="config.json: architectures",
            got=architecture,
            expected="one of vLLM's own",
            fix=f"Use {ENGINE_HF}.",
        )
    stock = registered.load_model_cls()
    if not getattr(stock, "is_latent", False):
        ModelRegistry.register_model(architecture, latent_class(stock))
        # the answer that was remembered is the stock class
        loader_utils._MODEL_ARCH_BY_HASH.clear()
