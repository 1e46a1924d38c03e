"""What recipes' validate.py share: configs that compose, shapes of a published model on meta."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

import grpo_latent.train  # noqa: F401  (puts verl's configs on hydra's search path)
from grpo_latent.backbones.qwen_vl import QwenVL
from grpo_latent.backbones.registry import read_backbone
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.common.settings import section
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.visibility import attention_bias
from grpo_latent.sft.common.parameters import add_lora, freeze_vision
from grpo_latent.sft.settings import SFTSettings
from grpo_latent.verl_plugin.trainer.config_check import check_config

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
    return SFTSettings.from_dict(section(config, name))


def check_slots(sft: SFTSettings, grpo) -> None:
    """Raises `ConfigError` where SFT and RL differ in their slots, or these leave text no room."""
    slots = sft.latent.rules["steps"]
    length = grpo.data.max_response_length
    if grpo.latent.steps != slots:
        got = f"{slots} in SFT, {grpo.latent.steps} in RL"
        raise ConfigError(
            "SFT and RL differ in slots", where="latent.steps", got=got, expected="one number"
        )
    num_positions = slots * (getattr(sft.latent, "top_k_image", 0) + 1)
    if num_positions >= length:
        raise ConfigError(
            "no room for text after the slots",
            where="data.max_response_length",
            got=length,
            expected=f"more than the slots' {num_positions} positions",
        )


def validate_curriculum(
    folder: Path, name: str, model_json: Path, first_free_id: int, overrides: list[str]
) -> None:
    """Checks <name>_sft and <name>_grpo of a recipe whose SFT is a curriculum of slots.

    Prints what it found.

    Args:
        model_json, first_free_id: as for `check_shapes`.
        overrides: of GRPO.
    """
    sft, grpo = check_sft(folder, f"{name}_sft"), check_grpo(folder, f"{name}_grpo", overrides)
    check_slots(sft, grpo)
    slots = ", ".join(str(stage.num_slots) for stage in sft.loss.stages(sft.latent.rules["steps"]))
    print(
        f"{name}_sft and {name}_grpo: valid ({grpo.trainer.n_gpus_per_node} GPUs a node), "
        f"slots by stage {slots}"
    )
    show_memory(f"{name}_sft of {model_json.stem}", check_memory(model_json, sft))
    length = grpo.data.max_response_length
    show_shapes(
        model_json.stem,
        check_shapes(model_json, first_free_id, sft.latent.tokens, sft.latent.make, length),
    )


def meta_model(model_json: Path, dtype: torch.dtype):
    """A model of that config.json on the meta device, which has shapes and no memory."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model_json, Path(folder) / "config.json")
        hf_config, backbone = read_backbone(folder)
    with torch.device("meta"):
        return backbone.auto_class.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)


def check_memory(model_json: Path, settings: SFTSettings, gpu_gb: float = 80) -> dict[str, float]:
    """GB that a rank of DistributedDataParallel needs for SFT of a row of the longest length.

    Counted on the meta device: weights, and of those that train: gradients, DDP's copy of them, AdamW's two moments,
    autocast's bfloat16 copies of float32 linear layers (kept until the forward ends), and ILVR's
    teacher. Activations are those that a decoder layer keeps for its backward (a rough count:
    norms, projections, MLP), or its input alone with gradient checkpointing, beside one layer that
    runs again. Left out: logits, kernels' scratch space, fragmentation.

    Raises:
        ConfigError: more than 90 % of `gpu_gb`.
    """
    model = meta_model(model_json, parse_dtype(settings.model.dtype))
    if settings.model.lora.enabled:
        add_lora(model, settings.model.lora, new_token_ids=[0])
    freeze_vision(model, settings.model.freeze_vision, settings.model.freeze_merger)
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    copied = [
        weight.numel()
        for weight in linear
        if weight.requires_grad and weight.dtype == torch.float32
    ]
    text = model.config.get_text_config()
    # float32 residuals (the embeddings train), bfloat16 inside: two norms, attention and its
    # projections, four of the MLP's
    kept = 30 * text.hidden_size + 8 * text.intermediate_size
    is_checkpointed = bool(settings.trainer.get("gradient_checkpointing"))
    per_token = (
        4 * text.hidden_size * text.num_hidden_layers + kept
        if is_checkpointed
        else kept * text.num_hidden_layers
    )
    rows = settings.trainer["per_device_train_batch_size"]
    parts = {
        "weights": sum(size for size, _ in sizes),
        "gradients": 2 * trained,
        "optimizer": 2 * trained,
        "autocast": 2 * sum(copied) if settings.trainer.get("bf16") else 0,
        "teacher": trained if settings.method == "ilvr_stage1" else 0,
        "activations": per_token * settings.data.max_length * rows,
    }
    parts = {name: size / 1e9 for name, size in parts.items()} | {
        "total": sum(parts.values()) / 1e9
    }
    if parts["total"] > 0.9 * gpu_gb:
        raise ConfigError(
            "does not fit the GPU",
            where=f"{settings.method} of {model_json.stem}",
            got=", ".join(f"{name} {size:.0f} GB" for name, size in parts.items()),
            expected=f"at most {0.9 * gpu_gb:.0f} GB",
            fix="Train adapters (model.lora.enabled=true, model.dtype=bfloat16, "
            "trainer.bf16=true), checkpoint activations, "
            "or lower data.max_length.",
        )
    return parts


def show_memory(name: str, parts: dict[str, float]) -> None:
    print(
        f"{name}: " + ", ".join(f"{part} {size:.1f}" for part, size in parts.items()) + " GB a GPU"
    )


def check_shapes(
    model_json: Path,
    first_free_id: int,
    tokens: tuple[str, ...],
    make_mechanism: Callable[[dict[str, int]], Mechanism],
    response_length: int,
) -> dict[str, tuple[int, ...]]:
    """Builds the model on the meta device and runs one latent forward; shapes by name.

    They are those of hidden states, logits and feedback, and of a vision model's merger.

    Args:
        model_json: its config.json.
        first_free_id: id after the tokenizer's last token; the embedding table has rows to spare.
        make_mechanism: the latents, given the ids of `tokens`.
    """
    name = model_json.stem
    model = meta_model(model_json, torch.bfloat16)
    with torch.device("meta"):
        vocab_size = model.get_output_embeddings().weight.shape[0]
        ids = dict(zip(tokens, range(first_free_id, first_free_id + len(tokens)), strict=True))
        if max(ids.values()) >= vocab_size:
            raise ConfigError(
                "no room for the latent tokens",
                where=name,
                got=vocab_size,
                expected=f"> {max(ids.values())}",
            )
        mechanism = make_mechanism(ids)
        mechanism.attach(model)
        adapter = ModelAdapter(model, mechanism)
        length = 64 + response_length
        input_ids = torch.zeros(1, length, dtype=torch.long)
        bias = attention_bias(
            input_ids, torch.ones_like(input_ids, dtype=torch.bool), "full", adapter.dtype
        )
        position_ids = input_ids.expand(3, 1, -1) if adapter.has_mrope else input_ids
        hidden = adapter.forward_hidden(input_ids, bias, position_ids)
        latent = adapter.make(hidden[:, -1])
        logits = adapter.logits(hidden[:, -1])
    shapes = {
        "hidden": tuple(hidden.shape),
        "latent": tuple(latent.shape),
        "logits": tuple(logits.shape),
        "vocabulary": (vocab_size,),
    }
    if isinstance(adapter.backbone, QwenVL):
        shapes = vision_shapes(model) | shapes
    expected = (32, adapter.hidden_size)
    if shapes.get("visual token", expected) != expected or shapes["latent"] != (
        1,
        adapter.hidden_size,
    ):
        raise ConfigError(
            "visual tokens and latents differ in size",
            where=name,
            got=shapes,
            expected=str(expected),
        )
    return shapes


def vision_shapes(model) -> dict[str, tuple[int, ...]]:
    """Of a patch, and of 32 visual tokens after the merger."""
    vision = model.config.vision_config
    # Qwen2-VL's hidden_size is the decoder's
    tower_size = getattr(vision, "embed_dim", vision.hidden_size)
    patch_size = vision.in_chans * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.empty(
        32 * vision.spatial_merge_size**2, tower_size, dtype=torch.bfloat16, device="meta"
    )
    return {
        "patch": (patch_size,),
        "visual token": tuple(model.model.visual.merger(patches).shape),
    }


def show_shapes(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    print(f"{name}: " + ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items()))
