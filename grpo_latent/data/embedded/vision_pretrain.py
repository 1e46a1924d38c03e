"""Stage 0 of the embedded experiment: a vision tower that reads digits, for a pretrained ViT.

Two linear probes on each merged visual token say which digit (or none) and which colour (or none)
its cell holds; tower and probes are trained together on fresh images, then the probes are thrown
away. The text model keeps its random weights.

    loss = CE_digit + CE_colour + 0.01 (rms^2 - 1)^2,  rms of visual tokens over batch and features

The probes see normalised tokens; the last term keeps the tokens themselves at unit scale, since
SFT regresses on them.

    python -m grpo_latent.data.embedded.vision_pretrain --out models/vision --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProcessorMixin

from grpo_latent.common.command import command
from grpo_latent.common.files import write_json
from grpo_latent.common.manifest import write_model_manifest
from grpo_latent.common.provenance import provenance
from grpo_latent.data.embedded import digits
from grpo_latent.models.tiny import EXPERIMENT_SIZES, TinyModel, TinySizes, tiny_qwen2_5_vl

REPORT_FILE = "vision_pretrain.json"
NUM_EVAL_IMAGES = 256
Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class VisionReport:
    """What the probes read on images of held-out digits, after training.

    Attributes:
        digit_accuracy: over occupied cells.
        color_accuracy: over all cells, "empty" being a class.
        rms: root mean square of the visual tokens' features.
        seconds: of training, evaluation left out.
    """

    steps: int
    seed: int
    digit_accuracy: float
    color_accuracy: float
    rms: float
    seconds: float


class CellProbes(nn.Module):
    """Digit (10 and none) and colour (8 and none) of a visual token [N, H]."""

    def __init__(self, hidden: int):
        super().__init__()
        self.digit = nn.Linear(hidden, digits.NO_DIGIT + 1)
        self.color = nn.Linear(hidden, digits.NO_COLOR + 1)

    def forward(self, tokens_NH: Tensor) -> tuple[Tensor, Tensor]:
        normalised = F.rms_norm(tokens_NH, tokens_NH.shape[-1:])
        return self.digit(normalised), self.color(normalised)


def learning_rate_factor(step: int, steps: int, warmup: int = 30, floor: float = 0.03) -> float:
    """Linear warm-up times a cosine from 1 to `floor`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def pretrain_vision(
    tiny: TinyModel,
    *,
    steps: int = 400,
    batch_size: int = 48,
    lr: float = 2e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> VisionReport:
    """Trains the vision tower and merger of `tiny` in place; the same for the same arguments.

    Args:
        tiny: a Qwen2.5-VL with 16 visual tokens for the task's images (7-pixel patches, merge 2).
        on_step: called with (optimizer steps done, loss) after each.
    """
    visual = tiny.model.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probes = CellProbes(tiny.model.config.get_text_config().hidden_size)
    parameters = [*visual.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    images = DenseImages(tiny, steps, batch_size, seed)
    # with a generator of its own it leaves the global one as it was
    batches = DataLoader(
        images, batch_size=None, collate_fn=_as_it_is, num_workers=1, generator=torch.Generator()
    )
    start = time.perf_counter()
    for step, (arrays, *labels) in enumerate(batches):
        inputs = {name: torch.from_numpy(values) for name, values in arrays.items()}
        loss = probe_loss(probes, encode(tiny, inputs), *map(torch.from_numpy, labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    seconds = time.perf_counter() - start
    optimizer.zero_grad()
    return VisionReport(
        steps=steps, seed=seed, seconds=round(seconds, 1), **evaluate_probes(tiny, probes)
    )


def _as_it_is(yielded: Any) -> Any:
    """Keeps a loader from making tensors of arrays, which it does by default."""
    return yielded


class DenseImages(IterableDataset):
    """Yields `steps` batches of (processed images, digit labels, colour labels) of the seed.

    They are made beside the training, which would wait for them. They are arrays, which come
    through a pipe: tensors come by sockets in the temporary folder, and where its path is too long
    for one they never come.
    """

    def __init__(self, tiny: TinyModel, steps: int, batch_size: int, seed: int):
        self.image_processor = _processor(tiny).image_processor
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        rng = digits.stream_rng("pretrain", self.seed)
        for _ in range(self.steps):
            images, digit_NC, color_NC = digits.generate_dense(self.batch_size, rng, "pretrain")
            inputs = self.image_processor(list(images), return_tensors="pt")
            yield {name: values.numpy() for name, values in inputs.items()}, digit_NC, color_NC


def probe_loss(
    probes: CellProbes, tokens_NH: Tensor, digit_NC: Tensor, color_NC: Tensor
) -> Tensor:
    """The loss of this module's docstring, scalar; labels int64, one per token."""
    digit_logits, color_logits = probes(tokens_NH)
    return (
        F.cross_entropy(digit_logits, digit_NC.flatten())
        + F.cross_entropy(color_logits, color_NC.flatten())
        + 0.01 * (tokens_NH.pow(2).mean() - 1) ** 2
    )


def _processor(tiny: TinyModel) -> ProcessorMixin:
    assert tiny.processor is not None, "a tiny model with a vision tower"
    return tiny.processor


def encode(tiny: TinyModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Encodes processed 56 x 56 images to visual tokens [num * 16, H], row-major in each image."""
    return tiny.model.model.visual(
        inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
    ).pooler_output


@torch.no_grad()
def evaluate_probes(tiny: TinyModel, probes: CellProbes) -> dict[str, float]:
    """`digit_accuracy`, `color_accuracy` and `rms` on images of held-out digits."""
    rng = digits.stream_rng("dev", digits.EVAL_SEED)
    images, digit_NC, color_NC = digits.generate_dense(NUM_EVAL_IMAGES, rng, "dev")
    tokens_NH = encode(tiny, _processor(tiny).image_processor(list(images), return_tensors="pt"))
    digit_logits, color_logits = probes(tokens_NH)
    digit_labels, color_labels = (
        torch.from_numpy(digit_NC).flatten(),
        torch.from_numpy(color_NC).flatten(),
    )
    occupied = digit_labels != digits.NO_DIGIT
    return {
        "digit_accuracy": (digit_logits.argmax(-1) == digit_labels)[occupied]
        .float()
        .mean()
        .item(),
        "color_accuracy": (color_logits.argmax(-1) == color_labels).float().mean().item(),
        "rms": tokens_NH.pow(2).mean().sqrt().item(),
    }


def write_experiment_model(
    folder: str | Path, *, sizes: TinySizes = EXPERIMENT_SIZES, seed: int = 0, **pretraining
) -> VisionReport:
    """Builds the experiment's Qwen2.5-VL, pretrains its vision tower, and writes its folder.

    Model, tokenizer, processor, and the report as `vision_pretrain.json`.
    """
    tiny = tiny_qwen2_5_vl(digits.WORDS, sizes, seed=seed)
    report = pretrain_vision(tiny, seed=seed, **pretraining)
    tiny.model.save_pretrained(folder)
    _processor(tiny).save_pretrained(folder)
    write_json(
        Path(folder) / REPORT_FILE, dataclasses.asdict(report) | {"provenance": provenance(seed)}
    )
    write_model_manifest(folder)
    return report


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_latent.data.embedded.vision_pretrain",
        description="Writes the embedded experiment's model.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="torch threads; more are slower where cores are shared",
    )
    parser.add_argument("--log-every", type=int, default=50)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    def log(step: int, loss: float) -> None:
        if step % options.log_every == 0:
            print(f"step {step}/{options.steps} loss {loss:.3f}", flush=True)

    report = write_experiment_model(
        options.out,
        seed=options.seed,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        on_step=log,
    )
    print(
        f"{options.out}: held-out digit probe {report.digit_accuracy:.3f}, "
        f"colour probe {report.color_accuracy:.3f}, "
        f"rms {report.rms:.2f}, {report.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
