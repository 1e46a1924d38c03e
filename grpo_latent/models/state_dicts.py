"""IVT-LR's checkpoints: one `torch.save` of a state dict, of a model with adapters in it.

    base_causallm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight   W
                                               …q_proj.lora_A.default.weight           A [r, in]
                                               …q_proj.lora_B.default.weight           B [out, r]
    embedding.weight                                                                   the same again

It is read weights-only, each adapter is added to its layer (W + alpha / r · B A, published with
alpha 16 at any r), and names become those of the base model's class.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import IVTLR
from grpo_latent.models.loading import LatentModel, find_eos_ids
from grpo_latent.models.plain import load_plain
from grpo_latent.models.tokens import add_latent_tokens

PUBLISHED_ALPHA = 16.0
# in front of the base model's own names: data parallelism, the wrapper of latents, peft
_WRAPPERS = ("module.", "base_causallm.", "base_model.model.")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_ALIAS = "embedding.weight"  # of the wrapper: the embeddings once more
# the order in which the published code adds them, not that of `IVTLR.published_tokens`
_TOKEN_ORDER = ("start", "end", "latent")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file; nothing else in it is unpickled.

    Raises:
        CheckpointError: not a file of tensors by name.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "not a file of weights",
            where=str(path),
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a state dict saved by torch.save",
        ) from error
    are_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )
    if not are_tensors or not state:
        raise CheckpointError(
            "not a state dict",
            where=str(path),
            got=type(state).__name__,
            expected="tensors by name",
        )
    return state


def merged(state: Mapping[str, Tensor], alpha: float = PUBLISHED_ALPHA) -> dict[str, Tensor]:
    """The base model's weights, adapters added; sums are made in float32.

    Raises:
        CheckpointError: an adapter without its layer or its other half.
    """
    plain = {_unwrapped(name): tensor for name, tensor in state.items() if name != _ALIAS}
    found = {
        name.replace(_BASE, "."): tensor
        for name, tensor in plain.items()
        if not name.endswith((_A, _B))
    }
    for name in sorted(plain):
        if not name.endswith((_A, _B)):
            continue
        layer = name.removesuffix(_A).removesuffix(_B)
        a_RI, b_OR = plain.get(f"{layer}{_A}"), plain.get(f"{layer}{_B}")
        weight_OI = found.get(f"{layer}.weight")
        if a_RI is None or b_OR is None or weight_OI is None:
            raise CheckpointError(
                "half an adapter",
                where=name,
                got=f"no {_A}, {_B} or weight beside it",
                expected="the layer's weight and both halves",
            )
        if name.endswith(_A):
            change_OI = alpha / a_RI.shape[0] * (b_OR.float() @ a_RI.float())
            found[f"{layer}.weight"] = (weight_OI.float() + change_OI).to(weight_OI.dtype)
    return found


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Copies all weights into a model whose class may name them as transformers 4.51 did not.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    left = dict(weights)
    missing = []
    with torch.no_grad():
        for name, own in model.state_dict().items():
            names = (
                name,
                name.replace("model.language_model.", "model."),
                name.replace("model.visual.", "visual."),
            )
            known = next((alias for alias in names if alias in left), None)
            if known is None or left[known].shape != own.shape:
                missing.append(name)
            else:
                own.copy_(left.pop(known))
    # tied to the embeddings: saved twice, or once
    missing = [name for name in missing if not _is_tied(model, name)]
    if missing or left:
        raise CheckpointError(
            "weights do not match the architecture",
            where=where,
            got={"missing or of another shape": missing[:5], "unexpected": sorted(left)[:5]},
            expected=f"the weights of {type(model).__name__}",
            fix="Name the folder of the model that these weights were trained from.",
        )


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return name == "lm_head.weight" and bool(model.config.tie_word_embeddings)


def load_ivt_lr(
    path: str | Path, base: str | Path, dtype: torch.dtype, **settings: int
) -> LatentModel:
    """IVT-LR of a published file, on the model that it was trained from.

    Args:
        path: the `torch.save` file.
        base: folder of the base model; only read.
        settings: of the mechanism, such as `steps`; published are 3 slots of 32 image embeddings.

    Raises:
        CheckpointError: the file is no state dict, or does not fit the base model.
    """
    weights = merged(read_state_dict(path))
    model, tokenizer, processor = load_plain(str(base), dtype, "sdpa")
    ids = add_latent_tokens(
        model, tokenizer, [IVTLR.published_tokens[role] for role in _TOKEN_ORDER]
    )
    if processor is not None:
        processor.tokenizer = tokenizer
    # the published code cuts the padding of the vocabulary off
    model.resize_token_embeddings(len(tokenizer))
    fill(model, weights, str(path))
    mechanism = IVTLR.from_tokens(ids, **settings)
    mechanism.attach(model)
    return LatentModel(model, tokenizer, processor, mechanism, find_eos_ids(model, tokenizer))
