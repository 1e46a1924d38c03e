"""A checkpoint on prompts: greedy and sampled accuracy, what its latents look like, and whether they are used.

prompts ──greedy──▶ own ──┬─ accuracy, latent statistics, hit, leak
   │                      └─ ablations: tables of vectors ──greedy──▶ accuracy, follow
   └──────sampled──▶ accuracy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import (
    IMAGE_SWAP,
    SHUFFLE,
    AblationInputs,
    donors,
    image_partners,
    leak,
    make_changes,
    nearest_token_hits,
    parse_name,
    with_truth_of,
)
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.adapter import ImageInputs
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.vision_cache import VisionCache
from grpo_latent.rewards.runner import RewardItem, RewardResult, RewardRunner
from grpo_latent.rewards.view import reward_view
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import Trajectory

OWN = "own"


@dataclass(frozen=True)
class EvalSettings:
    """Attributes:
    max_new_tokens: positions of a completion, latents included.
    num_sampled: trajectories a prompt for the sampled accuracy, 0 for none.
    temperature, top_k, top_p: of the sampled ones.
    ablations: names of `eval.ablations.ABLATIONS`, or `name@part`.
    leak_prompts: prompts of the leak test, 0 for none.
    prompts_per_batch: prompts decoded together, and kept encoded together.
    """

    max_new_tokens: int
    num_sampled: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    ablations: tuple[str, ...] = ("zero", "noise", "shuffle", "oracle")
    leak_prompts: int = 64
    seed: int = 0
    prompts_per_batch: int = 256

    def __post_init__(self):
        for name, minimum in (("num_sampled", 0), ("leak_prompts", 0), ("prompts_per_batch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ConfigError("not a valid count", where=name, got=value, expected=f"int >= {minimum}")
        for name in self.ablations:
            parse_name(name)
        self.sampled_params()

    def greedy_params(self) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, temperature=0.0)

    def sampled_params(self) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


class Scorer:
    """Rewards of trajectories, as training computes them."""

    def __init__(self, runner: RewardRunner, loaded: LatentModel):
        self.runner, self.eos_ids = runner, frozenset(loaded.eos_ids)
        self.decode = lambda ids: loaded.tokenizer.decode(ids, skip_special_tokens=False)

    def __call__(self, prompts: Sequence[EvalPrompt], trajectories: Sequence[Trajectory]) -> list[RewardResult]:
        items = []
        for prompt, trajectory in zip(prompts, trajectories, strict=True):
            view = reward_view(trajectory, self.decode, self.eos_ids)
            extra_info = {**prompt.extra_info, "latent": view.latent}
            items.append(
                RewardItem(prompt.data_source, view.solution_str, prompt.ground_truth, extra_info, prompt.where)
            )
        return self.runner.score_many(items)


def accuracy(results: Sequence[RewardResult]) -> float | None:
    """Mean of what the reward reports as `acc` or `accuracy`, else of its score; dropped trajectories are left out."""
    infos = [result.info() for result in results if not result.dropped]
    return fmean(float(info.get("acc", info["score"])) for info in infos) if infos else None


class Evaluator:
    """Decodes prompts with one model, greedily, sampled, or with given latents."""

    def __init__(self, loaded: LatentModel, settings: EvalSettings, max_batch_rows: int = 512):
        self.loaded, self.settings = loaded, settings
        self.engine = HFRolloutEngine(loaded.model, loaded.config, loaded.eos_ids, max_batch_rows=max_batch_rows)
        self.adapter = self.engine.adapter

    def generate(
        self, prompts: Sequence[EvalPrompt], changes: Sequence[dict | None] | None = None, num_sampled: int = 0
    ) -> list[list[Trajectory]]:
        """One greedy trajectory a prompt, or `num_sampled` sampled ones.

        Args:
            changes: fields of each prompt's `RolloutRequest` that differ, as an ablation makes them; None where none does.
        """
        settings, requests = self.settings, []
        for prompt, change in zip(prompts, changes or [None] * len(prompts), strict=True):
            seeds = [trajectory_seed(settings.seed, 0, prompt.row_id, j) for j in range(max(num_sampled, 1))]
            requests.append(
                RolloutRequest(prompt.prompt_ids, seeds, prompt.images, group_id=prompt.where, **(change or {}))
            )
        return self.engine.generate(requests, settings.sampled_params() if num_sampled else settings.greedy_params())

    def greedy(self, prompts: Sequence[EvalPrompt], changes=None) -> list[Trajectory]:
        return [group[0] for group in self.generate(prompts, changes)]

    def with_swapped_images(self, prompts: Sequence[EvalPrompt]) -> list[Trajectory | None]:
        """Greedy trajectories of the prompts with the images of their `image_partners`; None where there is none."""
        partners = image_partners(prompts)
        swapped = {i: replace(prompts[i], images=prompts[partner].images) for i, partner in partners.items()}
        decoded = dict(zip(swapped, self.greedy(list(swapped.values())), strict=True))
        return [decoded.get(i) for i in range(len(prompts))]

    @torch.no_grad()
    def visual(self, images: ImageInputs | None) -> Tensor | None:
        """Merged image embeddings [M, H] on the CPU."""
        return None if images is None else self.adapter.encode_images(images).float().cpu()

    def encoded_once(self):
        """Within the block, an image is encoded once over all passes."""
        return VisionCache.install(self.loaded.model).reuse() if self.adapter.has_vision else nullcontext()


def evaluate(
    loaded: LatentModel,
    prompts: Sequence[EvalPrompt],
    runner: RewardRunner,
    settings: EvalSettings,
    progress: Callable[[str, int], None] = lambda phase, num_prompts: None,
    max_batch_rows: int = 512,
) -> dict:
    """All results as one JSON-ready dict; see `grpo_latent.evaluate` for its keys.

    Args:
        progress: called with the phase and the number of prompts that went through it.
    """
    started = time.monotonic()
    evaluator, scorer = Evaluator(loaded, settings, max_batch_rows), Scorer(runner, loaded)
    own: list[Trajectory] = []
    sampled: list[RewardResult] = []
    visual: list[Tensor | None] = []
    for batch in _batches(prompts, settings.prompts_per_batch):
        with evaluator.encoded_once():
            own += evaluator.greedy(batch)
            visual += [evaluator.visual(prompt.images) for prompt in batch]
            if settings.num_sampled:
                for prompt, group in zip(batch, evaluator.generate(batch, None, settings.num_sampled), strict=True):
                    sampled += scorer([prompt] * len(group), group)
        progress(OWN, len(batch))
    results = scorer(prompts, own)
    report = {
        "num_prompts": len(prompts),
        "greedy": {"accuracy": accuracy(results), "score": fmean(result.score for result in results)},
        "sampled": {"accuracy": accuracy(sampled), "n": settings.num_sampled} if sampled else None,
        "latents": latent_statistics(own),
    }
    needs_swapped = any(parse_name(name)[0] == IMAGE_SWAP for name in settings.ablations)
    swapped = evaluator.with_swapped_images(prompts) if needs_swapped else [None] * len(prompts)
    inputs = AblationInputs(prompts, own, visual, loaded.config, settings.seed, swapped)
    report |= _ablate(evaluator, scorer, inputs, report["greedy"]["accuracy"], progress)
    hits = [
        hit
        for prompt, trajectory, visual_MH in zip(prompts, own, visual, strict=True)
        if visual_MH is not None
        for hit in nearest_token_hits(trajectory, prompt.roi, visual_MH)
    ]
    report["hit"] = fmean(hits) if hits else None
    if settings.leak_prompts:
        report["leak"] = leak(evaluator.adapter, prompts, own, loaded.config.visibility, settings.leak_prompts)
    return report | {"seconds": time.monotonic() - started}


def _ablate(evaluator: Evaluator, scorer: Scorer, inputs: AblationInputs, own_accuracy, progress) -> dict:
    """{"ablations": {own, …}, "num_changed", "follow"}: accuracies over all prompts, and how many an ablation changed."""
    settings, prompts = evaluator.settings, inputs.prompts
    changes = {name: make_changes(name, inputs) for name in settings.ablations}
    ablated: dict[str, list[Trajectory]] = {name: [] for name in settings.ablations}
    for start in range(0, len(prompts), settings.prompts_per_batch):
        part = slice(start, start + settings.prompts_per_batch)
        with evaluator.encoded_once():
            for name in settings.ablations:
                ablated[name] += _decode_changed(evaluator, prompts[part], inputs.own[part], changes[name][part])
                progress(name, len(prompts[part]))
    accuracies, counts = {OWN: own_accuracy}, {}
    for name, trajectories in ablated.items():
        counts[name] = sum(change is not None for change in changes[name])
        accuracies[name] = accuracy(scorer(prompts, trajectories)) if counts[name] else None
    follow = None
    if SHUFFLE in ablated:
        sources = donors([len(own.latents) for own in inputs.own], inputs.seed)
        pairs = [(i, source) for i, source in enumerate(sources) if source is not None]
        donated = with_truth_of(prompts, sources)
        if pairs:
            follow = accuracy(scorer([donated[i] for i, _ in pairs], [ablated[SHUFFLE][i] for i, _ in pairs]))
    return {"ablations": accuracies, "num_changed": counts, "follow": follow}


def _decode_changed(evaluator, prompts, own, changes) -> list[Trajectory]:
    """Ablated trajectories; a prompt without a change keeps its own."""
    changed = [i for i, change in enumerate(changes) if change is not None]
    decoded = evaluator.greedy([prompts[i] for i in changed], [changes[i] for i in changed])
    replaced = dict(zip(changed, decoded, strict=True))
    return [replaced.get(i, trajectory) for i, trajectory in enumerate(own)]


def latent_statistics(trajectories: Sequence[Trajectory]) -> dict:
    """How latents are used in form, over trajectories; `norm_mean` is per latent step, None without any."""
    steps = [len(t.latents) for t in trajectories]
    norms = [float(norm) for t in trajectories for norm in t.latents.norm(dim=-1)]
    return {
        "frac_rollouts": fmean(count > 0 for count in steps),
        "spans_mean": fmean(len(t.spans) for t in trajectories),
        "steps_mean": fmean(steps),
        "steps_max": max(steps),
        "norm_mean": fmean(norms) if norms else None,
        "length_mean": fmean(len(t.token_ids) for t in trajectories),
        "frac_stopped_by_length": fmean(t.stop_reason == "length" for t in trajectories),
    }


def _batches(prompts: Sequence[EvalPrompt], size: int) -> list[Sequence[EvalPrompt]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
