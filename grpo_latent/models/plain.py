"""A Hugging Face model without latents, and how it gets them without any SFT.

    plain folder ──load_plain──▶ model, tokenizer, processor
                 ──add_latents──▶ a folder that RL can start from
                 ──write_as_text──▶ a folder that opens no span, its prompts with a prefill

Systems that learn their latents in RL alone (HRPO's gate), and baselines of an untrained
mechanism, begin so. So do systems whose latents are tokens: nothing is fed back to be recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.common.manifest import check_whole
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import MECHANISMS, Mechanism
from grpo_latent.latent.mechanisms.published import find_look_alike
from grpo_latent.models.loading import (
    find_mechanism,
    load_latent_model,
    reading,
    save_latent_model,
)
from grpo_latent.models.tokens import add_latent_tokens


class PlainModel(NamedTuple):
    """`processor` is None for text-only models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None


def load_plain(
    path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "sdpa",
    verify_digests: bool = True,
) -> PlainModel:
    """Model, tokenizer and processor of a folder, or of a model on the hub.

    Args:
        dtype: "auto" takes the one that the weights have.
        verify_digests: as `load_latent_model`.

    Raises:
        CheckpointError: no such folder, or one that is damaged or of another architecture than
            it says.
        ConfigError: a family that no backbone serves.
    """
    # transformers would take a folder that is missing for a name on the hub
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise CheckpointError(
            "no such folder",
            where="model.path",
            got=path,
            expected="a Hugging Face folder, or owner/name of a model on the hub",
        )
    if Path(path).is_dir():
        check_whole(path, verify_digests)
    with reading("config.json", path):
        _, backbone = read_backbone(path)
    with reading("tokenizer and processor", path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = AutoProcessor.from_pretrained(path) if backbone.has_vision else None
    with reading("weights", path):
        model, info = backbone.auto_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(
            "weights do not match the architecture",
            where=path,
            got=f"missing {sorted(info['missing_keys'])[:5]}, "
            f"unknown {sorted(info['unexpected_keys'])[:5]}",
            expected=f"the weights of {type(model).__name__}",
        )
    return PlainModel(model, tokenizer, processor)


def add_latents(
    path: str,
    output: str | Path,
    mechanism: str | type[Mechanism],
    settings: dict | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
) -> Mechanism:
    """Writes a plain model as a latent checkpoint.

    Tokens are added and the mechanism's parameters start fresh; all else stays as it was.

    Args:
        path: folder or model on the hub; only read.
        output: a folder that is not there yet, or empty.
        mechanism: name, package.module:Class, or class.
        settings: of the mechanism, as `Mechanism.from_tokens` takes them; by default those
            that were published.
        seed: of the new embeddings and parameters.

    Raises:
        CheckpointError: the folder cannot be read.
        ConfigError: it has latents already, `output` is taken, or the settings cannot run.
    """
    output = Path(output)
    settings = dict(settings or {})
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            "the output exists",
            where="output",
            got=str(output),
            expected="a new or an empty folder",
        )
    cls = (
        MECHANISMS.find(mechanism, "latent.mechanism") if isinstance(mechanism, str) else mechanism
    )
    plain = load_plain(path, dtype)
    found = find_mechanism(path, plain.tokenizer) if Path(path).is_dir() else None
    if found is not None:
        raise ConfigError(
            "the model has latents already",
            where=path,
            got=found.key(),
            expected="a plain Hugging Face model",
            fix="Train that folder as it is, or start from the model before its SFT.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = add_latent_tokens(plain.model, plain.tokenizer, cls.tokens_of(settings).values())
        made = cls.from_tokens(ids, **settings)
        made.attach(plain.model)
    if plain.processor is not None:
        plain.processor.tokenizer = plain.tokenizer
    save_latent_model(output, plain.model, plain.tokenizer, plain.processor, made)
    return made


def write_as_text(
    path: str | Path, output: str | Path, prefill: str = "", dtype: torch.dtype = torch.float32
) -> Mechanism:
    """Writes a model whose latents are ordinary tokens as a policy of text.

    Slots with embeddings of their own, which a prefill of the answer holds (Mull-Tokens) or the
    model's own template writes (LaViT), are then prompt: no action, nothing to record or replay.

    Args:
        path: a folder without fed-back latents; only read.
        output: a folder that is not there yet.
        prefill: what stands behind every prompt, where the template asks for an answer.

    Raises:
        CheckpointError: the folder cannot be read.
        ConfigError: its latents are fed back.
    """
    folder = Path(path)
    loaded = load_latent_model(folder, dtype, plain=True)
    fields = json.loads((folder / "config.json").read_text())
    look_alike = find_look_alike(folder, fields, loaded.tokenizer.get_vocab())
    if look_alike is None or not look_alike.is_text:
        found = find_mechanism(folder, loaded.tokenizer)  # raises for other look-alikes
        if found is not None:
            raise ConfigError(
                "latents that are fed back are no text",
                where=str(folder),
                got=found.key(),
                expected="a model whose latents are tokens, or that has none",
                fix="Leave --as-text out.",
            )
    if prefill:
        _add_prefill([loaded.processor, loaded.tokenizer], prefill, str(folder))
    save_latent_model(output, loaded.model, loaded.tokenizer, loaded.processor, loaded.mechanism)
    return loaded.mechanism


def _add_prefill(
    owners: Sequence[ProcessorMixin | PreTrainedTokenizerBase | None], prefill: str, where: str
) -> None:
    """Writes the prefill into all chat templates, behind the prompt."""
    templates = [None if owner is None else owner.chat_template for owner in owners]
    if not any(templates) or any(isinstance(template, dict) for template in templates):
        raise CheckpointError(
            "a prefill needs one chat template",
            where=where,
            got="none" if not any(templates) else "several by name",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
        )
    suffix = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(prefill)} }}}}{{% endif %}}"
    for owner, template in zip(owners, templates, strict=True):
        if owner is not None and isinstance(template, str):
            owner.chat_template = template + suffix
