"""The sections of an SFT config that all methods share: the input checkpoint, the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_latent.sft.common.parameters import LoraSettings

DTYPES = ("float32", "bfloat16")  # float16 would need a loss scale


@dataclass(frozen=True)
class ModelSettings:
    """The input checkpoint, never written to, and what of it trains.

    Attributes:
        path: a plain Hugging Face folder, an official LVR checkpoint, or an output of SFT.
        save_path: where the trained model goes.
        dtype: of weights and optimizer state; `trainer.bf16` computes in bfloat16 over float32
            weights instead. With LoRA it is that of the frozen base: what trains is float32.
        verify_digests: compare its files, and those of a checkpoint that is resumed, with their
            manifest; False compares names and sizes.
    """

    path: str
    save_path: str
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    freeze_vision: bool = True
    freeze_merger: bool = True
    vision_cache_bytes: int = 0
    verify_digests: bool = True
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class DataSettings:
    """What is read and how it is batched.

    Attributes:
        format: a key of the method's `readers`.
        image_folder: what image paths of a JSON file are relative to; None for the file's folder.
        max_rows: read no more than this many rows.
        max_length: longest row in positions; a longer one is an error.
        min_image_tokens, max_image_tokens: bounds of the image processor; None leaves the
            checkpoint's.
        labelled_per_batch: rows with an answer in each batch; None mixes all rows.
        cache_bytes: pixels kept in memory after their first use.
        on_bad_box: what becomes of boxes outside their image or without area: `refuse` stops the
            run, `clamp` takes what is inside (as published), `drop` leaves the row out. Counted
            and reported. Only rows of method lvr have boxes.
    """

    train_files: tuple[str, ...]
    format: str
    image_folder: str | None = None
    max_rows: int | None = None
    max_length: int | None = None
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None
    labelled_per_batch: int | None = None
    cache_bytes: int = 0
    on_bad_box: str = "refuse"
