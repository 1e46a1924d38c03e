"""Decoding of the mechanisms beside LVR, each against the way of its published code, in one run.

    python benchmarks/mechanisms.py [--sections ilvr] [--repeats 5] [--json out.json]

The embedded experiment's model (Qwen2.5-VL, 1.3 M parameters, random weights), one thread, CPU-seconds
(`time.process_time`), medians of repeats that interleave the paths, so that a busy machine slows all of them alike.

    ilvr     32 prompts with an image each, spans that repeat between texts, 64 new positions: engine `hf` over all 32 rows,
             engine `hf` one row at a time, and a plain loop over the Hugging Face model one row at a time, as published

Paths of a section draw the same tokens: `ilvr` checks it for the two engine paths.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rollout import Contender, Setting, measure, naive_trajectory, show  # noqa: E402

from grpo_latent.data import digits  # noqa: E402
from grpo_latent.latent.mechanisms import ILVR_TOKENS, mechanism_config  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.models.adapter import ImageInputs  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402

NUM_ROWS, NEW_TOKENS = 32, 64
LIKELY, NEVER = 4.0, -1e4  # biases of the logits of `start` and EOS


def requests_of(processor, num: int, kinds: tuple[str, ...]) -> list[RolloutRequest]:
    """One trajectory a prompt, questions of the embedded task."""
    requests = []
    for seed, example in enumerate(digits.generate(num, stream="dev", seed=0, kinds=kinds)):
        content = [{"type": "text", "text": example.question}, {"type": "image"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        batch = processor(text=[text], images=[example.image], return_tensors="pt")
        images = ImageInputs(batch["pixel_values"], batch["image_grid_thw"])
        requests.append(RolloutRequest(batch["input_ids"][0], seeds=[seed], images=images))
    return requests


def ilvr() -> tuple[str, list[Contender]]:
    """(title, paths); the first one is what the others are compared with."""
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS, tiny.EXPERIMENT_SIZES, latent_tokens=ILVR_TOKENS)
    ids = tokenizer.get_vocab()
    bias = torch.zeros(model.lm_head.out_features)
    bias[ids[ILVR_TOKENS[0]]], bias[tokenizer.eos_token_id] = LIKELY, NEVER
    model.lm_head.bias = torch.nn.Parameter(bias)
    model.requires_grad_(False)
    config = mechanism_config("ilvr", {token: ids[token] for token in ILVR_TOKENS})
    requests = requests_of(processor, NUM_ROWS, ("max", "sum"))
    engine = HFRolloutEngine(model, config, [tokenizer.eos_token_id])
    setting = Setting(model, processor, config, tokenizer.eos_token_id, {}, requests)
    generator = torch.Generator()

    def decode(batches: list[list[RolloutRequest]]) -> list[list[int]]:
        groups = [group for batch in batches for group in engine.generate(batch, SamplingParams(NEW_TOKENS))]
        trajectories = [trajectory for group in groups for trajectory in group]
        assert sum(len(t.spans) > 1 for t in trajectories) > NUM_ROWS / 2, "spans must repeat"
        return [t.token_ids.tolist() for t in trajectories]

    def count(completions: list[list[int]]) -> int:
        return sum(map(len, completions))

    def plain_loop() -> int:
        generator.manual_seed(0)
        return sum(len(naive_trajectory(setting, r, NEW_TOKENS, generator)) for r in requests)

    one_by_one = [[request] for request in requests]
    assert decode([requests]) == decode(one_by_one), "the paths must draw the same tokens"
    return f"ILVR, {NUM_ROWS} rows, {NEW_TOKENS} new positions", [
        Contender("engine hf, 32 rows at a time", lambda: count(decode([requests]))),
        Contender("engine hf, one row at a time", lambda: count(decode(one_by_one))),
        Contender("plain loop, one row at a time", plain_loop),
    ]


SECTIONS: dict[str, Callable[[], tuple[str, list[Contender]]]] = {"ilvr": ilvr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console, report = Console(width=120), {}
    for name in options.sections:
        title, paths = SECTIONS[name]()
        report[name] = measure(paths, options.repeats)
        show(console, title, report[name], paths[0].name)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
