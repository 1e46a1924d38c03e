"""Times the engine's passes and their memory: log-probs out of `lm_head` against all logits.

    python benchmarks/training.py [--vocabulary 151936] [--hidden 512] [--layers 4] [--rows 8]
                                  [--prompt 240] [--answer 64] [--device cpu] [--json out.json]

One micro-batch of the verl engine, a Qwen3 text model of random weights, a span of four latents in
each row: old log-probs without a gradient, then forward and backward of an update with entropies.
`latent.score_in_head=true` (the default) and `false`, verl's own way, take turns, each time in a
process of its own, for the peak of memory is a process's. Seconds are of the CPU
(`time.process_time`), on CUDA of the device; memory is what the pass added to what was there:
resident on the CPU, allocated on CUDA. Medians over the turns.
"""

from __future__ import annotations

import argparse
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from grpo_latent.common.provenance import provenance  # noqa: E402
from grpo_latent.latent.mechanisms import LVR  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.models.loading import save_latent_model  # noqa: E402
from grpo_latent.trajectory import PositionKind, Trajectory  # noqa: E402

STEPS = 4
WAYS = {"in the head": True, "all logits": False}


def write_checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes a Qwen3 whose tokenizer is tiny and whose vocabulary is as large as asked."""
    _, tokenizer, _ = tiny.tiny_qwen3()
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens = {f"{role}_token": LVR.published_tokens[role] for role in ("start", "latent", "end")}
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), **tokens, steps=STEPS, max_spans=1)
    save_latent_model(folder, Qwen3ForCausalLM(config), tokenizer, None, mechanism)


def trajectories(arguments: argparse.Namespace) -> list[Trajectory]:
    """Rows of one length, each a span and text."""
    generator = torch.Generator().manual_seed(0)
    kinds = [PositionKind.START, *[PositionKind.LATENT] * STEPS, PositionKind.FORCED]
    kinds += [PositionKind.TEXT] * (arguments.answer - len(kinds))
    rows = []
    for _ in range(arguments.rows):
        ids = torch.randint(
            20, arguments.vocabulary, (arguments.prompt + arguments.answer,), generator=generator
        )
        no_log_probs = torch.zeros(arguments.answer)
        rows.append(
            Trajectory(
                prompt_ids=ids[: arguments.prompt],
                token_ids=ids[arguments.prompt :],
                kinds=torch.tensor(kinds),
                latents=torch.randn(STEPS, arguments.hidden, generator=generator),
                rollout_log_probs=no_log_probs,
                sampling_log_probs=no_log_probs,
                stop_reason="length",
                latent_aux=torch.zeros(STEPS, 0),
            )
        )
    return rows


def engine_batch(rows: Sequence[Trajectory]):
    """What verl's workers get of the rows."""
    from verl.utils import tensordict_utils as tu

    columns = []
    for t in rows:
        mask, ids = t.response_mask().long(), torch.cat([t.prompt_ids, t.token_ids])
        columns.append(
            {
                "prompts": t.prompt_ids,
                "responses": t.token_ids,
                "input_ids": ids,
                **t.columns(torch.full_like(t.prompt_ids, int(PositionKind.PROMPT))),
                "response_mask": mask,
                "loss_mask": mask,
                "position_ids": torch.arange(len(ids)),
            }
        )
    fields: dict[str, Tensor | list] = {
        name: torch.nested.as_nested_tensor([row[name] for row in columns], layout=torch.jagged)
        for name in columns[0]
    }
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
    return tu.get_tensordict(fields, settings)


def make_engine(folder: Path, is_in_head: bool, num_rows: int):
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
    engine.configure(LatentOptions(score_in_head=is_in_head))
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
    (before, _), started = memory(), clock()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    return {"seconds": clock() - started, "gib": max(0, memory()[1] - before) / 2**30}


def take_turn(folder: Path, is_in_head: bool, arguments: argparse.Namespace) -> dict:
    """Both passes of one way, in this process."""
    torch.set_num_threads(1)
    engine, rows = make_engine(folder, is_in_head, arguments.rows), trajectories(arguments)

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
            engine.infer_batch(engine_batch(rows))

    def update() -> None:
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(engine_batch(rows), loss)

    found = {"old": measured(old)}
    return found | {"update": measured(update)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sizes = {
        "vocabulary": 151_936,
        "hidden": 512,
        "layers": 4,
        "rows": 8,
        "prompt": 240,
        "answer": 64,
        "repeats": 3,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    os.environ["VERL_PLATFORM"] = "nvidia" if arguments.device == "cuda" else "cpu"
    if arguments.turn:
        folder, way = arguments.turn
        print(json.dumps(take_turn(Path(folder), WAYS[way], arguments)))
        return 0
    turns: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments)
        options = [f"--{name}={getattr(arguments, name)}" for name in sizes]
        for _ in range(arguments.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, *options, f"--device={arguments.device}"]
                done = subprocess.run(
                    [*command, "--turn", folder, way],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                turns[way].append(json.loads(done.stdout.splitlines()[-1]))
    found = {
        phase: {
            way: {
                key: statistics.median(turn[phase][key] for turn in turns[way])
                for key in ("seconds", "gib")
            }
            for way in WAYS
        }
        for phase in ("old", "update")
    }
    for phase, ways in found.items():
        ours, verls = ways["in the head"], ways["all logits"]
        print(
            f"{phase}: {ours['seconds']:.1f} s and {ours['gib']:.2f} GiB in the head, "
            f"{verls['seconds']:.1f} s and {verls['gib']:.2f} GiB with all logits; ratios "
            f"{ours['seconds'] / verls['seconds']:.2f} and {ours['gib'] / verls['gib']:.2f}"
        )
    if arguments.json:
        report = {"provenance": provenance(None), "sizes": vars(arguments), "passes": found}
        arguments.json.write_text(json.dumps(report, default=str, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
