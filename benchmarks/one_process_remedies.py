"""The one-process loop with one remedy against collapse, each to be measured alone.

    dynamic_sampling   groups without signal are replaced by those of further rows (DAPO, 2503.14476)
    deviation_floor    a group's advantages are divided by at least FLOOR
    entropy_target     the entropy's coefficient follows what holds the entropy of the first step
    spikes_skipped     no update where the gradient's norm is FACTOR times its running median
    spikes_damped      there the gradient is scaled to the median
    latents_damped     of the gradient through recomputed latents, SHARE is left

What a config says needs no remedy here: rates, betas, KL, a constant entropy bonus, treatments. Of
one update a rollout the ratio is 1, and GSPO (2507.18071) has the gradient of
`actor.loss_agg_mode=seq-mean-token-mean`. Credit for parts of the form is form_reward.py's.

Legend: B trajectories, G of a group, M latents, H hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from one_process import OneProcess, StepLog
from one_process_forward import Forward
from torch import Tensor

from grpo_latent.algo.advantages import group_advantages
from grpo_latent.errors import ConfigError
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.sequences import LatentSequences

FLOOR = 0.5  # of rewards between 0 and 1.1: one failure in a group of eight has 0.39
ENTROPY_RATE = 0.5  # coefficient a step and nat
FACTOR = 2.0
WINDOW = 20  # steps
FIRST = 3  # steps before a median is one
SHARE = 0.25


def has_signal(rewards_G: Tensor) -> bool:
    """Whether any advantage of the group differs from 0."""
    return bool((rewards_G != rewards_G[0]).any())


def floored_advantages(rewards_B: Tensor, group_ids: list[str], floor: float = FLOOR) -> Tensor:
    """A_i = (r_i - mean) / max(std, floor), std with ddof 1.

    >>> floored_advantages(torch.tensor([1.0, 0.0]), ["a", "a"], floor=1.0)
    tensor([ 0.5000, -0.5000])
    """
    centred_B = group_advantages(rewards_B, group_ids, "dr_grpo")
    advantages_B = torch.empty_like(centred_B)
    for group_id in dict.fromkeys(group_ids):
        is_own_B = torch.tensor([other == group_id for other in group_ids])
        deviation = rewards_B[is_own_B].std().clamp(min=floor)
        advantages_B[is_own_B] = centred_B[is_own_B] / deviation
    return advantages_B


class EntropyTarget(OneProcess):
    """Adds `ENTROPY_RATE` · (entropy of the first step - entropy) to the coefficient each step.

    Above the target the coefficient falls, below 0 too: the loss then lowers the entropy.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.target: float | None = None

    def step(self, step: int, rows: Iterator[EvalPrompt], scorer: RewardScorer) -> StepLog:
        log = super().step(step, rows, scorer)
        if self.target is None:
            self.target = log.entropy
        self.entropy_coeff += ENTROPY_RATE * (self.target - log.entropy)
        return log


class RunningMedian:
    """Of the norms of the last `WINDOW` steps that had a gradient, skipped ones among them.

    >>> norms = RunningMedian()
    >>> [norms.excess(norm) for norm in (1.0, 9.0, 2.0, 3.0, 8.0)]
    [None, None, None, None, 2.5]
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def excess(self, norm: float) -> float | None:
        """The median before this step, where `norm` is above `FACTOR` times it."""
        before = list(self.recent)
        if norm > 0:
            self.recent.append(norm)
        if len(before) < FIRST or norm <= FACTOR * median(before):
            return None
        return median(before)


class SpikesSkipped(OneProcess):
    """Leaves an update out whose gradient norm, before clipping, is a spike."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norms = RunningMedian()

    def update(self, norm: Tensor) -> None:
        if self.norms.excess(float(norm)) is None:
            super().update(norm)


class SpikesDamped(OneProcess):
    """Scales the gradient of a spike to the running median."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norms = RunningMedian()

    def update(self, norm: Tensor) -> None:
        usual = self.norms.excess(float(norm))
        if usual is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, usual)
        super().update(norm)


def with_share(latents_MH: Tensor, share: float) -> Tensor:
    """The same values, with `share` of their gradient."""
    return latents_MH.detach() + share * (latents_MH - latents_MH.detach())


class LatentsDamped(OneProcess):
    """Leaves `SHARE` of the gradient that flows through latents; for treatment `recompute`.

    Raises:
        ConfigError: the treatment lets no gradient through latents.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.treatment.gradient not in ("one_hop", "bptt"):
            raise ConfigError(
                "there is no gradient through latents to damp",
                where="latent.treatment",
                got=f"{self.treatment.name}, gradient {self.treatment.gradient}",
                expected="recompute with gradient one_hop or bptt",
                fix="Add latent.treatment.name=recompute latent.treatment.recompute.gradient=bptt.",
            )

    def _forward(
        self, adapter: ModelAdapter, sequences: LatentSequences, recorded_MH: Tensor
    ) -> Forward:
        if sequences.latents_NH.requires_grad:
            sequences = sequences.with_latents(with_share(sequences.latents_NH, SHARE))
        return super()._forward(adapter, sequences, recorded_MH)


REMEDIES: dict[str, Callable[[DictConfig, LatentModel], OneProcess]] = {
    "dynamic_sampling": partial(OneProcess, keeps=has_signal),
    "deviation_floor": partial(OneProcess, advantages=floored_advantages),
    "entropy_target": EntropyTarget,
    "spikes_skipped": SpikesSkipped,
    "spikes_damped": SpikesDamped,
    "latents_damped": LatentsDamped,
}
