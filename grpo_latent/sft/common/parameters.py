"""Which parameters SFT trains: freezing, LoRA, and the embeddings of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter

NO_DECAY = "no_weight_decay"  # attribute of parameters that the optimizer leaves undecayed


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on linear layers of the text decoder.

    Attributes:
        r, alpha: rank, and scale times rank.
        target_modules: last names of the layers that get one.
    """

    enabled: bool = False
    r: int = 64
    alpha: int = 128
    dropout: float = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


def freeze_vision(model: PreTrainedModel, tower: bool = True, merger: bool = True) -> None:
    """Freezes the vision tower, its mergers, or both, as the published stages 1 do.

    Text-only models have neither. Chameleon's VQ model, which no gradient reaches, always is.
    """
    backbone = ModelAdapter(model).backbone
    mergers = {id(parameter) for parameter in backbone.merger_parameters()}
    for module in backbone.vision_modules:
        for parameter in module.parameters():
            is_frozen = merger if id(parameter) in mergers else tower
            parameter.requires_grad_(backbone.trains_vision and not is_frozen)


def vision_is_frozen(model: PreTrainedModel) -> bool:
    modules = ModelAdapter(model).backbone.vision_modules
    return not any(
        parameter.requires_grad for module in modules for parameter in module.parameters()
    )


def add_lora(
    model: PreTrainedModel,
    settings: LoraSettings,
    new_token_ids: Sequence[int],
    own_prefixes: tuple[str, ...] = (),
) -> None:
    """Puts adapters into the decoder, in place, and freezes the base.

    What the mechanism added and new tokens' rows train with them. What trains is in float32 even
    over a base in half precision, which would round small updates away.

    In place, not as a `PeftModel`: the model keeps its class, its names and its latent hooks. The
    embedding matrices stay trainable as a whole and the gradient of old rows is set to 0, so the
    optimizer holds state for all of them.

    Args:
        own_prefixes: names of the mechanism's own parameters begin so.
    """
    from peft import LoraConfig, inject_adapter_in_model

    decoder = ModelAdapter(model).decoder
    in_decoder = {id(module) for module in decoder.modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in in_decoder
        and name.split(".")[-1] in settings.target_modules
    ]
    unmatched = sorted(set(settings.target_modules) - {name.split(".")[-1] for name in targets})
    if unmatched or not targets:
        raise ConfigError(
            "no such linear layer in the decoder",
            where="model.lora.target_modules",
            got=unmatched,
            expected="last names of linear layers, such as q_proj",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name.startswith(own_prefixes):
            parameter.requires_grad_(True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.get_parameter("weight")
        if new_token_ids and not weight.requires_grad:  # tied weights come twice
            _train_rows(weight, new_token_ids)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _train_rows(weight: nn.Parameter, rows: Sequence[int]) -> None:
    keep_V1 = torch.zeros(weight.shape[0], 1, dtype=weight.dtype)
    keep_V1[list(rows)] = 1
    weight.requires_grad_(True)

    def only_rows(gradient: Tensor) -> Tensor:
        return gradient * keep_V1.to(gradient.device)

    weight.register_hook(only_rows)
    # decoupled decay would move the old rows all the same; `get_decay_parameter_names` reads it
    setattr(weight, NO_DECAY, True)


def has_lora(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def merge_lora(model: nn.Module) -> int:
    """Adds the adapters to the weights and takes them out, in place; returns their number."""
    if not has_lora(model):
        return 0
    from peft.tuners.lora import LoraLayer

    # a list: the loop below replaces modules while it would walk over them
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    dtype = layers[0][1].get_base_layer().get_parameter("weight").dtype
    for name, module in layers:
        module.merge(safe_merge=True)  # refuses NaN
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    model.to(dtype)  # what trained was wider than a base in half precision
    return len(layers)
