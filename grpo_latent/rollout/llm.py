"""Answers prompts with a latent checkpoint on either engine: text and images to trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from grpo_latent.common.manifest import check_whole
from grpo_latent.common.settings import check_choice
from grpo_latent.errors import DataError
from grpo_latent.models.loading import load_latent_model, reading
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutEngine, RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import Trajectory

ENGINES = ("hf", "vllm")


class LatentLLM:
    """A latent model that answers prompts.

        llm = LatentLLM("checkpoints/lvr", engine="vllm")
        groups = llm.generate(["<image>What is in the box?"], [[image]])
        trajectory = groups[0][0]
        print(llm.text(trajectory), len(trajectory.latents))

    Args:
        folder: a latent checkpoint.
        engine: `hf` (the reference, any mechanism) or `vllm` (fast, for what `rollout.vllm` runs).
        device: of engine hf; engine vllm takes the device that vLLM was built for.
        overrides: settings of the mechanism to replace, such as `{"steps": 4}`.
        verify_digests: compare files with the folder's manifest; False compares names and sizes.
        engine_options: further arguments of the engine's class.

    Raises:
        ConfigError: no such engine, or a model that it cannot run.
        CheckpointError: the folder is damaged, or disagrees with itself.
    """

    engine: RolloutEngine

    def __init__(
        self,
        folder: str | Path,
        engine: str = "hf",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        overrides: dict | None = None,
        verify_digests: bool = True,
        **engine_options: Any,
    ):
        check_choice(engine, ENGINES, "engine")
        if engine == "hf":
            loaded = load_latent_model(
                folder, dtype, device, overrides=overrides, verify_digests=verify_digests
            )
            self.tokenizer = loaded.tokenizer
            self.processor = loaded.processor
            self.mechanism = loaded.mechanism
            self.engine = HFRolloutEngine(
                loaded.model, loaded.mechanism, loaded.eos_ids, **engine_options
            )
            return
        # needs vLLM, which few installations have
        from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

        check_whole(folder, verify_digests)
        vllm_engine = VllmRolloutEngine(folder, overrides, dtype=dtype, **engine_options)
        self.engine = vllm_engine
        self.tokenizer = vllm_engine.skeleton.tokenizer
        self.mechanism = vllm_engine.mechanism
        self.processor = None
        if vllm_engine.adapter.has_vision:
            # the same processor as engine hf's: vLLM is given pixels, not images
            with reading("processor", Path(folder)):
                self.processor = AutoProcessor.from_pretrained(folder)

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        sampling: SamplingParams | None = None,
        num_trajectories: int = 1,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[list[Trajectory]]:
        """`num_trajectories` completions of each prompt.

        Args:
            prompts: user messages; `<image>` stands where an image goes.
            images: of each prompt, in the order of its `<image>`; None if no prompt has any.
            sampling: default 256 tokens, greedy.
            seed: of the run; equal arguments give equal trajectories.
            steps: latent steps a span, None for the checkpoint's.

        Raises:
            DataError: images and `<image>` do not match.
        """
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise DataError(
                "prompts and images differ in number",
                got=f"{len(prompts)}, {len(images)}",
                expected="one list a prompt",
            )
        chats = [[{"role": "user", "content": content_parts(text)}] for text in prompts]
        return self.chat(chats, images, sampling, num_trajectories, seed, steps)

    def chat(
        self,
        chats: Sequence[Sequence[dict]],
        images: Sequence[Sequence[Image.Image]],
        sampling: SamplingParams | None = None,
        num_trajectories: int = 1,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[list[Trajectory]]:
        """`num_trajectories` completions of each chat; arguments and errors as `generate`.

        Args:
            chats: messages, whose contents are lists of {"type": "text", "text"} and {"type":
                "image"} in order.
            images: of each chat, in the order of its image parts.
        """
        requests = []
        for idx, (messages, pictures) in enumerate(zip(chats, images, strict=True)):
            prompt = encode_prompt(
                self.tokenizer, self.processor, messages, pictures, where=f"prompt {idx}"
            )
            seeds = [trajectory_seed(seed, 0, idx, number) for number in range(num_trajectories)]
            requests.append(
                RolloutRequest(prompt.ids, seeds, prompt.images, group_id=str(idx), steps=steps)
            )
        return self.engine.generate(
            requests, sampling or SamplingParams(max_new_tokens=256, temperature=0.0)
        )

    def text(self, trajectory: Trajectory) -> str:
        """The completion as a reader sees it: no latent span, no special token."""
        text = self.tokenizer.decode(trajectory.text_ids, skip_special_tokens=True)
        assert isinstance(text, str)  # a list is what ids [B, T] would give
        return text


def content_parts(text: str) -> list[dict]:
    """The parts of a chat message, in which an image stands where the text says so.

    >>> content_parts("<image>What is it?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    """
    parts: list[dict] = []
    for idx, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] if idx else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
