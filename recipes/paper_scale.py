"""What recipes' validate.py share: configs that compose, shapes of a published model on meta."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
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

sys.path.append(str(Path(__file__).parent))  # recipes are scripts, not a package
import memory  # noqa: E402

# of a row: what a count assumes beside the longest length
LABELS_OF_ROW = 1024
SPANS_OF_ROW = 2
WEIGHTS = ("sharded", "adapters")
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


def check_sft(folder: Path, name: str, overrides: Sequence[str] = ()) -> SFTSettings:
    """The settings of an SFT stage. Raises `ConfigError`."""
    config = compose_config(folder, name, [*SFT_PLACEHOLDERS, *overrides])
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
    show_sft_memory(folder, f"{name}_sft", model_json, num_gpus_of(grpo))
    show_grpo_memory(f"{name}_grpo", model_json, grpo)
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


def sft_memory(model_json: Path, settings: SFTSettings, num_gpus: int = 8) -> dict[str, float]:
    """Bytes that a GPU needs for SFT of rows of the longest length, by part (`memory.py`).

    Shapes are those of the meta device.
    """
    model = meta_model(model_json, parse_dtype(settings.model.dtype))
    if settings.model.lora.enabled:
        add_lora(model, settings.model.lora, new_token_ids=[0])
    freeze_vision(model, settings.model.freeze_vision, settings.model.freeze_merger)
    load = sft_load(settings)
    num_teachers = int(settings.method == "ilvr_stage1")
    if settings.trainer.get("fsdp"):
        return memory.sharded_bytes(memory.Shapes.of(model), load, num_gpus, num_teachers)
    return memory.replicated_bytes(model, load, num_teachers)


def sft_load(settings: SFTSettings) -> memory.Load:
    """What a micro-batch of the longest rows is."""
    rows, length = settings.trainer["per_device_train_batch_size"], settings.data.max_length
    assert length is not None, "paper-scale configs have a longest row"
    positions = length * rows
    steps = settings.latent.rules["steps"]
    gradient = getattr(settings.loss, "gradient", None)
    num_replays, num_decoded = 1, 0
    if settings.method == "ilvr_stage2":
        # once to make the latents, where a gradient goes through them, and once more over them
        num_replays = 2 if gradient == "one_hop" else 1
        num_decoded = SPANS_OF_ROW * (steps + 1) if gradient == "bptt" else 0
    elif settings.method in ("ivt_lr", "coconut"):
        num_replays = 0
        num_decoded = steps + 1  # the text after the slots, too
    return memory.Load(
        positions=num_replays * positions,
        labels=min(LABELS_OF_ROW, length) * rows,
        num_bytes=2 if settings.trainer.get("bf16") else 4,
        is_checkpointed=bool(settings.trainer.get("gradient_checkpointing")),
        cached=positions if num_decoded else 0,
        looked_back=num_decoded * positions,
    )


def show_sft_memory(folder: Path, name: str, model_json: Path, num_gpus: int) -> None:
    """Shows the count of each choice of `weights`."""
    for weights in WEIGHTS:
        settings = check_sft(folder, name, [f"weights={weights}"])
        title = f"{name} of {model_json.stem}, weights={weights}, {num_gpus} GPUs"
        show_memory(title, sft_memory(model_json, settings, num_gpus))


def show_grpo_memory(name: str, model_json: Path, grpo) -> None:
    """Shows the count of an RL stage."""
    title = f"{name} of {model_json.stem}, {num_gpus_of(grpo)} GPUs"
    show_memory(title, grpo_memory(model_json, grpo))


def num_gpus_of(grpo) -> int:
    return grpo.trainer.nnodes * grpo.trainer.n_gpus_per_node


def grpo_memory(model_json: Path, grpo) -> dict[str, float]:
    """Bytes that a GPU needs for RL, all completions of the longest length (`memory.py`)."""
    model = meta_model(model_json, torch.float32)
    freeze_vision(model)
    actor, rollout = grpo.actor_rollout_ref.actor, grpo.actor_rollout_ref.rollout
    rows, response = actor.ppo_micro_batch_size_per_gpu, grpo.data.max_response_length
    length = grpo.data.max_prompt_length + response
    load = memory.Load(
        positions=rows * length,
        labels=rows * response,
        num_bytes=2,
        is_checkpointed=grpo.actor_rollout_ref.model.enable_gradient_checkpointing,
    )
    copy = 2 * sum(p.numel() for p in model.parameters())
    decoding = copy + grpo.latent.max_batch_rows * length * keys_and_values(model)
    measured = grpo.latent.usage.prompts_per_batch if grpo.latent.usage.num_prompts else 0
    guest = copy + measured * length * keys_and_values(model)
    is_vllm = rollout.name == "vllm_latent"
    return memory.grpo_bytes(
        memory.Shapes.of(model),
        load,
        num_gpus_of(grpo),
        engine=rollout.gpu_memory_utilization * 80e9 if is_vllm else decoding,
        guest=guest if is_vllm and measured else 0,
    )


def keys_and_values(model) -> int:
    """Bytes of a position in a cache of bfloat16."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * text.num_key_value_heads * head * text.num_hidden_layers


def show_memory(name: str, parts: dict[str, float]) -> None:
    """Shows a count; of a GPU's 80 GB it may be 90 %."""
    sizes = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
    print(f"{name}: {sizes} GB a GPU" + ("" if parts["total"] <= 72e9 else ", TOO MUCH for 80 GB"))


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
