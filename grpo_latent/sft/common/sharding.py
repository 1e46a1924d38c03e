"""Full weights over several processes: FSDP2 through accelerate, laid out for latents.

    unit of its own     each decoder layer, gathered for its forward and its backward
    the root's unit     embeddings, norm, head, a vision tower that trains, the mechanism's own
    every rank's own    frozen parameters of the vision tower

Gathering is a collective: ranks must run the units' forwards equally often, and in one order. What
a rank calls as often as its rows ask for (embeddings of pieces, logits, the tower of rows with
images) therefore belongs to the root, which is gathered once a step, or is not sharded at all.

A unit's backward needs its weights again, and they are gathered where the gradient of its output
arrives. With latents a forward's last states may lead nowhere, while its keys and values do: so
each forward of the decoder is joined to the loss, with the gradient 0. And its gradients are
reduced where one reaches its input: so each input takes one, a constant (IVT-LR's h) too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import ParallelMode

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.sft.common.settings import ModelSettings

# of `trainer.fsdp_config`; the layout is this module's
_KEYS = {"reshard_after_forward"}


def check_sharding(args: TrainingArguments, trainer: dict[str, Any], model: ModelSettings) -> None:
    """Refuses what would train something else than asked, or could not be saved.

    Args:
        trainer: the config's section: `args` has transformers' defaults as well.
    """
    config = trainer.get("fsdp_config") or {}
    refused = {
        "DeepSpeed": bool(args.deepspeed),
        "FSDP with LoRA": bool(args.fsdp) and model.lora.enabled,
        # optimizer and teacher would be in half precision as well
        "FSDP with model.dtype=bfloat16": bool(args.fsdp) and model.dtype != "float32",
        f"trainer.fsdp_config {sorted(set(config) - _KEYS)}": bool(set(config) - _KEYS),
        "FSDP by trainer.use_cpu beside a GPU": bool(args.fsdp)
        and args.use_cpu
        and torch.cuda.is_available(),
    }
    for got, is_asked in refused.items():
        if is_asked:
            raise ConfigError(
                "not supported",
                where="trainer.deepspeed, trainer.fsdp, model",
                got=got,
                expected="one process, data parallelism, or trainer.fsdp=true with all weights in "
                "float32",
                fix="trainer.bf16=true computes in bfloat16 over them; adapters train under data "
                "parallelism (trainer.fsdp=false); CUDA_VISIBLE_DEVICES= hides GPUs.",
            )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ConfigError(
            "shards need a launcher",
            where="trainer.fsdp",
            got="one process without a process group",
            expected="torchrun, with any number of processes",
            fix="torchrun --nproc_per_node 1 -m grpo_latent.sft …, or trainer.fsdp=false.",
        )


def plugin_values(adapter: ModelAdapter, args: TrainingArguments) -> dict[str, Any]:
    """Values of accelerate's FSDP plugin that lay a model out as this module says.

    Raises:
        ConfigError: a model whose decoder has its layers under another name (GPT-2).
    """
    if not hasattr(adapter.decoder, "layers"):
        raise ConfigError(
            "shards of this model are not laid out",
            where="trainer.fsdp",
            got=adapter.text_config.model_type,
            expected="a decoder with `layers`, such as Qwen's",
            fix="trainer.fsdp=false (weights=whole).",
        )
    frozen = [
        module
        for tower in adapter.backbone.vision_modules
        for module in tower.modules()
        if not any(parameter.requires_grad for parameter in module.parameters())
    ]
    for module in frozen:
        module.to(args.device)  # FSDP moves what it shards
    return {
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": [type(adapter.decoder.layers[0]).__name__],
        "state_dict_type": "SHARDED_STATE_DICT",
        "mixed_precision_policy": precision(args),
        "ignored_modules": frozen,
    }


def precision(args: TrainingArguments) -> MixedPrecisionPolicy:
    """What is gathered and reduced in which type: bfloat16 is gathered, gradients stay float32."""
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.bf16 else None,
        reduce_dtype=torch.float32,
        # losses are sums in float32, targets too: neither may be cast on its way
        cast_forward_inputs=False,
    )


@contextmanager
def embeddings_in_the_root(model: nn.Module) -> Iterator[None]:
    """Within the block, accelerate does not find the embeddings and makes no units of them."""
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def shard_frozen_copy(
    model: PreTrainedModel, args: TrainingArguments, whole: set[nn.Parameter]
) -> None:
    """Shards a model that does not train (a teacher) like the student beside it.

    Args:
        whole: parameters that stay so.
    """
    policy = precision(args)
    nn.Module.to(model, args.device)
    for layer in ModelAdapter(model).decoder.layers:
        fully_shard(layer, mp_policy=policy, ignored_params=whole)
    # no backward comes that would let go of what the root has gathered
    fully_shard(model, mp_policy=policy, ignored_params=whole, reshard_after_forward=True)


class JoinedForwards:
    """Joins every forward of a model's decoder to the losses of the call that ran it."""

    def __init__(self, adapter: ModelAdapter):
        self.adapter = adapter
        self._hidden: list[Tensor] = []
        adapter.decoder.register_forward_pre_hook(_with_gradient, with_kwargs=True)
        adapter.decoder.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled() and output.last_hidden_state.requires_grad:
            self._hidden.append(output.last_hidden_state)

    def around(
        self, compute: Callable[..., dict[str, Tensor]]
    ) -> Callable[..., dict[str, Tensor]]:
        """Makes of a function that sums losses one whose `ce` reaches all that ranks share."""

        def joined(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            self._hidden.clear()
            sums = compute(*args, **kwargs)
            # a rank whose rows have no image reduces the tower's gradients all the same
            tower = [
                parameter
                for module in self.adapter.backbone.vision_modules
                for parameter in module.parameters()
                if parameter.requires_grad
            ]
            sums["ce"] = _Joined.apply(sums["ce"], *self._hidden, *tower)
            self._hidden.clear()
            return sums

        return joined


def _with_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    embeds_BTH = kwargs.get("inputs_embeds")
    if torch.is_grad_enabled() and embeds_BTH is not None and not embeds_BTH.requires_grad:
        kwargs = kwargs | {"inputs_embeds": embeds_BTH.detach().requires_grad_()}
    return args, kwargs


class _Joined(torch.autograd.Function):
    """Passes the first tensor on; the others get the gradient 0."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others
        )
        return (grads[0], *zeros)


def most_of_ranks(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@torch.no_grad()
def gathered_weights(model: nn.Module, is_main: bool) -> dict[str, Tensor]:
    """Weights of a sharded model in the main process's host memory; nothing elsewhere.

    A collective. One tensor at a time is whole on a device.
    """
    weights: dict[str, Tensor] = {}
    # tied weights stay one tensor, by which saving knows them
    whole_of: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole_of:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole_of[id(tensor)] = whole.detach().cpu() if is_main else whole.new_empty(0)
            del whole  # before the next one is gathered
        if is_main:
            weights[name] = whole_of[id(tensor)]
    return weights
