"""LoRA in the latent engine: what is adapted, what trains beside it, weights with adapters merged.

    decoder's linear layers   adapters A, B; W frozen
    `latent.lora_trains`      the mechanism's parameters, lm_head: trained whole, or frozen
    treatment's parameters    trained whole
    all else                  frozen

verl's reference is the actor without its adapters; what trains whole has to go back to its start
there, too: `StartValues`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from verl.utils.device import get_device_id
from verl.utils.py_functional import convert_to_regular_types

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.verl_plugin.boot.options import LM_HEAD, TRAINED_LATENTS, LatentOptions

ALL_LINEAR = "all-linear"
_BASE = "base_model.model."  # what peft puts before a plain model's names
_ADAPTER = "default"  # peft's name of the first one


def add_adapters(
    model: PreTrainedModel, model_config, mechanism: Mechanism, options: LatentOptions
) -> PeftModel:
    """Puts adapters into the decoder, freezes what shall not train; before FSDP wraps the model.

    As verl does it, but for the vision tower and the latent head, which `all-linear` would adapt,
    too. Torch's generator stays where it was.

    Args:
        model_config: verl's, for `lora_rank`, `lora_alpha`, `target_modules`, `exclude_modules`.

    Raises:
        ConfigError: `target_modules` names no linear layer of the decoder.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model_config.lora_rank,
        lora_alpha=model_config.lora_alpha,
        target_modules=_targets(model, model_config),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        # FSDP wants one dtype in a group: that of the weights
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    prefixes = options.treatment.parameter_prefixes
    if TRAINED_LATENTS in options.lora_trains:
        prefixes += mechanism.parameter_prefixes
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(True)
    if LM_HEAD in options.lora_trains:
        model.get_output_embeddings().get_parameter("weight").requires_grad_(True)
    return adapted


def _targets(model: PreTrainedModel, model_config) -> list[str]:
    """Full names of the decoder's linear layers that verl's two settings choose."""
    in_decoder = {id(module) for module in backbone_of(model).decoder.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in in_decoder
    ]
    wanted = convert_to_regular_types(model_config.target_modules)
    excluded = convert_to_regular_types(model_config.exclude_modules)
    rule = LoraConfig(
        target_modules=linear if wanted == ALL_LINEAR else wanted, exclude_modules=excluded
    )
    targets = [name for name in linear if check_target_module_exists(rule, name)]
    names = [] if isinstance(wanted, str) else wanted
    unmatched = [w for w in names if not any(f".{name}".endswith(f".{w}") for name in linear)]
    if unmatched or not targets:
        raise ConfigError(
            "no such linear layer in the decoder",
            where="actor_rollout_ref.model.target_modules",
            got=unmatched or f"{wanted} without {excluded}",
            expected=f"{ALL_LINEAR}, last names such as q_proj, or a pattern for the whole name",
            fix=f"The first layer's are {', '.join(linear[:8])}.",
        )
    return targets


def full_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of each weight; gathers shards, so every rank must iterate."""
    for name, tensor in state.items():
        yield name, full_tensor(tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A weight as a whole, on the device; a collective."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    shard = tensor.to(get_device_id())
    assert isinstance(shard, DTensor)  # torch's annotation of `to` loses the class
    return shard.full_tensor()


def merged_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `full_tensors`, of the plain model: W + scaling · B A under its own names.

    The module keeps its weights as they are: verl's own way merges into them, and takes a copy of
    all of them to go back to.
    """
    state = module.state_dict()
    layers = {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        whole = full_tensor(tensor)
        layer, is_adapted, attribute = name.partition(".base_layer.")
        if is_adapted and attribute == "weight":
            a_RI, b_OR = (full_tensor(state[f"{layer}.lora_{s}.{_ADAPTER}.weight"]) for s in "AB")
            delta_OI = layers[layer].scaling[_ADAPTER] * (b_OR.float() @ a_RI.float())
            whole = (whole.float() + delta_OI).to(whole.dtype)
        yield name.removeprefix(_BASE).replace(".base_layer.", "."), whole


class StartValues:
    """What trains whole beside the adapters, as it was when the run began; this rank's shards.

    Args:
        module: wrapped, with the weights of the model's folder.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._parameters = [
            parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        ]
        self._start = [_local(parameter).clone() for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts them in the place of the trained ones, which come back at the end."""
        self._reshard()
        trained = [_local(parameter).clone() for parameter in self._parameters]
        self._put(self._start)
        try:
            yield
        finally:
            self._reshard()
            self._put(trained)

    def _reshard(self) -> None:
        """Drops gathered weights, which `reshard_after_forward=False` keeps for later forwards."""
        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            _local(parameter).copy_(value)


def _local(parameter: Tensor) -> Tensor:
    """A rank's shard, which shares the parameter's memory."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
