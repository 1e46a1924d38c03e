"""Latent checkpoints on disk: a plain Hugging Face folder plus `latent_config.json`.

`load_latent_model` reads ours and the official layouts that mechanisms know, and never writes to
the folder; `save_latent_model` writes ours. A folder that disagrees with itself raises
`CheckpointError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from grpo_latent.backbones.protocol import Backbone
from grpo_latent.backbones.registry import read_backbone
from grpo_latent.common.dtypes import parse_device
from grpo_latent.common.manifest import check_whole, write_model_manifest
from grpo_latent.errors import CheckpointError, ConfigError, GrpoLatentError
from grpo_latent.latent.mechanisms import (
    LATENT_CONFIG_FILE,
    LVR,
    MECHANISMS,
    Mechanism,
    load_mechanism,
)
from grpo_latent.latent.mechanisms.published import (
    TARGET_MODULES,
    published_mechanism,
    refuse_look_alikes,
)
from grpo_latent.latent.treatments import Treatment
from grpo_latent.latent.treatments.protocol import PARAMETERS_ATTRIBUTE
from grpo_latent.models.tokens import add_latent_tokens
from grpo_latent.models.treatment_parameters import attach_treatment


@dataclass(frozen=True)
class LatentModel:
    """A model with all that rolling it out needs. `processor` is None for text-only models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    mechanism: Mechanism
    eos_ids: tuple[int, ...]


def load_latent_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    overrides: dict | None = None,
    plain: bool = False,
    treatment: Treatment | None = None,
    seed: int = 0,
    verify_digests: bool = True,
) -> LatentModel:
    """Model, tokenizer, processor and latent config of a checkpoint folder.

    Args:
        overrides: settings of the mechanism to replace, such as `{"visibility": "full", "steps":
            4}`.
        plain: the folder is a Hugging Face model without latents: it gets LVR's tokens in memory,
            and may open no span.
        treatment: of latents in RL, for its parameters, and
        seed: which these start from if the folder has none.
        verify_digests: compare files with the folder's manifest, if it has one; False compares
            names and sizes.

    Raises:
        CheckpointError: a file is damaged, weights are missing or unknown, or tokenizer and
            `latent_config.json` disagree.
        ConfigError: a family that no backbone serves.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=str(folder), expected="a folder written by grpo_latent.sft"
        )
    device = parse_device(device)  # before minutes of loading
    check_whole(folder, verify_digests)
    check_is_model_folder(folder)
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    mechanism = None
    if plain:
        _check_plain(folder, overrides)
    else:
        mechanism = read_mechanism(folder, tokenizer)
        check_tokens(mechanism, tokenizer, where=str(folder))
        mechanism = mechanism.replace(**(overrides or {}))
    with reading("config.json", folder):
        hf_config, backbone = read_backbone(folder)
    with _latent_parameters_expected(backbone.model_class(hf_config), mechanism or LVR):
        model = _load_weights(folder, backbone, dtype, attn_implementation)
    if mechanism is None:
        mechanism = _without_spans(model, tokenizer)
    mechanism.attach(model)
    load_latent_parameters(model, mechanism, folder)
    if treatment is not None:
        attach_treatment(model, treatment, folder, seed)
    with reading("processor", folder):
        processor = AutoProcessor.from_pretrained(folder) if backbone.has_vision else None
    # as a module: transformers' wrapper of `to` has no type that can be called
    module: nn.Module = model
    module.to(device).eval()
    return LatentModel(model, tokenizer, processor, mechanism, find_eos_ids(model, tokenizer))


def _check_plain(folder: Path, overrides: dict | None) -> None:
    if not overrides and not (folder / LATENT_CONFIG_FILE).is_file():
        return
    raise ConfigError(
        "a plain model has no latents",
        where="model.plain",
        got=f"overrides {sorted(overrides)}" if overrides else f"{LATENT_CONFIG_FILE} in {folder}",
        expected="neither",
    )


def _load_weights(
    folder: Path, backbone: type[Backbone], dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The model of a folder whose weights are those of its architecture, none missing or left."""
    with reading("weights", folder):
        model, info = backbone.auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            # reported in `info`, and refused below by name and shape
            ignore_mismatched_sizes=True,
        )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        found = {
            name.removesuffix("_keys"): sorted(map(str, names))[:5]
            for name, names in info.items()
            if names
        }
        raise CheckpointError(
            "weights do not match the architecture",
            where=str(folder),
            got=found,
            expected=f"the weights of {type(model).__name__}",
        )
    return model


def _without_spans(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Mechanism:
    tokens = {role: token for role, token in LVR.published_tokens.items() if role != "latent_end"}
    return LVR.from_tokens(add_latent_tokens(model, tokenizer, tokens.values()), max_spans=0)


# where a run keeps the folder that one means, below those that one may name in its place
_MODEL_FOLDERS = ("", "huggingface", "actor/huggingface", "model")


def check_is_model_folder(folder: str | Path) -> None:
    """Raises `CheckpointError` without config.json, naming the model's folder if it is near."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return
    refuse_look_alikes(folder, {}, {})
    near = [
        base / name
        for base in (folder, *list(folder.absolute().parents)[:3])
        for name in _MODEL_FOLDERS
    ]
    found = next((place for place in near if (place / "config.json").is_file()), None)
    raise CheckpointError(
        "no model in this folder",
        where=str(folder),
        got=sorted(path.name for path in folder.iterdir())[:10]
        if folder.is_dir()
        else "no folder",
        expected="a Hugging Face folder: config.json with its model_type, weights, tokenizer",
        fix=f"Did you mean {found}?" if found else "Run python -m grpo_latent.sft first.",
    )


@contextmanager
def reading(what: str, folder: str | Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise on a damaged folder into `CheckpointError`."""
    try:
        yield
    except GrpoLatentError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the {what}",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            expected="a Hugging Face folder",
            fix="Copy or write the checkpoint again.",
        ) from error


@contextmanager
def _latent_parameters_expected(
    model_class: type[PreTrainedModel], mechanism: Mechanism | type[Mechanism]
) -> Iterator[None]:
    """Keeps transformers from reporting latent parameters as unexpected.

    `load_latent_parameters` reads the mechanism's; only a run with a treatment needs that one's.
    """
    known = model_class._keys_to_ignore_on_load_unexpected
    ours = (*mechanism.parameter_prefixes, f"{PARAMETERS_ATTRIBUTE}.", *TARGET_MODULES)
    own = [f"^{re.escape(prefix)}" for prefix in ours]
    model_class._keys_to_ignore_on_load_unexpected = [*(known or []), *own]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = known


def save_latent_model(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    mechanism: Mechanism,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes a folder that `load_latent_model`, and any Hugging Face program, can read.

    Args:
        state_dict: the weights, where the model itself holds shards of them; None takes the
            model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_tokens(mechanism, tokenizer, where=str(folder))
    model.save_pretrained(folder, state_dict=state_dict)
    (processor or tokenizer).save_pretrained(folder)
    # after the processor, which writes a tokenizer of its own that may lack the latent tokens
    tokenizer.save_pretrained(folder)
    mechanism.save(folder)
    write_model_manifest(folder)


def read_mechanism(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Mechanism:
    """The mechanism of `latent_config.json`, or of a published checkpoint in a known layout."""
    found = find_mechanism(folder, tokenizer)
    # `load_mechanism` raises here: a plain model has no latents
    return load_mechanism(folder) if found is None else found


def find_mechanism(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Mechanism | None:
    """As `read_mechanism`; None of a plain model."""
    folder = Path(folder)
    config_path = folder / "config.json"
    if (folder / LATENT_CONFIG_FILE).is_file():
        return load_mechanism(folder)
    if not config_path.is_file():
        return None
    fields = json.loads(config_path.read_text())
    refuse_look_alikes(folder, fields, tokenizer.get_vocab())
    for cls in MECHANISMS.values():
        found = cls.official_layout(fields, tokenizer, where=str(config_path))
        if found is not None:
            return found
    return published_mechanism(fields, tokenizer, where=str(config_path))


def check_tokens(mechanism: Mechanism, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises `CheckpointError` unless the tokenizer maps each latent token to its id."""
    for role, (token, token_id) in mechanism.roles.items():
        actual = None if token is None else tokenizer.get_vocab().get(token)
        if actual != token_id:
            raise CheckpointError(
                f"the tokenizer disagrees with {LATENT_CONFIG_FILE} on the {role} token",
                where=where,
                got=f"{token!r} -> {actual}",
                expected=f"{token!r} -> {token_id}",
                fix="Tokenizer and latent_config.json must come from the same SFT run.",
            )


def load_latent_parameters(model: nn.Module, mechanism: Mechanism, folder: str | Path) -> None:
    """Fills what `Mechanism.attach` made from the folder's safetensors.

    Raises:
        CheckpointError: a parameter of the head or end vector is not in the folder, or has another
            shape.
    """
    prefixes = mechanism.parameter_prefixes
    own = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)
    }
    for name, tensor in read_tensors(folder, prefixes):
        if name in own:
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    "weight does not fit",
                    where=f"{folder}: {name}",
                    got=tuple(tensor.shape),
                    expected=str(own[name].shape),
                )
            # `state_dict` gives the parameters' own memory, detached: gradients do not see the
            # copy
            own.pop(name).copy_(tensor)
    if own:
        raise CheckpointError(
            "weights of the latent head are missing",
            where=str(folder),
            got=f"no {sorted(own)}",
            expected="the parameters that latent_config.json names",
        )


def read_tensors(folder: str | Path, prefixes: tuple[str, ...]) -> Iterable[tuple[str, Tensor]]:
    """Tensors of the folder's safetensors files whose names start with one of `prefixes`."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.startswith(prefixes):
                    yield name, file.get_tensor(name)


def tensor_names(folder: str | Path) -> Iterator[str]:
    """Names of the tensors in the folder's safetensors files."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def fitting_weights(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], where: str
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on that are to replace all of a model's, by the names of its `state_dict`.

    Each is checked when it is asked for, and at the end that none was left out.

    Raises:
        CheckpointError: an unknown name, another shape, or a weight that was not given.
    """
    own = model.state_dict(keep_vars=True)
    missing = {id(tensor) for tensor in own.values()}
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            expected = (
                tuple(own[name].shape) if name in own else "a name of the model's state_dict"
            )
            raise CheckpointError(
                "weight does not fit",
                where=f"{where}: {name}",
                got=f"shape {tuple(tensor.shape)}",
                expected=str(expected),
            )
        # by identity: tied weights arrive under one of their names
        missing.discard(id(own[name]))
        yield name, tensor
    if missing:
        names = sorted(name for name, tensor in own.items() if id(tensor) in missing)
        raise CheckpointError(
            "weights are missing", where=where, got=names[:5], expected="all weights"
        )


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copies all weights of a model in place; arguments and errors as `fitting_weights`."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in fitting_weights(model, weights, where):
        own[name].copy_(tensor)


def find_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All end-of-sequence ids: the generation config's and the tokenizer's."""
    configured = (
        model.generation_config.eos_token_id if model.generation_config is not None else None
    )
    ids = set(configured if isinstance(configured, list) else [configured]) | {
        tokenizer.eos_token_id
    }
    ids.discard(None)
    if not ids:
        raise CheckpointError(
            "no end-of-sequence token",
            where="generation_config and tokenizer",
            expected="eos_token_id",
        )
    return tuple(sorted(ids))
