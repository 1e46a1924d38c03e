"""Latent checkpoints that vLLM's CPU kernels take, and mixed requests for them.

vLLM has no output bias and wants heads of 32: `latent_cases` with other sizes, and rows of the
output matrix scaled instead of a bias, so that spans are frequent and ends rare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from latent_cases import SAMPLED, WORDS, Case

from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments import Treatment
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import save_latent_model
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.trajectory import PositionKind, Trajectory

MAX_MODEL_LEN = 128
DRAWN = (*SAMPLED, "5", "9", "read", "blue")  # the tokens that both engines may draw


@dataclass(frozen=True)
class VllmCase:
    """A checkpoint on disk, the Hugging Face model that it holds, and engine hf on that model."""

    case: Case
    mechanism: Mechanism
    folder: Path

    @property
    def banned_ids(self) -> set[int]:
        drawn = {self.case.token_id(token) for token in DRAWN} | self.mechanism.closing_ids
        return set(range(len(self.case.tokenizer))) - drawn

    def hf_engine(self, treatment: Treatment | None = None) -> HFRolloutEngine:
        return HFRolloutEngine(
            self.case.model,
            self.mechanism,
            [self.case.eos_id],
            self.banned_ids,
            treatment=treatment,
        )

    def vllm_engine(self, **options):
        from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

        defaults = {
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 64,
            "enforce_eager": True,
            "max_latents": 128,
        }
        return VllmRolloutEngine(self.folder, banned_ids=self.banned_ids, **(defaults | options))

    def requests(
        self, num_requests: int, num_trajectories: int = 1, first: int = 0
    ) -> list[RolloutRequest]:
        """Makes prompts of 4 to 65 positions, every other one with images (VL models).

        One or two images; steps None, 1, 2 or 5.
        """
        requests = []
        for idx in range(first, first + num_requests):
            rng = np.random.default_rng(idx)
            text = " ".join(rng.choice([*WORDS, *tiny.NUMBERS], size=int(rng.integers(2, 45))))
            has_images = self.case.processor is not None and idx % 2 == 0
            images = self.case.images(1 + idx % 4 // 2, seed=idx) if has_images else None
            seeds = range(100 * idx, 100 * idx + num_trajectories)
            steps = (None, 1, 2, 5)[idx % 4]
            requests.append(self.case.request(text, images, seeds, group_id=str(idx), steps=steps))
        return requests


# seed, and scale of `start`'s output row, at which greedy completions hold text, spans and ends
_RECIPES = {
    "qwen2_5_vl": (1, 1.6),
    "qwen2_vl": (3, 1.6),
    "qwen3_vl": (1, 1.6),
    "qwen2": (2, 1.6),
    "qwen3": (1, 2.4),
}


def build_vllm_case(
    name: str, folder: Path, head: str = "none", seed: int | None = None, **changes
) -> VllmCase:
    """A checkpoint in `folder`; another `seed` gives other weights of the same shapes."""
    own_seed, start_scale = _RECIPES[name]
    seed = own_seed if seed is None else seed
    model, tokenizer, processor = getattr(tiny, f"tiny_{name}")(
        WORDS, tiny.TinySizes(hidden=64), seed
    )
    case = Case(name, model, tokenizer, processor, ModelAdapter(model))
    mechanism = case.mechanism(head=head, **changes)
    scales = {"lm_head": 8.0, "embed_tokens": 40.0}
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = next(
                    (scale for part, scale in scales.items() if part in parameter_name), 6.0
                )
                parameter.mul_(scale)
        model.lm_head.weight[tokenizer.get_vocab()["<|lvr_start|>"]] *= start_scale
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.1
        model.lm_head.weight[sorted(mechanism.closing_ids)] *= 1.6
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mechanism.attach(model)
            if mechanism.exit == "latent_end":
                model.lvr_latent_end_emb.zero_()
    save_latent_model(folder, model, tokenizer, processor, mechanism)
    return VllmCase(replace(case, adapter=ModelAdapter(model, mechanism)), mechanism, folder)


@dataclass(frozen=True)
class Comparison:
    """Largest gaps between two engines' trajectories.

    `different` names those whose tokens or kinds differ.
    """

    different: list[str]
    latent_gap: float
    log_prob_gap: float
    num_latents: int
    num_spans: int
    stop_reasons: set[str]


def compare(ours: list[list[Trajectory]], reference: list[list[Trajectory]]) -> Comparison:
    different, latent_gap, log_prob_gap = [], 0.0, 0.0
    flat = [t for group in ours for t in group]
    for a, b in zip(flat, [t for group in reference for t in group], strict=True):
        assert (a.group_id, a.seed, a.policy_version) == (b.group_id, b.seed, b.policy_version)
        same = torch.equal(a.token_ids, b.token_ids) and torch.equal(a.kinds, b.kinds)
        if not (
            same and a.stop_reason == b.stop_reason and torch.equal(a.prompt_ids, b.prompt_ids)
        ):
            different.append(f"{a.group_id}: {a.token_ids.tolist()} {b.token_ids.tolist()}")
            continue
        for name in ("latents", "latent_aux"):
            ours_NX, theirs_NX = getattr(a, name), getattr(b, name)
            assert ours_NX.shape == theirs_NX.shape
            if ours_NX.numel():
                latent_gap = max(latent_gap, float((ours_NX - theirs_NX).abs().max()))
        for name in ("rollout_log_probs", "sampling_log_probs"):
            log_prob_gap = max(
                log_prob_gap, float((getattr(a, name) - getattr(b, name)).abs().max())
            )
    return Comparison(
        different,
        latent_gap,
        log_prob_gap,
        sum(len(t.latents) for t in flat),
        sum(len(t.spans) for t in flat),
        {t.stop_reason for t in flat},
    )


def replay_gap(
    case: Case, requests: list[RolloutRequest], groups: list[list[Trajectory]], temperature: float
) -> tuple[float, float]:
    """Largest gaps of log-probs and latents between trajectories and one forward over each.

    At text and starts.
    """
    log_prob_gap = latent_gap = 0.0
    for request, group in zip(requests, groups, strict=True):
        for trajectory in group:
            batch = collate([trajectory], [request.images], case.adapter, "full")
            with torch.no_grad():
                log_probs_BT, hidden_BTH = replay(
                    case.adapter, batch, temperature=temperature or 1.0
                )
            start = len(trajectory.prompt_ids)
            acted = trajectory.response_mask()
            gap = (log_probs_BT[0, start:] - trajectory.rollout_log_probs)[acted].abs()
            log_prob_gap = max(log_prob_gap, float(gap.max()) if len(gap) else 0.0)
            is_latent = (batch.kinds_BT[0] == PositionKind.LATENT).nonzero()[:, 0]
            if len(is_latent) and not hasattr(case.model, "lvr_head"):
                gap = (hidden_BTH[0, is_latent - 1] - trajectory.latents).abs()
                latent_gap = max(latent_gap, float(gap.max()))
    return log_prob_gap, latent_gap


def sampling(max_new_tokens: int = 40, **kwargs) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **{"temperature": 0.0} | kwargs)
