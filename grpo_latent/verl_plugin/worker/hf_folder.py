"""`actor/huggingface` of a checkpoint, made a folder that `load_latent_model` and stage 2 read."""

from __future__ import annotations

from pathlib import Path

from grpo_latent.latent.mechanisms import Mechanism


def complete_hf_folder(folder: str | Path, model_config, mechanism: Mechanism) -> None:
    """Adds what verl leaves out: latent_config.json, and the tokenizer beside the processor."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model_config.processor is not None:
        model_config.processor.save_pretrained(folder)
    model_config.tokenizer.save_pretrained(folder)
    mechanism.save(folder)
