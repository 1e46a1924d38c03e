"""What recipes' validate.py share: configs that compose, and shapes of a published model on the meta device."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

import grpo_latent.train  # noqa: F401  (puts verl's configs on hydra's search path)
from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.head import attach_latent_modules, feedback
from grpo_latent.models.visibility import attention_bias
from grpo_latent.sft.settings import SFTSettings
from grpo_latent.verl_plugin.config_check import check_config

GRPO_PLACEHOLDERS = [
    "data.train_files=train.parquet",
    "data.val_files=val.parquet",
    "actor_rollout_ref.model.path=model",
]
SFT_PLACEHOLDERS = ["model.path=model", "data.train_files=train.json", "trainer.output_dir=out"]


def compose_config(folder: Path, name: str, overrides: list[str]):
    with initialize_config_dir(str(folder.absolute()), version_base=None):
        return compose(name, overrides=["hydra.searchpath=[pkg://grpo_latent.config]", *overrides])


def check_grpo(folder: Path, name: str, overrides: list[str]):
    """The composed config of an RL stage. Raises `ConfigError`."""
    config = compose_config(folder, name, GRPO_PLACEHOLDERS + overrides)
    check_config(config)
    return config


def check_sft(folder: Path, name: str) -> SFTSettings:
    """The settings of an SFT stage. Raises `ConfigError`."""
    config = compose_config(folder, name, SFT_PLACEHOLDERS)
    return SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True))


def check_shapes(
    model_json: Path,
    first_free_id: int,
    tokens: tuple[str, ...],
    make_config: Callable[[dict[str, int]], LatentConfig],
    response_length: int,
) -> dict[str, tuple[int, ...]]:
    """Builds the model on the meta device and runs one latent forward: hidden states, logits, feedback.

    Args:
        model_json: its config.json.
        first_free_id: id after the tokenizer's last token; the embedding table has rows to spare.
        make_config: the latents, given the ids of `tokens`.
    """
    name = model_json.stem
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model_json, Path(folder) / "config.json")
        hf_config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(hf_config, attn_implementation="sdpa", dtype=torch.bfloat16)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        ids = dict(zip(tokens, range(first_free_id, first_free_id + len(tokens)), strict=True))
        if max(ids.values()) >= vocab_size:
            raise ConfigError(
                "no room for the latent tokens", where=name, got=vocab_size, expected=f"> {max(ids.values())}"
            )
        attach_latent_modules(model, make_config(ids))
        adapter = ModelAdapter(model)
        length = 64 + response_length
        input_ids = torch.zeros(1, length, dtype=torch.long)
        bias = attention_bias(input_ids, torch.ones_like(input_ids, dtype=torch.bool), "full", adapter.dtype)
        hidden = adapter.forward_hidden(input_ids, bias, torch.zeros(3, 1, length, dtype=torch.long))
        latent = feedback(model, hidden[:, -1])
        logits = adapter.logits(hidden[:, -1])
        vision = hf_config.vision_config
        tower_size = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the decoder's
        patch_size = vision.in_chans * vision.temporal_patch_size * vision.patch_size**2
        merged = model.model.visual.merger(
            torch.empty(32 * vision.spatial_merge_size**2, tower_size, dtype=torch.bfloat16)
        )
    shapes = {
        "patch": (patch_size,), "visual token": tuple(merged.shape), "hidden": tuple(hidden.shape),
        "latent": tuple(latent.shape), "logits": tuple(logits.shape), "vocabulary": (vocab_size,),
    }  # fmt: skip
    expected = (32, adapter.hidden_size)
    if shapes["visual token"] != expected or shapes["latent"] != (1, adapter.hidden_size):
        raise ConfigError("visual tokens and latents differ in size", where=name, got=shapes, expected=str(expected))
    return shapes


def show_shapes(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    print(f"{name}: " + ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items()))
