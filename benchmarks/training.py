"""Times the engine's passes and their memory, in the ways that options choose between.

    python benchmarks/training.py [--vocabulary 151936] [--hidden 512] [--intermediate 1536] [--layers 4]
                                  [--rows 8] [--groups 8] [--image 0] [--prompt 240] [--answer 64]
                                  [--checkpointing 1]
                                  [--ways "in the head,all logits"] [--device cpu] [--json out.json]

    in the head    each row runs its own prompt; log-probs are made within `lm_head`
    all logits     latent.score_in_head=false: verl makes the logits of all positions
    prompt once    the rows of a group run one prompt; the default of training
    raw replay     `models.replay` of the same rows, prompts once, without verl's engine

One micro-batch of the verl engine, a model of random weights, a span of four latents in each row:
old log-probs without a gradient, then forward and backward of an update with entropies. The model
is a Qwen3 text model, or with `--image` (tokens a side) a Qwen2.5-VL whose prompts have an image
each and whose tower is frozen. Layers are checkpointed but with `--checkpointing 0`. Ways take
turns, each time in a process of its own, for the peak of memory is a process's. Seconds are of the
CPU (`time.process_time`), on CUDA of the device; memory is what the pass added to what was there:
resident on the CPU, allocated on CUDA. Medians over the turns; ratios are to the last of `--ways`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from result_file import write_result  # noqa: E402
from training_batches import engine_batch, images_of, trajectories, write_checkpoint  # noqa: E402

from grpo_latent.models.adapter import ModelAdapter  # noqa: E402
from grpo_latent.models.loading import load_latent_model  # noqa: E402
from grpo_latent.models.replay import replay  # noqa: E402
from grpo_latent.models.sequences import collate  # noqa: E402
from grpo_latent.models.vision_cache import VisionCache  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "in the head": {"share_prompt": False},
    "all logits": {"share_prompt": False, "score_in_head": False},
    "prompt once": {},
}
RAW = "raw replay"


def make_engine(folder: Path, way: str, num_rows: int, checkpointing: bool):
    """verl's way to an engine, without Ray."""
    import torch.distributed as dist
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    from grpo_latent.verl_plugin.boot.options import LatentOptions
    from grpo_latent.verl_plugin.boot.registration import NAME, register_all

    register_all()
    os.environ.update(VERL_ENGINE_VENDOR=NAME, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    backend = "nccl" if torch.cuda.is_available() else "cpu:gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=HFModelConfig(
            path=str(folder),
            use_remove_padding=False,
            enable_gradient_checkpointing=checkpointing,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=num_rows,
            infer_micro_batch_size_per_gpu=num_rows,
            mixed_precision={
                "param_dtype": "bf16" if torch.cuda.is_available() else "fp32",
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.configure(LatentOptions(**WAYS[way]), freeze_vision=True)
    engine.initialize()
    return engine


def memory() -> tuple[int, int]:
    """Bytes held now, and the most since the process began or `reset` on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize(), 1024 * peak


def measured(run) -> dict[str, float]:
    """Seconds and added bytes of one pass."""
    is_cuda = torch.cuda.is_available()
    clock = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        # what an earlier pass has freed would hide what this one adds
        ctypes.CDLL(None).malloc_trim(0)
    (before, _), started = memory(), clock()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    return {"seconds": clock() - started, "gib": max(0, memory()[1] - before) / 2**30}


def take_raw_turn(folder: Path, arguments: argparse.Namespace) -> dict:
    """Both passes without an engine: replayed log-probs, and their backward."""
    loaded = load_latent_model(folder)
    model = loaded.model
    if arguments.image:
        VisionCache.install(model)  # equal images of a call are encoded once
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = ModelAdapter(model, loaded.mechanism)
    for vision_module in adapter.backbone.vision_modules:
        vision_module.requires_grad_(False)
    rows = trajectories(arguments, adapter)
    sequences = collate(rows, images_of(rows, arguments), adapter, "full", shares_prompts=True)

    def update() -> None:
        model.train()
        log_probs_BT, _ = replay(adapter, sequences, temperature=0.9)
        (log_probs_BT.sum() / 1000).backward()

    def old() -> None:
        with torch.no_grad():
            replay(adapter, sequences, temperature=0.9)

    return {"old": measured(old), "update": measured(update)}


def take_turn(folder: Path, way: str, arguments: argparse.Namespace) -> dict:
    """Both passes of one way, in this process."""
    torch.set_num_threads(1)
    if way == RAW:
        return take_raw_turn(folder, arguments)
    engine = make_engine(folder, way, arguments.rows, bool(arguments.checkpointing))
    batch = engine_batch(trajectories(arguments, engine), engine, arguments)

    def loss(model_output, data, dp_group=None):
        scores = zip(
            model_output["log_probs"].unbind(), model_output["entropy"].unbind(), strict=True
        )
        # completions only, as any loss reads them
        kept = [
            (log_probs - 0.01 * entropies)[arguments.prompt - 1 : -1].sum()
            for log_probs, entropies in scores
        ]
        return torch.stack(kept).sum() / 1000, {}

    def old() -> None:
        with engine.eval_mode(disable_auto_offload=True):
            engine.infer_batch(batch.copy())

    def update() -> None:
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(batch.copy(), loss)

    found = {"old": measured(old)}
    return found | {"update": measured(update)}


SIZES = {
    "vocabulary": 151_936,
    "hidden": 512,
    "intermediate": 1536,
    "layers": 4,
    "rows": 8,
    "groups": 8,
    "image": 0,
    "prompt": 240,
    "answer": 64,
    "checkpointing": 1,
    "repeats": 3,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", default="in the head,all logits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    os.environ["VERL_PLATFORM"] = "nvidia" if arguments.device == "cuda" else "cpu"
    if arguments.turn:
        folder, way = arguments.turn
        print(json.dumps(take_turn(Path(folder), way, arguments)))
        return 0
    ways = arguments.ways.split(",")
    turns: dict[str, list[dict]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments)
        options = [f"--{name}={getattr(arguments, name)}" for name in SIZES]
        for _ in range(arguments.repeats):
            for way in ways:
                command = [sys.executable, __file__, *options, f"--device={arguments.device}"]
                done = subprocess.run(
                    [*command, "--turn", folder, way],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                turns[way].append(json.loads(done.stdout.splitlines()[-1]))
    found: dict[str, dict[str, dict[str, Any]]] = {
        phase: {
            way: {
                key: statistics.median(turn[phase][key] for turn in turns[way])
                for key in ("seconds", "gib")
            }
            for way in ways
        }
        for phase in ("old", "update")
    }
    for phase, of_way in found.items():
        last = of_way[ways[-1]]
        for way, ours in of_way.items():
            ours["to_the_last"] = [ours[key] / last[key] for key in ("seconds", "gib")]
            ratio, gib_ratio = ours["to_the_last"]
            print(
                f"{phase}, {way}: {ours['seconds']:.1f} s and {ours['gib']:.2f} GiB; ratios "
                f"{ratio:.3f} and {gib_ratio:.3f}"
            )
    sizes = {name: getattr(arguments, name) for name in SIZES}
    write_result(arguments.json, {"sizes": sizes, "passes": found}, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
