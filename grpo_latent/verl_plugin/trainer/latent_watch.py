"""Usage measured during training."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

import ray

from grpo_latent.common.settings import build
from grpo_latent.eval.usage import Usage, UsageSettings
from grpo_latent.verl_plugin.rewards.manager import hand_judge, judge_tokenizer, reward_settings
from grpo_latent.verl_plugin.rollout.usage_probe import UsageRequest

REFERENCE_FILE = "usage_start.safetensors"


def as_metrics(usage: Usage) -> dict[str, float]:
    """The measurement under the names of the log.

    `latent/drift_*`, `latent/alignment_*`, and under `latent/usage_` what else is of the fixed
    set: `gap/<ablation>`, `own_accuracy`, norms, effective rank; the batch that trained has such
    names without `usage_`.
    """
    own = ("drift_", "alignment_")
    return {
        f"latent/{name}" if name.startswith(own) else f"latent/usage_{name}": value
        for name, value in usage.metrics.items()
    }


class LatentWatch:
    """The trainer's end: asks a server to measure the weights that it holds."""

    def __init__(self, config, options):
        self.settings = build(UsageSettings, options.usage, "latent.usage")
        self.config = config
        self.folder = Path(options.output_dir or config.trainer.default_local_dir)
        self._request: UsageRequest | None = None

    def measure(
        self,
        holding: AbstractContextManager,
        rows: Iterable[dict],
        is_start: bool,
        router_address: str | None = None,
    ) -> Usage | None:
        """How the weights that a server holds use latents; None where it is not measured.

        Args:
            holding: gives the server; not entered where nothing is to be measured.
            rows: of the validation data, the first of which are the fixed set.
            router_address: of verl's reward model, which judges in the reward functions; None
                without one.
        """
        if not self.settings.num_prompts:
            return None
        if self._request is None:
            self._request = self._make_request(rows, router_address)
        with holding as server:
            return ray.get(server.measure_usage.remote(self._request, is_start))

    def _make_request(self, rows: Iterable[dict], router_address: str | None) -> UsageRequest:
        reward = reward_settings(self.config)
        if router_address is not None:
            hand_judge(reward, router_address, judge_tokenizer(self.config))
        fixed = [
            (row, f"data.val_files row {i}")
            for i, row in enumerate(islice(rows, self.settings.num_prompts))
        ]
        return UsageRequest(
            self.settings,
            ray.put(fixed),
            self.config.data.max_response_length,
            reward,
            str(self.folder / REFERENCE_FILE),
        )
