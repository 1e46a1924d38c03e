"""Times decoding of the mechanisms beside LVR, each against the way of its published code.

    python benchmarks/mechanisms.py [--sections ilvr ivt_lr] [--repeats 5] [--json out.json]

The embedded experiment's model (Qwen2.5-VL, 1.3 M parameters, random weights), one thread,
CPU-seconds (`time.process_time`), medians of repeats that interleave the paths, so that a busy
machine slows all of them alike.

    ilvr     32 prompts with an image each, spans that repeat between texts, 64 new positions:
             engine `hf` over all 32 rows, engine `hf` one row at a time, and a plain loop over the
             Hugging Face model one row at a time, as published
    ivt_lr   8 prompts with an image of 256 tokens, 3 slots of 32 image embeddings, 16 text
             positions: engine `hf` over all rows and one at a time (keys and values reused, last
             row of attention only), and the published way: one row at a time, the whole prefix
             with full maps anew for each slot; its text decoded over a cache, or like its slots

Paths of a section draw the same tokens: `ilvr` checks it for the two engine paths, `ivt_lr` for
all three.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from result_file import write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from rollout import Contender, measure, show  # noqa: E402
from tiny_setting import Setting, naive_trajectory, tiny_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from grpo_latent.backbones.images import ImageInputs  # noqa: E402
from grpo_latent.data.embedded import digits  # noqa: E402
from grpo_latent.latent.mechanisms import ILVR, IVTLR, SpanMechanism  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.models.adapter import ModelAdapter  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402

NUM_ROWS = 32
NEW_TOKENS = 64
# a visual token then costs about 0.4 as much in the tower as in the decoder, as in Qwen2-VL-7B
SLOT_LAYERS = 8
SLOT_ROWS = 8
SLOTS = 3
TOP_K = 32
TEXT_TOKENS = 16
IMAGE_SIDE = 224  # 14 pixels a visual token
SHARPER = 4.0  # random weights attend uniformly, and rounding would choose
LIKELY = 4.0  # bias of the logit of `start`


def requests_of(processor, num: int, kinds: tuple[str, ...]) -> list[RolloutRequest]:
    """One trajectory a prompt, questions of the embedded task."""
    requests = []
    for seed, example in enumerate(digits.generate(num, stream="dev", seed=0, kinds=kinds)):
        content = [{"type": "text", "text": example.question}, {"type": "image"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False
        )
        batch = processor(text=[text], images=[example.image], return_tensors="pt")
        images = ImageInputs(batch["pixel_values"], batch["image_grid_thw"])
        requests.append(RolloutRequest(batch["input_ids"][0], seeds=[seed], images=images))
    return requests


def ilvr() -> tuple[str, list[Contender]]:
    """(title, paths); the first one is what the others are compared with."""
    model, tokenizer, processor, eos_id = tiny_model(
        {ILVR.published_tokens["start"]: LIKELY},
        tiny.EXPERIMENT_SIZES,
        tuple(ILVR.published_tokens.values()),
    )
    mechanism = ILVR.from_tokens(tokenizer.get_vocab())
    assert isinstance(mechanism, SpanMechanism)
    requests = requests_of(processor, NUM_ROWS, ("max", "sum"))
    engine = HFRolloutEngine(model, mechanism, [eos_id])
    setting = Setting(model, processor, mechanism, eos_id, {}, requests)
    generator = torch.Generator()

    def decode(batches: list[list[RolloutRequest]]) -> list[list[int]]:
        groups = [
            group
            for batch in batches
            for group in engine.generate(batch, SamplingParams(NEW_TOKENS))
        ]
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


def ivt_lr() -> tuple[str, list[Contender]]:
    """(title, paths); the first one is what the others are compared with."""
    model, tokenizer, processor, eos_id = tiny_model(
        {},
        replace(tiny.EXPERIMENT_SIZES, layers=SLOT_LAYERS, max_positions=1024),
        tuple(IVTLR.published_tokens.values()),
    )
    for name, parameter in model.model.language_model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.mul_(SHARPER)
    ids = tokenizer.get_vocab()
    mechanism = IVTLR.from_tokens(
        ids, steps=SLOTS, top_k_image=TOP_K, selection_order="attention"
    )  # as published, and as `recomputed_slots` does
    rng = np.random.default_rng(0)
    requests = []
    for request in requests_of(processor, SLOT_ROWS, ("max",)):
        pixels = rng.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
        batch = processor.image_processor(images=[pixels], return_tensors="pt")
        place = (request.prompt_ids == model.config.image_token_id).nonzero()[:, 0]
        image = torch.full(
            (int(batch["image_grid_thw"].prod()) // 4,), model.config.image_token_id
        )
        prompt_ids = torch.cat(
            [request.prompt_ids[: place[0]], image, request.prompt_ids[place[-1] + 1 :]]
        )
        requests.append(
            replace(
                request,
                prompt_ids=prompt_ids,
                images=ImageInputs(batch["pixel_values"], batch["image_grid_thw"]),
            )
        )
    model.double()  # for the comparison below: at a near tie float32's rounding chooses
    engine = HFRolloutEngine(model, mechanism, [eos_id])
    sampling = SamplingParams(SLOTS * (TOP_K + 1) + TEXT_TOKENS, temperature=0)

    def decode(batches: list[list[RolloutRequest]]) -> list[tuple[list[int], list[int]]]:
        groups = [group for batch in batches for group in engine.generate(batch, sampling)]
        return [(t.text_ids, t.selected_idx.tolist()) for (t,) in groups]

    banned = sorted(
        engine.adapter.vision_ids | {ids[token] for token in IVTLR.published_tokens.values()}
    )

    def published(caches_text: bool) -> list[tuple[list[int], list[int]]]:
        return [
            recomputed_slots(engine.adapter, request, banned, caches_text) for request in requests
        ]

    one_by_one = [[request] for request in requests]
    assert decode([requests]) == decode(one_by_one) == published(True) == published(False), (
        "the paths must choose and draw the same"
    )
    model.float()
    engine = HFRolloutEngine(model, mechanism, [eos_id])
    num = sampling.max_new_tokens * SLOT_ROWS
    return (
        f"IVT-LR, {SLOT_ROWS} rows, {SLOTS} slots of {TOP_K} image embeddings, "
        f"{TEXT_TOKENS} text positions",
        [
            Contender(
                f"engine hf, {SLOT_ROWS} rows at a time", lambda: len(decode([requests])) and num
            ),
            Contender("engine hf, one row at a time", lambda: len(decode(one_by_one)) and num),
            Contender("prefix anew for each slot", lambda: len(published(True)) and num),
            Contender(
                "prefix anew for each slot and token", lambda: len(published(False)) and num
            ),
        ],
    )


@torch.no_grad()
def recomputed_slots(
    adapter: ModelAdapter, request: RolloutRequest, banned: list[int], caches_text: bool
) -> tuple[list[int], list[int]]:
    """(text ids, chosen image positions), greedy, in the published way.

    The prefix is read anew, with full attention maps, for each slot.
    """
    decoder = adapter.decoder
    text_config = adapter.text_config
    assert request.images is not None, "each prompt has an image"
    is_image = adapter.backbone.is_image_token(request.prompt_ids)
    visual_MH = adapter.encode_images(request.images)
    embeds_TH = adapter.embed(request.prompt_ids).masked_scatter(is_image[:, None], visual_MH)
    columns = is_image.nonzero()[:, 0]
    left = torch.ones(int(is_image.sum()), dtype=torch.bool)
    chosen: list[int] = []
    cache = DynamicCache(config=text_config)

    def forward(embeds_LH: Tensor, start: int = 0, with_maps: bool = False, caches: bool = False):
        # sdpa gives no maps
        text_config._attn_implementation = "eager" if with_maps else "sdpa"
        return decoder(
            inputs_embeds=embeds_LH[None],
            position_ids=torch.arange(start, start + len(embeds_LH)).expand(3, 1, -1),
            past_key_values=cache if caches else None,
            use_cache=caches,
            output_attentions=with_maps,
        )

    for _ in range(SLOTS):
        output = forward(embeds_TH, with_maps=True)
        weights_M = torch.stack([layer[0, :, -1] for layer in output.attentions]).mean((0, 1))[
            columns
        ]
        best_K = weights_M.masked_fill(~left, -1).argsort(descending=True, stable=True)[:TOP_K]
        left[best_K] = False
        chosen += best_K.tolist()
        embeds_TH = torch.cat([embeds_TH, visual_MH[best_K], output.last_hidden_state[0, -1:]])
    hidden_1H = forward(embeds_TH, caches=caches_text).last_hidden_state[:, -1]
    text_ids: list[int] = []
    for _ in range(TEXT_TOKENS):
        token = (
            adapter.logits(hidden_1H).index_fill(1, torch.tensor(banned), -torch.inf).argmax(-1)
        )
        text_ids.append(int(token))
        embeds_TH = torch.cat([embeds_TH, adapter.embed(token)])
        start = len(embeds_TH) - 1 if caches_text else 0
        hidden_1H = forward(embeds_TH[start:], start, caches=caches_text).last_hidden_state[:, -1]
    return text_ids, chosen


SECTIONS: dict[str, Callable[[], tuple[str, list[Contender]]]] = {"ilvr": ilvr, "ivt_lr": ivt_lr}


def main() -> None:
    """Runs the sections that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=120)
    report: dict[str, dict] = {}
    for name in options.sections:
        title, paths = SECTIONS[name]()
        report[name] = measure(paths, options.repeats)
        show(console, title, report[name])
    write_result(options.json, report, seed=0)


if __name__ == "__main__":
    main()
