"""`latent/usage_gap/*` during training, by the rollout server's engine, and the alarm when latents vanish or go unused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray

from grpo_latent.errors import ConfigError
from grpo_latent.eval.statistics import NOT_USED
from grpo_latent.eval.usage import Usage, UsageSettings
from grpo_latent.verl_plugin.rewards.manager import reward_settings
from grpo_latent.verl_plugin.rollout.usage_probe import UsageRequest

REFERENCE_FILE = "usage_start.safetensors"


def as_metrics(usage: Usage) -> dict[str, float]:
    """`latent/drift_*`, `latent/alignment_*`, and under `latent/usage_` what else is of the fixed set: `gap/<ablation>`,
    `own_accuracy`, norms, effective rank; the batch that trained has such names without `usage_`."""
    own = ("drift_", "alignment_")
    return {
        f"latent/{name}" if name.startswith(own) else f"latent/usage_{name}": value
        for name, value in usage.metrics.items()
    }


@dataclass(frozen=True)
class AlarmSettings:
    """When training says that its latents are lost.

    Attributes:
        min_frac_rollouts: below this share of trajectories with latents they have vanished.
        patience: training steps in a row below it, or measurements in a row with the verdict "not used".
        stop: end the training then, with a checkpoint.
    """

    min_frac_rollouts: float = 0.05
    patience: int = 2
    stop: bool = False

    def __post_init__(self):
        if not 0 <= self.min_frac_rollouts <= 1:
            got = self.min_frac_rollouts
            raise ConfigError("not a share", where="latent.alarm.min_frac_rollouts", got=got, expected="in [0, 1]")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError("not a count", where="latent.alarm.patience", got=self.patience, expected="int >= 1")


class LatentWatch:
    """The trainer's end: asks a server to measure, and sounds the alarm. Each kind sounds once until it gets better."""

    def __init__(self, config, options):
        self.settings = settings_from(UsageSettings, options.usage, "latent.usage")
        self.alarm = settings_from(AlarmSettings, options.alarm, "latent.alarm")
        self.config, self.folder = config, Path(options.output_dir or config.trainer.default_local_dir)
        self._request: UsageRequest | None = None
        self._bad = {"vanished": 0, "unused": 0}

    def measure(
        self, holding: AbstractContextManager, rows: Iterable[dict], is_start: bool
    ) -> tuple[dict[str, float], str | None]:
        """Metrics of the weights that a server holds, and the alarm line if there is one.

        Args:
            holding: gives the server; not entered where nothing is to be measured.
            rows: of the validation data, the first of which are the fixed set.
        """
        if not self.settings.num_prompts:
            return {}, None
        if self._request is None:
            self._request = self._make_request(rows)
        with holding as server:
            usage: Usage = ray.get(server.measure_usage.remote(self._request, is_start))
        line = self._count("unused", usage.verdict == NOT_USED, f"latents are {usage.sentence}")
        return as_metrics(usage), line

    def _make_request(self, rows: Iterable[dict]) -> UsageRequest:
        fixed = [(row, f"data.val_files row {i}") for i, row in enumerate(islice(rows, self.settings.num_prompts))]
        return UsageRequest(
            self.settings,
            ray.put(fixed),
            self.config.data.max_response_length,
            reward_settings(self.config),
            str(self.folder / REFERENCE_FILE),
        )

    def after_step(self, metrics: dict[str, float]) -> str | None:
        """Adds `latent/alarm_*` to the metrics of a training step; the alarm line if there is one."""
        share = metrics["latent/frac_rollouts"]
        text = f"latents vanish: {share:.1%} of the trajectories have any"
        line = self._count("vanished", share < self.alarm.min_frac_rollouts, text)
        metrics |= {f"latent/alarm_{kind}": float(self._sounds(kind)) for kind in self._bad}
        return line

    @property
    def should_stop(self) -> bool:
        return self.alarm.stop and any(self._sounds(kind) for kind in self._bad)

    def _sounds(self, kind: str) -> bool:
        return self._bad[kind] >= self.alarm.patience

    def _count(self, kind: str, is_bad: bool, text: str) -> str | None:
        self._bad[kind] = self._bad[kind] + 1 if is_bad else 0
        return text if self._bad[kind] == self.alarm.patience else None


def settings_from(kind: type, values: Mapping[str, Any], where: str):
    """A settings dataclass out of a config group.

    Raises:
        ConfigError: an unknown key.
    """
    known = kind.__dataclass_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError("unknown key", where=where, got=unknown, expected=f"some of {sorted(known)}")
    return kind(**{name: tuple(value) if name == "ablations" else value for name, value in values.items()})
