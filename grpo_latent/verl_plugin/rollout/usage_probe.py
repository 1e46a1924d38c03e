"""The rollout server's end of measuring usage: a probe over the model that the server holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from grpo_latent.eval.pixels import PixelStore
from grpo_latent.eval.prompts import encode_row
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.eval.usage import Usage, UsageProbe, UsageSettings
from grpo_latent.latent.treatments import Treatment
from grpo_latent.models.loading import LatentModel
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardRunner


@dataclass(frozen=True)
class UsageRequest:
    """What a rollout server needs to know to measure.

    Attributes:
        rows: reference of the fixed set, as (row, where).
        reward: of `rewards.manager.reward_settings`, with what judges need.
        reference: file with the latents of the start.
    """

    settings: UsageSettings
    rows: ray.ObjectRef
    max_new_tokens: int
    reward: dict[str, Any]
    reference: str


class ServerUsage:
    """The server's end: makes the probe when it is first asked."""

    def __init__(
        self, loaded: LatentModel, max_batch_rows: int, treatment: Treatment | None = None
    ):
        self.loaded = loaded
        self.max_batch_rows = max_batch_rows
        self.treatment = treatment
        self._probe: UsageProbe | None = None

    def measure(self, request: UsageRequest, is_start: bool) -> Usage:
        if self._probe is None:
            settings = dict(request.reward)
            runner = RewardRunner(specs_from_config(settings.pop("functions")), **settings)
            store = PixelStore()
            rows = enumerate(ray.get(request.rows))
            self._probe = UsageProbe(
                self.loaded,
                [encode_row(row, where, self.loaded, str(i), store) for i, (row, where) in rows],
                RewardScorer(runner, self.loaded),
                request.settings,
                request.max_new_tokens,
                Path(request.reference),
                self.max_batch_rows,
                self.treatment,
            )
        return self._probe.measure(is_start)
