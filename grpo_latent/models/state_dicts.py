"""Checkpoints that are a file of weights: IVT-LR's, Coconut's, CODI's.

IVT-LR's is a `torch.save` of a state dict, of a model with adapters in it.

    base_causallm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight   W
                                               …q_proj.lora_A.default.weight           A [r, in]
                                               …q_proj.lora_B.default.weight           B [out, r]
    embedding.weight                                                                 the same again

It is read weights-only, each adapter is added to its layer (W + alpha / r · B A, published with
alpha 16 at any r), and names become those of the base model's class.

    Coconut   base_causallm.model.layers.0.self_attn.q_proj.weight, and embedding.weight again
    CODI      codi.base_model.model.model.layers.0…q_proj.{base_layer, lora_A.default, …}.weight,
              prj.{1, 3}.{weight, bias}, prj.ln.{weight, bias}; alpha 32

Both decode a question, a start token that nobody samples, six latents, an end token, then text:
spans whose start is forced. Neither has a chat template; the question alone is the prompt.
"""

from __future__ import annotations

import pickle
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.pytorch_utils import Conv1D

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import ILVR, IVTLR
from grpo_latent.latent.mechanisms.fed_back import HEAD_ATTRIBUTE
from grpo_latent.latent.mechanisms.slots import SLOT_TOKENS
from grpo_latent.latent.mechanisms.spans import FORCED_START, STEPS
from grpo_latent.models.loading import LatentModel, find_eos_ids
from grpo_latent.models.plain import load_plain
from grpo_latent.models.tokens import add_latent_tokens

PUBLISHED_ALPHA = 16.0
CODI_ALPHA = 32.0
NUM_LATENTS = 6  # Coconut: 3 stages of 2, or 6 of 1; CODI: 6
# in front of the base model's own names: data parallelism, the wrapper of latents, peft
_WRAPPERS = ("module.", "base_causallm.", "codi.", "base_model.model.")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_ALIAS = "embedding.weight"  # of the wrapper: the embeddings once more
# the order in which the published code adds them, not that of `IVTLR.published_tokens`
_TOKEN_ORDER = ("start", "end", "latent")
# CODI's have ids only, behind the vocabulary: padding, which no row of ours needs, start, end
_CODI_TOKENS = {"latent": "<|codi-pad|>", "start": "<|codi-bot|>", "end": "<|codi-eot|>"}
_CODI_HEAD = {"prj.1.": "mlp.0.", "prj.3.": "mlp.2.", "prj.ln.": "ln."}


def load_weights_file(path: str | Path, base: str | Path, dtype: torch.dtype) -> LatentModel:
    """A published file of weights on the model that it was trained from, which the file names.

    Args:
        path: IVT-LR's, Coconut's or CODI's file.
        base: folder of the base model; only read.

    Raises:
        CheckpointError: the file is none of these, or does not fit the base model.
    """
    state = read_state_dict(path)
    names = [name.removeprefix("module.") for name in state]
    if any(name.startswith("codi.") for name in names):
        return _load_codi(state, path, base, dtype)
    if not any(name.startswith("base_causallm.") for name in names):
        raise CheckpointError(
            "weights of no system that is known",
            where=str(path),
            got=sorted(names)[:3],
            expected="names that begin with base_causallm. (IVT-LR, Coconut) or codi. (CODI)",
        )
    _, backbone = read_backbone(base)
    if backbone.has_vision:
        return _load_ivt_lr(state, path, base, dtype)
    return _load_coconut(state, path, base, dtype)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` or safetensors file; nothing else is unpickled.

    Raises:
        CheckpointError: not a file of tensors by name.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
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


def merged(
    state: Mapping[str, Tensor],
    alpha: float = PUBLISHED_ALPHA,
    transposed: Container[str] = frozenset(),
) -> dict[str, Tensor]:
    """The base model's weights, adapters added; sums are made in float32.

    Args:
        transposed: names of layers whose weight is [in, out] (GPT-2's `Conv1D`).

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
            change_OI = change_OI.T if layer in transposed else change_OI
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


def _load_ivt_lr(
    state: Mapping[str, Tensor], path: str | Path, base: str | Path, dtype: torch.dtype
) -> LatentModel:
    """Three slots of 32 image embeddings, as published."""
    weights = merged(state)
    model, tokenizer, processor = load_plain(str(base), dtype, "sdpa")
    ids = add_latent_tokens(
        model, tokenizer, [IVTLR.published_tokens[role] for role in _TOKEN_ORDER]
    )
    if processor is not None:
        processor.tokenizer = tokenizer
    # the published code cuts the padding of the vocabulary off
    model.resize_token_embeddings(len(tokenizer))
    fill(model, weights, str(path))
    mechanism = IVTLR.from_tokens(ids)
    mechanism.attach(model)
    return LatentModel(model, tokenizer, processor, mechanism, find_eos_ids(model, tokenizer))


def _load_coconut(
    state: Mapping[str, Tensor], path: str | Path, base: str | Path, dtype: torch.dtype
) -> LatentModel:
    model, tokenizer, processor = load_plain(str(base), dtype, "sdpa")
    # in this order; with the embeddings as they are in the file, the base's do not matter
    ids = add_latent_tokens(model, tokenizer, [SLOT_TOKENS[role] for role in _TOKEN_ORDER])
    model.resize_token_embeddings(len(tokenizer))
    fill(model, merged(state), str(path))
    _ask_plainly(tokenizer, "\n")
    return _spans_of_text(model, tokenizer, processor, ids, SLOT_TOKENS)


def _load_codi(
    state: Mapping[str, Tensor], path: str | Path, base: str | Path, dtype: torch.dtype
) -> LatentModel:
    model, tokenizer, processor = load_plain(str(base), dtype, "sdpa")
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    size = weight.shape[0]
    if size != len(tokenizer):
        raise CheckpointError(
            "CODI's tokens stand behind the model's vocabulary, where this tokenizer has none",
            where=str(base),
            got=f"{size} embeddings, {len(tokenizer)} tokens",
            expected="as many of both, as Llama 3.2 and GPT-2 have",
        )
    ids = add_latent_tokens(model, tokenizer, list(_CODI_TOKENS.values()))
    model.resize_token_embeddings(len(tokenizer))
    transposed = {name for name, part in model.named_modules() if isinstance(part, Conv1D)}
    weights = merged(state, CODI_ALPHA, transposed)
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("prj.")}
    fill(model, weights, str(path))
    _ask_plainly(tokenizer, "")
    loaded = _spans_of_text(
        model, tokenizer, processor, ids, _CODI_TOKENS, head="projection" if head else "none"
    )
    if head:
        _fill_head(getattr(model, HEAD_ATTRIBUTE), head, str(path))
    return loaded


def _spans_of_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    ids: Mapping[str, int],
    tokens: Mapping[str, str],
    head: str = "none",
) -> LatentModel:
    mechanism = ILVR.from_tokens(
        ids,
        steps=NUM_LATENTS,
        exit=STEPS,
        max_spans=1,
        start=FORCED_START,
        start_is_action=False,
        head=head,
        **{f"{role}_token": token for role, token in tokens.items()},
    )
    mechanism.attach(model)
    return LatentModel(model, tokenizer, processor, mechanism, find_eos_ids(model, tokenizer))


def _ask_plainly(tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    """Makes the question the whole prompt, with what the tokenizer itself puts in front."""
    front = tokenizer.decode(tokenizer("").input_ids)
    # in the expression: a template's own last line break is dropped
    tokenizer.chat_template = f"{front}{{{{ messages[-1]['content'] + {end!r} }}}}"


def _fill_head(module: torch.nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    renamed = {}
    for name, value in weights.items():
        prefix = next((old for old in _CODI_HEAD if name.startswith(old)), "")
        renamed[_CODI_HEAD.get(prefix, "?") + name.removeprefix(prefix)] = value
    own = module.state_dict()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in renamed.items()}:
        raise CheckpointError(
            "another projection",
            where=where,
            got={name: tuple(value.shape) for name, value in weights.items()},
            expected=str({name: tuple(value.shape) for name, value in own.items()}),
            fix="CODI's prj_dim has to be the hidden size, and its layer norm kept.",
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(renamed[name])
