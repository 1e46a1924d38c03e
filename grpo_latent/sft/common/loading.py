"""The model that SFT starts from, and the folder that it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from grpo_latent.backbones.registry import known_model_types
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.latent.mechanisms.lvr import END_VECTOR_ATTRIBUTE
from grpo_latent.latent.mechanisms.published import has_latent_fields
from grpo_latent.models.loading import LatentModel, find_eos_ids, load_latent_model
from grpo_latent.models.plain import load_plain
from grpo_latent.models.tokens import add_latent_tokens
from grpo_latent.sft.common.latents import LatentSettings
from grpo_latent.sft.common.settings import ModelSettings


def is_latent_checkpoint(folder: Path) -> bool:
    """Whether the folder has latents: ours, or a published checkpoint's."""
    if (folder / LATENT_CONFIG_FILE).is_file():
        return True
    path = folder / "config.json"
    try:
        return path.is_file() and has_latent_fields(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            "not valid JSON", where=str(path), got=str(error), expected="a JSON object"
        ) from error


def load_for_sft(
    settings: ModelSettings,
    latent: LatentSettings,
    trains_end_vector: bool,
    needs_vision: bool = True,
) -> LatentModel:
    """Loads the input checkpoint and gives it latent tokens, head and end vector, in memory.

    The folder is only read. One that already has latents keeps its tokens and head, and takes the
    other fields of `latent`. New embeddings and modules draw from torch's global generator.

    Args:
        needs_vision: whether a text-only model is refused.

    Raises:
        CheckpointError: not a model of the kind wanted with a chat template, or damaged.
        ConfigError: `latent.head` is not the one that the checkpoint has.
    """
    dtype = parse_dtype(settings.dtype, "model.dtype")
    folder = Path(settings.path)
    if folder.is_dir() and is_latent_checkpoint(folder):
        bundle = _load_latent(settings, dtype, latent, trains_end_vector)
    else:
        bundle = _load_plain(settings, dtype, latent, trains_end_vector)
    if bundle.processor is None and needs_vision:
        raise CheckpointError(
            "this SFT needs a vision tower",
            where=settings.path,
            got=type(bundle.model).__name__,
            expected=f"a model with images: {', '.join(known_model_types())}",
        )
    if not (getattr(bundle.processor, "chat_template", None) or bundle.tokenizer.chat_template):
        raise CheckpointError(
            "no chat template",
            where=settings.path,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="Copy it from the model that this one comes from; base models without one cannot "
            "be prompted.",
        )
    return bundle


def _load_plain(
    settings: ModelSettings, dtype: torch.dtype, latent: LatentSettings, trains_end_vector: bool
) -> LatentModel:
    model, tokenizer, processor = load_plain(
        settings.path, dtype, settings.attn_implementation, settings.verify_digests
    )
    ids = add_latent_tokens(model, tokenizer, latent.tokens)
    if processor is not None:
        processor.tokenizer = tokenizer
    # the role is not always in use: a mechanism with its token would get the vector, untrained
    end_vector: dict[str, Any] = {}
    if trains_end_vector:
        end_vector = {"latent_end_token": latent.token_of("latent_end")}
    elif latent.writes_latent_end:
        end_vector = {"latent_end_token": latent.token_of("latent_end"), "end_vector": False}
    mechanism = latent.make(ids, **end_vector)
    mechanism.attach(model)
    return LatentModel(model, tokenizer, processor, mechanism, find_eos_ids(model, tokenizer))


def _load_latent(
    settings: ModelSettings, dtype: torch.dtype, latent: LatentSettings, trains_end_vector: bool
) -> LatentModel:
    folder = Path(settings.path)
    bundle = load_latent_model(
        folder,
        dtype,
        attn_implementation=settings.attn_implementation,
        verify_digests=settings.verify_digests,
    )
    mechanism = bundle.mechanism
    wanted = latent.mechanism.key()
    if mechanism.key() != wanted:
        raise ConfigError(
            "the checkpoint has latents of another mechanism",
            where=str(folder),
            got=mechanism.key(),
            expected=wanted,
            fix="Set the method of that mechanism, or start from the model before its first SFT.",
        )
    if mechanism.feeds_start:
        raise ConfigError(
            "SFT lays out no spans whose start is fed as a latent",
            where=str(folder),
            got="latent.first_latent=at_start",
            expected="a checkpoint with latents behind start",
            fix="RL trains it as it is.",
        )
    for name in mechanism.structural:
        if getattr(mechanism, name) != getattr(latent, name):
            raise ConfigError(
                f"the checkpoint has another {name}",
                where=f"latent.{name}",
                got=getattr(latent, name),
                expected=getattr(mechanism, name),
                fix=f"Set latent.{name}={getattr(mechanism, name)}, or start from the model "
                "before its first SFT.",
            )
    if trains_end_vector and not hasattr(bundle.model, END_VECTOR_ATTRIBUTE):
        token = latent.token_of("latent_end")
        ids = add_latent_tokens(bundle.model, bundle.tokenizer, [token])
        mechanism = mechanism.replace(
            latent_end_token=token, latent_end_id=ids[token], end_vector=None
        )
        # without the head, which the folder brought: attached anew it would be random
        mechanism.replace(head="none").attach(bundle.model)
    return dataclasses.replace(bundle, mechanism=mechanism.replace(**latent.rules))
