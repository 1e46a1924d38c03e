"""Tiny models for a mechanism under test, and what it does on them.

A freshly initialised tiny model is nearly constant: its embeddings are 1/50 of its hidden states,
its logits are almost uniform. `sharpen` scales its weights, so that a wrong latent, position or
mask moves log-probs by nats, not by 1e-3.

Legend: N rows (trajectories), T completion positions, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.trajectory import Trajectory

BACKBONES = {"qwen3": tiny.tiny_qwen3, "qwen2_5_vl": tiny.tiny_qwen2_5_vl}
TEMPERATURE = 2.0
WORDS = ("read", "red", "blue", "green", "?")
SAMPLED = ("<|im_end|>", "<answer>", "3", "7")
# prompts of different lengths; the number of images is for backbones that have them
PROMPTS = (("read ? ?", 2), ("read red ?", 1), ("read", 0))
GROUP_SIZE = 6
IMAGE_SIZE = (28, 42)  # pixels: 2 x 3 merged tokens


def sharpen(
    model: PreTrainedModel, opening_ids: frozenset[int], eos_id: int, eos_bias: float = 1.0
) -> None:
    """Changes a tiny model in place so that its numbers react to every input.

    Args:
        opening_ids: get a bias of 3, so that spans are frequent.
        eos_bias: how frequent ends are.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name:
                parameter.mul_(20.0)
            elif "embed_tokens" in name:
                parameter.mul_(40.0)
            elif parameter.ndim >= 2:
                parameter.mul_(10.0)
    head = model.get_output_embeddings()
    bias_V = torch.zeros(head.weight.shape[0])
    bias_V[sorted(opening_ids)] = 3.0
    bias_V[eos_id] = eos_bias
    head.bias = torch.nn.Parameter(bias_V)


@dataclass(frozen=True)
class Recorded:
    """Trajectories of a mechanism with what they came of; one entry of `images` each."""

    requests: list[RolloutRequest]
    trajectories: list[Trajectory]
    images: list[ImageInputs | None]


@dataclass(frozen=True)
class Case:
    """A mechanism on one backbone.

    Attributes:
        sampled_ids: the only tokens that rollouts may draw, so that rows meet spans, delimiters
            and ends soon.
    """

    backbone: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    mechanism: Mechanism
    sampled_ids: frozenset[int]

    @cached_property
    def adapter(self) -> ModelAdapter:
        return ModelAdapter(self.model, self.mechanism)

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def max_new_tokens(self) -> int:
        """Room for two spans, or for the slots, and some text."""
        mechanism = self.mechanism
        num_slots = mechanism.num_slots(None)
        num_images = max(count for _, count in PROMPTS) * 6 if self.processor else 0
        spans = 0 if mechanism.has_slots else 2 * (mechanism.steps + 2)
        return num_slots + min(num_slots * mechanism.top_k_image, num_images) + spans + 10

    def engine(self, model: PreTrainedModel | None = None) -> HFRolloutEngine:
        banned = set(range(len(self.tokenizer))) - self.sampled_ids
        return HFRolloutEngine(model or self.model, self.mechanism, [self.eos_id], banned)

    def generate(
        self, requests: list[RolloutRequest], max_new_tokens: int | None = None
    ) -> list[list[Trajectory]]:
        sampling = SamplingParams(max_new_tokens or self.max_new_tokens, temperature=TEMPERATURE)
        return self.engine().generate(requests, sampling)

    @cached_property
    def requests(self) -> list[RolloutRequest]:
        generator = torch.Generator().manual_seed(0)
        requests = []
        for row, (text, num_images) in enumerate(PROMPTS):
            num_images = num_images if self.processor else 0
            seeds = [row * GROUP_SIZE + i for i in range(GROUP_SIZE)]
            ids, images = self._prompt(text, num_images, generator)
            requests.append(RolloutRequest(ids, seeds, images, group_id=str(row)))
        return requests

    def _prompt(
        self, text: str, num_images: int, generator: torch.Generator
    ) -> tuple[Tensor, ImageInputs | None]:
        content = [{"type": "text", "text": text}, *[{"type": "image"}] * num_images]
        messages: list[dict] = [{"role": "user", "content": content}]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if num_images == 0 or self.processor is None:
            return torch.tensor(self.tokenizer(prompt).input_ids), None
        pixels = torch.randint(
            0, 255, (num_images, *IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8
        )
        pictures = [Image.fromarray(image.numpy()) for image in pixels]
        inputs = self.processor(text=[prompt], images=pictures, return_tensors="pt")
        backbone = backbone_of_processor(self.processor)
        return inputs["input_ids"][0], backbone.image_inputs(inputs, self.processor)

    @cached_property
    def recorded(self) -> Recorded:
        """Rolls out the case's requests, once; no check changes the model."""
        return recorded(self.requests, self.generate(self.requests))

    def collate(
        self, made: Recorded | None = None, padding_side: str = "right"
    ) -> LatentSequences:
        made = made or self.recorded
        return collate(
            made.trajectories, made.images, self.adapter, self.mechanism.visibility, padding_side
        )


def recorded(requests: list[RolloutRequest], groups: list[list[Trajectory]]) -> Recorded:
    images = [
        request.images for request, group in zip(requests, groups, strict=True) for _ in group
    ]
    return Recorded(requests, [trajectory for group in groups for trajectory in group], images)


def build_case(cls: type[Mechanism], backbone: str, settings: dict) -> Case:
    """Builds a tiny model of `backbone` with the mechanism attached.

    Raises:
        ConfigError: no such tiny model, or settings that the mechanism refuses.
    """
    if backbone not in BACKBONES:
        raise ConfigError(
            "no such tiny model",
            where="backbones",
            got=backbone,
            expected=f"some of {tuple(BACKBONES)}",
        )
    known = tiny.word_tokenizer(WORDS, ()).get_vocab()
    tokens = [token for token in cls.tokens_of(settings).values() if token not in known]
    model, tokenizer, processor = BACKBONES[backbone](WORDS, latent_tokens=tokens)
    mechanism = cls.from_tokens(tokenizer.get_vocab(), **settings)
    sharpen(model, mechanism.opening_ids, tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mechanism.attach(model)
    own_ids = set(mechanism.token_ids.values()) - mechanism.banned_ids
    sampled_ids = {tokenizer.get_vocab()[token] for token in SAMPLED}
    return Case(backbone, model, tokenizer, processor, mechanism, frozenset(sampled_ids | own_ids))
