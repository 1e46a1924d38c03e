"""`python -m grpo_latent.import FOLDER` says what a checkpoint's latents are, `--out` writes it.

    python -m grpo_latent.import SkiLa-7B                     what it is, or why it is refused
    python -m grpo_latent.import SkiLa-7B --out skila       the same folder with latent_config.json
    python -m grpo_latent.import model.pth --base Qwen2-VL-7B-Instruct --out ivt_lr
                                                              IVT-LR's file, as a folder; so are
                                                              Coconut's and CODI's
    python -m grpo_latent.import Mull-7B --as-text --prefill "<think>…" --out mull
                                                              a system whose latents are tokens, as
                                                              a policy of text

Nothing is needed before SFT, RL, evaluation or serving: these read published folders themselves,
by the same table (docs/checkpoints.md). The folder is only read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.common.command import command
from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.loading import (
    check_is_model_folder,
    check_tokens,
    load_latent_model,
    read_mechanism,
    reading,
    save_latent_model,
)
from grpo_latent.models.plain import write_as_text
from grpo_latent.models.state_dicts import load_weights_file


def describe(folder: Path) -> Mechanism:
    """The mechanism of a folder, its weights unread.

    Raises:
        CheckpointError: no layout fits, or the folder disagrees with itself.
    """
    check_is_model_folder(folder)
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    mechanism = read_mechanism(folder, tokenizer)
    check_tokens(mechanism, tokenizer, where=str(folder))
    return mechanism


def show(folder: Path, mechanism: Mechanism) -> None:
    """Prints what the folder's latents are."""
    with reading("config.json", folder):
        hf_config, _ = read_backbone(folder)
    table = Table(title=f"{folder}: {hf_config.model_type}, mechanism {mechanism.key()}")
    table.add_column("setting")
    table.add_column("value")
    for name, value in mechanism.to_dict().items():
        if name not in ("version", "mechanism"):
            table.add_row(name, str(value))
    Console().print(table)


def check_is_new(out: Path) -> None:
    """Raises `ConfigError` where files would be replaced."""
    if out.exists():
        raise ConfigError(
            "the folder exists", where="--out", got=str(out), expected="a folder of its own"
        )


def convert(source: Path, out: Path, dtype: torch.dtype, base: Path | None = None) -> None:
    """Writes the checkpoint in our layout. Raises `ConfigError` where it would replace files.

    Args:
        base: of a file of weights alone, the folder of the model that it was trained from.
    """
    check_is_new(out)
    loaded = (
        load_latent_model(source, dtype)
        if base is None
        else load_weights_file(source, base, dtype)
    )
    save_latent_model(out, loaded.model, loaded.tokenizer, loaded.processor, loaded.mechanism)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.import", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="a published checkpoint, one of ours, or a file of IVT-LR, Coconut or CODI",
    )
    parser.add_argument("--base", type=Path, help="what a file was trained from")
    parser.add_argument("--out", type=Path, help="a new folder in our layout")
    parser.add_argument(
        "--as-text",
        action="store_true",
        help="latents are tokens of the prompt or of the text, and nothing is fed back",
    )
    parser.add_argument(
        "--prefill", default="", help="with --as-text: what stands behind every prompt"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of what --out writes")
    options = parser.parse_args(arguments)
    if options.folder.is_file() and (options.base is None or options.out is None):
        raise ConfigError(
            "a file of weights is no model",
            where=str(options.folder),
            got=f"--base {options.base} --out {options.out}",
            expected="the folder of the model that it was trained from, and where to write",
        )
    if options.prefill and not options.as_text or options.as_text and options.out is None:
        raise ConfigError(
            "only what is written as text gets a prefill",
            where="--as-text",
            got=f"--as-text {options.as_text} --prefill {options.prefill!r} --out {options.out}",
            expected="--as-text --out NEW_FOLDER, with or without --prefill",
        )
    described = options.folder
    if options.out is not None:
        dtype = parse_dtype(options.dtype, "--dtype")
        if options.as_text:
            check_is_new(options.out)
            write_as_text(options.folder, options.out, options.prefill, dtype)
        else:
            base = options.base if options.folder.is_file() else None
            convert(options.folder, options.out, dtype, base)
        described = options.out
    show(described, describe(described))


if __name__ == "__main__":
    sys.exit(main())
