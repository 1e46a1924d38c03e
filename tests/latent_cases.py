"""Tiny latent models whose numbers react to every input, and requests for them.

A freshly initialised tiny model is nearly constant: its embeddings are 1/50 of its hidden states,
its logits are almost uniform. `build_case` scales its weights up, so that a wrong latent, position
or mask moves log-probs by nats, not by 1e-3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.latent.mechanisms import MECHANISMS, Mechanism
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.testing.cases import sharpen

VL_NAMES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
TEXT_NAMES = ("qwen2", "qwen3")
ALL_NAMES = VL_NAMES + TEXT_NAMES
WORDS = ("read", "red", "blue", "green", "?")
SAMPLED = (
    "<|lvr_start|>",
    "<|im_end|>",
    "<answer>",
    "3",
    "7",
)  # the tokens that `engine` may draw


@dataclass(frozen=True)
class Case:
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    adapter: ModelAdapter

    def token_id(self, token: str) -> int:
        return self.tokenizer.get_vocab()[token]

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def sampled_ids(self) -> list[int]:
        return [self.token_id(token) for token in SAMPLED]

    def mechanism(self, mechanism: str = "lvr", **changes) -> Mechanism:
        values = dict(
            start_token="<|lvr_start|>", latent_token="<|lvr|>", end_token="<|lvr_end|>", steps=3
        )
        values |= changes
        ids = {
            f"{role}_id": self.token_id(values[f"{role}_token"])
            for role in ("start", "latent", "end")
        }
        if values.get("exit") == "latent_end":
            values |= dict(
                latent_end_token="<|lvr_latent_end|>",
                latent_end_id=self.token_id("<|lvr_latent_end|>"),
            )
        return MECHANISMS[mechanism](**ids, **values)

    config = mechanism  # as scripts beside this repository call it

    def engine(
        self, mechanism: Mechanism | None = None, sampled: tuple[str, ...] = SAMPLED, **kwargs
    ):
        """Makes an engine that draws tokens of `sampled` only: spans and ends are frequent."""
        allowed = {self.token_id(token) for token in sampled}
        banned = set(range(len(self.tokenizer))) - allowed
        return HFRolloutEngine(
            self.model, mechanism or self.mechanism(), [self.eos_id], banned, **kwargs
        )

    def images(
        self, num_images: int, seed: int = 0, size: tuple[int, int] = (28, 42)
    ) -> ImageInputs | None:
        """Random images of `size` (height, width): 2 x 3 merged tokens each."""
        if num_images == 0:
            return None
        rng = np.random.default_rng(seed)
        pictures = [
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            for _ in range(num_images)
        ]
        batch = self.processor.image_processor(images=pictures, return_tensors="pt")
        return ImageInputs(batch["pixel_values"], batch["image_grid_thw"])

    def request(
        self,
        text: str = "read red ?",
        images: ImageInputs | None = None,
        seeds=(1,),
        image_first=False,
        **kwargs,
    ) -> RolloutRequest:
        """`<|im_start|> text image… <|im_end|>`, or the images first."""
        merge = 4
        counts = (
            [] if images is None else [int(grid.prod()) // merge for grid in images.image_grid_thw]
        )
        pictures = " ".join(
            f"<|vision_start|> {'<|image_pad|> ' * count}<|vision_end|>" for count in counts
        )
        body = f"{pictures} {text}" if image_first else f"{text} {pictures}"
        ids = self.tokenizer(f"<|im_start|> {body} <|im_end|>", return_tensors="pt").input_ids[0]
        assert self.tokenizer.unk_token_id not in ids
        return RolloutRequest(prompt_ids=ids, seeds=list(seeds), images=images, **kwargs)


def build_case(name: str, head: str = "none", seed: int = 0) -> Case:
    """A case of its own, for tests that change the model."""
    return sharpened(name, getattr(tiny, f"tiny_{name}")(WORDS, seed=seed), head, seed)


def sharpened(name: str, built: tiny.TinyModel, head: str = "none", seed: int = 0) -> Case:
    """A tiny model, changed in place so that its numbers react to every input."""
    model, tokenizer, processor = built
    # spans frequent, ends rare: short rollouts hold several spans, and the rows of a batch differ
    start_id = tokenizer.get_vocab()["<|lvr_start|>"]
    sharpen(model, frozenset({start_id}), tokenizer.eos_token_id, eos_bias=-0.5)
    case = Case(name, model, tokenizer, processor, ModelAdapter(model))
    mechanism = case.mechanism(head=head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mechanism.attach(model)
    return replace(case, adapter=ModelAdapter(model, mechanism))


@functools.cache
def case(name: str, head: str = "none") -> Case:
    """A shared case: do not change its model."""
    return build_case(name, head)


def sampling(max_new_tokens: int = 14, **kwargs) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **kwargs)


def norms_in_double(monkeypatch):
    """Lets transformers' norms compute in the model's dtype.

    They are float32 otherwise, which drowns a finite difference in rounding.
    """

    def forward(norm, hidden_BTH):
        scale_BT1 = torch.rsqrt(hidden_BTH.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * hidden_BTH * scale_BT1

    for norm_class in (Qwen2RMSNorm, Qwen2VLRMSNorm):
        monkeypatch.setattr(norm_class, "forward", forward)
