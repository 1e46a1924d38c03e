"""What `benchmarks/training.py` runs on: a model of random weights, and rows with a span each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import save_latent_model
from grpo_latent.trajectory import PositionKind, Trajectory

STEPS = 4
HEAD_DIM = 64


def write_checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes a model whose tokenizer is tiny and whose vocabulary is as large as asked."""
    build = tiny.tiny_qwen2_5_vl if arguments.image else tiny.tiny_qwen3
    _, tokenizer, processor = build()
    tokens = {f"{role}_token": LVR.published_tokens[role] for role in ("start", "latent", "end")}
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), **tokens, steps=STEPS, max_spans=1)
    model = (
        vision_model(arguments, tokenizer) if arguments.image else text_model(arguments, tokenizer)
    )
    save_latent_model(folder, model, tokenizer, processor, mechanism)


def text_model(arguments: argparse.Namespace, tokenizer) -> PreTrainedModel:
    config = Qwen3Config(
        **decoder_sizes(arguments, tokenizer), num_key_value_heads=4, head_dim=HEAD_DIM
    )
    return Qwen3ForCausalLM(config)


def vision_model(arguments: argparse.Namespace, tokenizer) -> PreTrainedModel:
    """Qwen2.5-VL: a tower of four blocks, a decoder as asked with two heads of keys."""
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            **decoder_sizes(arguments, tokenizer),
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_heads": 6,
            "out_hidden_size": arguments.hidden,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def decoder_sizes(arguments: argparse.Namespace, tokenizer) -> dict:
    return {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // HEAD_DIM,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def trajectories(arguments: argparse.Namespace, engine) -> list[Trajectory]:
    """Rows of one length, each a span and text; the rows of a group one after the other."""
    generator = torch.Generator().manual_seed(0)
    kinds = [PositionKind.START, *[PositionKind.LATENT] * STEPS, PositionKind.FORCED]
    kinds += [PositionKind.TEXT] * (arguments.answer - len(kinds))
    no_log_probs = torch.zeros(arguments.answer)
    rows = []
    for group in range(arguments.groups):
        prompt_ids = torch.randint(
            40, arguments.vocabulary, (arguments.prompt,), generator=generator
        )
        if arguments.image:
            image_id = engine.backbone.image_token_id
            prompt_ids[4] = engine.backbone.config.vision_start_token_id
            prompt_ids[5 : 5 + arguments.image**2] = image_id
        for _ in range(arguments.rows // arguments.groups):
            token_ids = torch.randint(
                40, arguments.vocabulary, (arguments.answer,), generator=generator
            )
            latents = torch.randn(STEPS, arguments.hidden, generator=generator)
            rows.append(
                Trajectory(
                    prompt_ids=prompt_ids,
                    token_ids=token_ids,
                    kinds=torch.tensor(kinds),
                    latents=latents,
                    rollout_log_probs=no_log_probs,
                    sampling_log_probs=no_log_probs,
                    stop_reason="length",
                    latent_aux=torch.zeros(STEPS, 0),
                    group_id=str(group),
                )
            )
    return rows


def images_of(
    rows: Sequence[Trajectory], arguments: argparse.Namespace
) -> list[ImageInputs | None]:
    """An image a row, one for all rows of a group; None of each row without `--image`."""
    if not arguments.image:
        return [None] * len(rows)
    side = 2 * arguments.image
    grid = torch.tensor([[1, side, side]])
    generator = torch.Generator().manual_seed(1)
    pixels = [
        torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator)
        for _ in range(arguments.groups)
    ]
    return [ImageInputs(pixels[int(row.group_id)], grid) for row in rows]


def engine_batch(rows: Sequence[Trajectory], engine, arguments: argparse.Namespace):
    """What verl's workers get of the rows."""
    from tensordict.tensorclass import NonTensorStack
    from verl.utils import tensordict_utils as tu

    from grpo_latent.verl_plugin.worker.finite import GROUPS

    adapter = ModelAdapter(engine.module, engine.mechanism)
    images = images_of(rows, arguments)
    columns, positions = [], []
    for t, image in zip(rows, images, strict=True):
        mask, ids = t.response_mask().long(), torch.cat([t.prompt_ids, t.token_ids])
        rope = adapter.position_ids(ids[None], torch.ones(1, len(ids), dtype=torch.bool), image)
        plain = torch.arange(len(ids))
        positions.append(torch.cat([plain[None], rope[:, 0]]) if arguments.image else plain)
        columns.append(
            {
                "prompts": t.prompt_ids,
                "responses": t.token_ids,
                "input_ids": ids,
                **t.columns(adapter.prompt_kinds(t.prompt_ids)),
                "response_mask": mask,
                "loss_mask": mask,
            }
        )
    fields: dict[str, Tensor | list] = {
        name: torch.nested.as_nested_tensor([row[name] for row in columns], layout=torch.jagged)
        for name in columns[0]
    }
    fields["position_ids"] = tu.nested_tensor_from_tensor_list(
        positions, ragged_idx=positions[0].ndim
    )
    fields[GROUPS] = torch.tensor([int(t.group_id) for t in rows])
    settings = {
        "temperature": 0.9,
        "compute_loss": False,
        "calculate_entropy": True,
        "pad_token_id": 0,
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "use_fused_kernels": False,
        "micro_batch_size_per_gpu": len(rows),
    }
    batch = tu.get_tensordict(fields, settings)
    pixels = [
        {"pixel_values": image.pixel_values, "image_grid_thw": image.image_grid_thw}
        for image in images
        if image is not None
    ]
    if pixels:
        batch["multi_modal_inputs"] = NonTensorStack(*pixels)
    return batch
