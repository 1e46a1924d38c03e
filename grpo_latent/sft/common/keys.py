"""Ranges and choices of an SFT config's keys, beside the types that its dataclasses have."""

from __future__ import annotations

from grpo_latent.common.kinds import (
    choice,
    flag,
    null_or,
    number,
    one_or_some,
    seed,
    share,
    some,
    text,
    whole,
)
from grpo_latent.common.schema import Schema

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
_BYTES = whole(0)
_WHEN = choice("no", "steps", "epoch", "best")

_TABLE = {
    "model.path": text("a path"),
    "model.save_path": text("a path"),
    "model.attn_implementation": choice(*ATTENTION),
    "model.vision_cache_bytes": _BYTES,
    "model.lora.r": whole(1),
    "model.lora.alpha": whole(1),
    "model.lora.dropout": share(),
    "model.lora.target_modules": one_or_some(text("a module's name")),
    "data.train_files": one_or_some(text("a path of a file")),
    "data.image_folder": null_or(text("a path")),
    "data.max_rows": null_or(whole(1)),
    "data.max_length": null_or(whole(1)),
    "data.min_image_tokens": null_or(whole(1)),
    "data.max_image_tokens": null_or(whole(1)),
    "data.labelled_per_batch": null_or(whole(1)),
    "data.cache_bytes": _BYTES,
    "data.on_bad_box": choice("refuse", "clamp", "drop"),
    "latent.steps": whole(0),
    "latent.max_spans": null_or(whole(0)),
    "latent.latent_end_threshold": number(at_least=0),
    "latent.top_k_image": whole(0),
    "latent.selection_order": choice("index", "attention"),
    "latent.span_end": choice("forced", "sampled"),
    "latent.end_is_action": flag(),
    "loss.latent_weight": number(at_least=0),
    "loss.end_weight": number(at_least=0),
    "loss.decay": number(at_least=0, below=1),
    "loss.top_k": whole(1),
    "loss.top_p": number(above=0, at_most=1),
    "loss.noise_std": number(at_least=0),
    "loss.slots_per_step": whole(1),
    "loss.epochs_per_stage": null_or(whole(1)),
    "loss.steps_per_stage": null_or(some(whole(1), at_least=0)),  # none without slots
    "schedule.horizon_steps": null_or(whole(1)),
    "trainer.output_dir": text("a path"),
    "trainer.resume_from_checkpoint": null_or(text("auto, or a folder checkpoint-N")),
    "trainer.seed": seed(),
    "trainer.data_seed": null_or(seed()),
    "trainer.per_device_train_batch_size": whole(1),
    "trainer.gradient_accumulation_steps": whole(1),
    "trainer.learning_rate": number(at_least=0, at_most=1),
    "trainer.lr_scheduler_type": choice(*SCHEDULES),
    "trainer.warmup_steps": number(at_least=0),
    "trainer.weight_decay": number(at_least=0, at_most=1),
    "trainer.adam_beta1": number(at_least=0, below=1),
    "trainer.adam_beta2": number(at_least=0, below=1),
    "trainer.adam_epsilon": number(above=0),
    "trainer.max_grad_norm": null_or(number(at_least=0)),
    "trainer.num_train_epochs": number(above=0),
    "trainer.max_steps": whole(1, also=-1),
    "trainer.bf16": flag(),
    "trainer.fp16": flag(),
    "trainer.gradient_checkpointing": flag(),
    "trainer.logging_steps": number(above=0),
    "trainer.save_strategy": _WHEN,
    "trainer.save_steps": number(above=0),
    "trainer.save_total_limit": null_or(whole(1)),
    "trainer.dataloader_num_workers": whole(0),
}

# of the other keys, the dataclasses of the sections and `TrainingArguments` know which there are
SFT = Schema(
    _TABLE,
    {name: {} for name in ("model", "data", "latent", "loss", "schedule", "trainer")}
    | {"method": "lvr"},
    classes=frozenset({"model", "model.lora", "data", "latent", "loss", "schedule", "trainer"}),
)
