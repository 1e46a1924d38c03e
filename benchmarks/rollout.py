"""Times rollouts: engine `hf` with latents against `generate` without, a naive loop, and vLLM.

    python benchmarks/rollout.py [--new-tokens 11 64] [--text-positions 64] [--repeats 5]
                                 [--json out.json]

First section. The embedded experiment's model (Qwen2.5-VL, 1.3 M parameters, random weights), 16
prompts with an image each, 8 trajectories a prompt, one thread. All three sample at temperature 1
without truncation; EOS is never sampled, so that every trajectory has the same number of
positions. The numbers are CPU-seconds (`time.process_time`), medians of repeats that interleave
the paths, so that a busy machine slows all of them alike.

What is compared is what each is: `generate` gets the whole batch, `num_return_sequences=8`, no
logits processors and returns ids only; the engine also feeds latents (a span of 4 in every
trajectory) and returns log-probs and latents. The naive loop runs one trajectory at a time and
encodes the image for each, as the published code does; it is timed on the first 16 trajectories,
since each costs the same.

Second section (text_models.py), where vLLM is installed: text models of 3 M and 0.15 B parameters,
32 prompts. Engine `vllm` with latents against stock vLLM that samples text at all positions,
compiled and eager; engine `hf` against engine `vllm`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# before torch reads it: OpenMP's threads would spin on shared cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import text_models  # noqa: E402
import torch  # noqa: E402
from result_file import write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tiny_setting import Setting, naive_trajectory, tiny_model  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from grpo_latent.backbones.images import ImageInputs  # noqa: E402
from grpo_latent.data.embedded import digits  # noqa: E402
from grpo_latent.latent.mechanisms import LVR, SpanMechanism  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402

NUM_PROMPTS = 16
GROUP_SIZE = 8
STEPS = 4
NUM_NAIVE = 16
LIKELY = 6.0  # bias of the logit of `start`


@dataclass(frozen=True)
class Contender:
    """`run` returns the number of positions that it generated."""

    name: str
    run: Callable[[], int]


def build() -> Setting:
    """The experiment's model with random weights, which opens a span soon and never ends."""
    model, tokenizer, processor, eos_id = tiny_model(
        {"<|lvr_start|>": LIKELY}, tiny.EXPERIMENT_SIZES, tiny.LVR_TOKENS
    )
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), steps=STEPS, max_spans=1)
    assert isinstance(mechanism, SpanMechanism)
    examples = digits.generate(NUM_PROMPTS, stream="dev", seed=0, kinds=("read", "sum"))
    texts = []
    images = []
    for example in examples:
        content = [{"type": "text", "text": example.question}, {"type": "image"}]
        messages: list[dict] = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, tokenize=False))
        images.append(example.image)
    tokenizer.padding_side = "left"
    batch = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    patches = batch["image_grid_thw"].prod(-1).tolist()
    pixels = batch["pixel_values"].split(patches)
    requests = []
    for row in range(NUM_PROMPTS):
        valid = batch["attention_mask"][row].bool()
        requests.append(
            RolloutRequest(
                batch["input_ids"][row][valid],
                seeds=list(range(row * GROUP_SIZE, (row + 1) * GROUP_SIZE)),
                images=ImageInputs(pixels[row], batch["image_grid_thw"][row : row + 1]),
            )
        )
    return Setting(model, processor, mechanism, eos_id, batch, requests)


def engine_path(
    setting: Setting, new_tokens: int, visibility: str, pack_linears: bool = True
) -> Contender:
    """Engine `hf` on all prompts, latents and log-probs included."""
    mechanism = setting.mechanism.replace(visibility=visibility)
    engine = HFRolloutEngine(setting.model, mechanism, [setting.eos_id], pack_linears=pack_linears)

    def run() -> int:
        groups = engine.generate(setting.requests, SamplingParams(new_tokens))
        trajectories = [trajectory for group in groups for trajectory in group]
        with_span = sum(len(t.latents) == STEPS for t in trajectories)
        assert with_span > 0.9 * len(trajectories), "the benchmark must have latents"
        return sum(len(t.token_ids) for t in trajectories)

    return Contender(
        f"engine hf, latents, {visibility}{'' if pack_linears else ', plain linears'}", run
    )


def generate_path(setting: Setting, new_tokens: int) -> Contender:
    """Hugging Face's own sampling of text, which returns ids only."""

    def run() -> int:
        with torch.no_grad():
            ids = setting.model.generate(  # type: ignore[misc]  # its `self` is narrower than its class
                **setting.batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=GROUP_SIZE,
                max_new_tokens=new_tokens,
            )
        return ids[:, setting.batch["input_ids"].shape[1] :].numel()

    return Contender("Hugging Face generate, no latents", run)


def naive_path(setting: Setting, new_tokens: int) -> Contender:
    """One trajectory at a time, as the published code decodes."""
    generator = torch.Generator()

    def run() -> int:
        generator.manual_seed(0)
        rows = [request for request in setting.requests for _ in range(GROUP_SIZE)][:NUM_NAIVE]
        return sum(
            len(naive_trajectory(setting, request, new_tokens, generator)) for request in rows
        )

    return Contender("naive latent loop", run)


def measure(paths: list[Contender], repeats: int) -> dict[str, dict]:
    """Median CPU-seconds and positions a CPU-second of each path: one warm-up, then turns.

    `first_is_faster_by`: how many times as many positions a CPU-second the first path makes.
    """
    for path in paths:
        path.run()
    seconds: dict[str, list[float]] = {path.name: [] for path in paths}
    positions = {}
    for _ in range(repeats):
        for path in paths:
            started = time.process_time()
            positions[path.name] = path.run()
            seconds[path.name].append(time.process_time() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: positions[name] / median for name, median in medians.items()}
    return {
        name: {
            "cpu_s": median,
            "positions": positions[name],
            "positions_per_cpu_s": rates[name],
            "first_is_faster_by": rates[paths[0].name] / rates[name],
        }
        for name, median in medians.items()
    }


def show(console: Console, title: str, results: dict[str, dict]) -> None:
    """Prints what `measure` found."""
    table = Table(title=title)
    base = next(iter(results))
    for column in ("path", "CPU s", "positions", "positions / CPU s", f"{base} is faster by"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for name, result in results.items():
        ratio = result["first_is_faster_by"]
        rate = f"{result['positions_per_cpu_s']:,.0f}"
        table.add_row(
            name, f"{result['cpu_s']:.3f}", str(result["positions"]), rate, f"{ratio:.2f} x"
        )
    console.print(table)


def text_report(
    console: Console, labels: list[str], new_tokens: int, repeats: int, folder: Path
) -> dict[str, dict]:
    """Second section: prints and returns a table and the ratios of each size.

    Ratios are medians over rounds, each of neighbouring turns.

    Args:
        folder: keeps the checkpoints, because vLLM's cache of compiled code knows a model by its
            path.
    """
    version = text_models.vllm_version()
    report: dict[str, dict] = {}
    if version is None:
        console.print("rows of vLLM are left out: it is not installed here (make vllm)")
    for label in labels:
        checkpoint = folder / label.replace(" ", "")
        num_parameters = text_models.write_checkpoint(checkpoint, text_models.SIZES[label])
        turns = text_models.compare(checkpoint, new_tokens, repeats, with_vllm=version is not None)
        table = Table(
            title=f"text model, {num_parameters / 1e6:.1f} M parameters, fp32, "
            f"{new_tokens} new positions"
        )
        for column in ("path", "CPU s", "wall s", "positions", "latents", "positions / CPU s"):
            table.add_column(column, justify="left" if column == "path" else "right")
        rows = {name: median_turn(values) for name, values in turns.items()}
        for name, turn in rows.items():
            cells = (
                f"{turn.cpu_s:.2f}",
                f"{turn.wall_s:.2f}",
                str(turn.num_positions),
                str(turn.num_latents),
            )
            table.add_row(name, *cells, f"{turn.num_positions / turn.cpu_s:,.0f}")
        console.print(table)
        ratios = {
            f"{a} / {b}": statistics.median(
                y.cpu_s / x.cpu_s for x, y in zip(turns.get(a, []), turns.get(b, []), strict=True)
            )
            for a, b in text_models.RATIOS
            if a in turns and b in turns
        }
        for name, ratio in ratios.items():
            console.print(f"  {ratio:.2f} x  {name}")
        report[label] = {
            "vllm": version,
            "parameters": num_parameters,
            "ratios": ratios,
            "paths": {name: asdict(turn) for name, turn in rows.items()},
        }
    return report


def median_turn(turns: list[text_models.Turn]) -> text_models.Turn:
    """The first turn with the medians of the times of all; its counts are those of all."""
    cpu_s, wall_s = (
        statistics.median(getattr(turn, name) for turn in turns) for name in ("cpu_s", "wall_s")
    )
    return replace(turns[0], cpu_s=cpu_s, wall_s=wall_s)


def main() -> None:
    """Runs the sections that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[11, 64])
    parser.add_argument("--text-positions", type=int, default=64, help="of the text models")
    parser.add_argument("--repeats", type=int, default=5)
    sizes = list(text_models.SIZES)
    parser.add_argument(
        "--sizes", nargs="+", choices=sizes, default=sizes, help="of the text models"
    )
    parser.add_argument(
        "--sections", nargs="+", choices=("images", "text"), default=["images", "text"]
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/benchmark_rollout"), help="of the text models"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    disable_progress_bar()  # transformers', for weights
    console = Console(width=120)
    report: dict[str, dict] = {}
    setting = build()
    for new_tokens in options.new_tokens if "images" in options.sections else []:
        variants = (("full", True), ("latents_only", True), ("full", False))
        engines = [engine_path(setting, new_tokens, *variant) for variant in variants]
        paths = [*engines, generate_path(setting, new_tokens), naive_path(setting, new_tokens)]
        results = measure(paths, options.repeats)
        show(
            console,
            f"{NUM_PROMPTS} prompts x {GROUP_SIZE}, {new_tokens} new positions",
            results,
        )
        report[str(new_tokens)] = results
    if "text" in options.sections:
        folder = options.folder.resolve()
        report["text"] = text_report(
            console, options.sizes, options.text_positions, options.repeats, folder
        )
    write_result(options.json, report, seed=0)


if __name__ == "__main__":
    main()
