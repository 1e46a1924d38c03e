"""Decodes prompts with one checkpoint: greedily, sampled, with other latents, or ablated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.common.settings import check_keys
from grpo_latent.errors import ConfigError
from grpo_latent.eval.donors import image_partners
from grpo_latent.eval.pixels import held
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.latent.treatments import Treatment
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.vision_cache import encoding_once
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import Trajectory

LATENT_KEYS = ("steps", "exit", "latent_end_threshold", "max_spans", "visibility")
SAMPLING_KEYS = ("n", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Decoding:
    """A decoding strategy.

    Attributes:
        name: what differs from the plain greedy one, such as `exit=latent_end,steps=16`.
        num_sampled: trajectories a prompt; 0 for one greedy trajectory.
        temperature, top_k, top_p: of sampled ones.
        latent: settings of the mechanism that differ from the checkpoint's.
    """

    name: str
    num_sampled: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    latent: tuple[tuple[str, object], ...] = ()

    def __post_init__(self):
        if (
            isinstance(self.num_sampled, bool)
            or not isinstance(self.num_sampled, int)
            or self.num_sampled < 0
        ):
            raise ConfigError(
                "not a valid count", where="num_sampled", got=self.num_sampled, expected="int >= 0"
            )

    @classmethod
    def from_dict(cls, values: dict, where: str) -> Decoding:
        """Reads a config's `{steps: 4}` or `{n: 8, temperature: 0.7}`; without `n` it is greedy.

        Raises:
            ConfigError: an unknown key, or sampling settings without `n`.
        """
        known = (*LATENT_KEYS, *SAMPLING_KEYS)
        check_keys(values, known, where)
        if not values:
            raise ConfigError(
                "not a decoding strategy", where=where, got=values, expected=f"some of {known}"
            )
        if not values.get("n") and set(values) & set(SAMPLING_KEYS):
            raise ConfigError(
                "sampling settings of a greedy decoding",
                where=where,
                got=values,
                expected="n >= 1",
            )
        sampling = {name: values[name] for name in SAMPLING_KEYS[1:] if name in values}
        latent = tuple((name, values[name]) for name in LATENT_KEYS if name in values)
        name = ",".join(
            f"{key}={values[key]}" for key in (*LATENT_KEYS, *SAMPLING_KEYS) if key in values
        )
        return cls(name, values.get("n", 0), **sampling, latent=latent)

    def params(self, max_new_tokens: int) -> SamplingParams:
        if not self.num_sampled:
            return SamplingParams(max_new_tokens, temperature=0.0)
        return SamplingParams(max_new_tokens, self.temperature, self.top_k, self.top_p)


GREEDY = Decoding("greedy")


class Evaluator:
    """Decodes with one model.

    Args:
        max_new_tokens: positions of a completion, latents included.
        seed: a trajectory's own seed is made of it, the prompt's `row_id` and the index in the
            group.
        max_batch_rows, treatment: see `HFRolloutEngine`.
    """

    def __init__(
        self,
        loaded: LatentModel,
        max_new_tokens: int,
        seed: int = 0,
        max_batch_rows: int = 512,
        treatment: Treatment | None = None,
    ):
        self.loaded = loaded
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.max_batch_rows = max_batch_rows
        self.treatment = treatment
        # by what decodings change of the latents; sampling settings are a call's
        self._engines: dict[tuple, HFRolloutEngine] = {}
        self.adapter = self.engine(GREEDY).adapter

    def engine(self, decoding: Decoding) -> HFRolloutEngine:
        """Makes the engine of a decoding, once; engines share the model.

        Raises:
            ConfigError, CheckpointError: latent settings that this checkpoint cannot run.
        """
        if decoding.latent not in self._engines:
            mechanism = self.loaded.mechanism.replace(**dict(decoding.latent))
            self._engines[decoding.latent] = HFRolloutEngine(
                self.loaded.model,
                mechanism,
                self.loaded.eos_ids,
                max_batch_rows=self.max_batch_rows,
                treatment=self.treatment,
            )
        return self._engines[decoding.latent]

    def generate(
        self,
        prompts: Sequence[EvalPrompt],
        decoding: Decoding = GREEDY,
        changes: Sequence[dict | None] | None = None,
    ) -> list[list[Trajectory]]:
        """Decodes each prompt's trajectories.

        Args:
            changes: fields of each prompt's `RolloutRequest` that differ, as an ablation makes
                them; None where none does.
        """
        requests = []
        for prompt, change in zip(prompts, changes or [None] * len(prompts), strict=True):
            # of the row, not of its place: batches and `max_rows` change no draw
            seeds = [
                trajectory_seed(self.seed, 0, prompt.row_id, j)
                for j in range(max(decoding.num_sampled, 1))
            ]
            requests.append(
                RolloutRequest(
                    prompt.prompt_ids,
                    seeds,
                    prompt.images,
                    group_id=prompt.where,
                    **(change or {}),
                )
            )
        return self.engine(decoding).generate(requests, decoding.params(self.max_new_tokens))

    def greedy(self, prompts: Sequence[EvalPrompt], changes=None) -> list[Trajectory]:
        return [group[0] for group in self.generate(prompts, GREEDY, changes)]

    @contextmanager
    def encoded_once(self, prompts: Sequence[EvalPrompt]) -> Iterator[list[Tensor | None]]:
        """Encodes all images in one call, and gives each prompt's merged embeddings [M, H].

        Within the block no image is encoded again, or read.

        All are encoded in one call at the beginning, so that they do not depend on what the block
        does.
        """
        with held(prompt.images for prompt in prompts), encoding_once(self.adapter.backbone):
            yield self._visual(prompts)

    @torch.no_grad()
    def _visual(self, prompts: Sequence[EvalPrompt]) -> list[Tensor | None]:
        images = ImageInputs.concat([prompt.images for prompt in prompts])
        if images is None:
            return [None] * len(prompts)
        visual_MH = self.adapter.encode_images(images.to(self.adapter.device))
        image_token_id = self.adapter.image_token_id
        assert image_token_id is not None, "`check_prompt` refuses images of a text model"
        counts = [int(p.prompt_ids.eq(image_token_id).sum()) for p in prompts]
        # a prompt without images has a split of zero rows, which is no embedding of it
        return [
            None if prompt.images is None else own_MH
            for prompt, own_MH in zip(prompts, visual_MH.float().split(counts), strict=True)
        ]


def with_partners_images(prompts: Sequence[EvalPrompt]) -> list[EvalPrompt | None]:
    """Gives prompts the images of their `image_partners`; None where there is none."""
    partners = image_partners(prompts)
    return [
        replace(prompt, images=prompts[partners[i]].images) if i in partners else None
        for i, prompt in enumerate(prompts)
    ]
