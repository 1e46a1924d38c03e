"""Usage measured during training, and the alarm when latents vanish or go unused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import ray

from grpo_latent.common.files import write_json
from grpo_latent.common.settings import build
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.eval.statistics import NOT_USED
from grpo_latent.eval.usage import Usage, UsageSettings
from grpo_latent.verl_plugin.rewards.manager import hand_judge, judge_tokenizer, reward_settings
from grpo_latent.verl_plugin.rollout.usage_probe import UsageRequest

REFERENCE_FILE = "usage_start.safetensors"
STATE_FILE = "latent_watch.json"  # in a checkpoint


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


@dataclass(frozen=True)
class AlarmSettings:
    """When training says that its latents are lost.

    Attributes:
        min_frac_rollouts: below this share of trajectories with latents they have vanished.
        patience: training steps in a row below it, or measurements in a row with the verdict "not
            used".
        stop: end the training then, with a checkpoint.
    """

    min_frac_rollouts: float = 0.05
    patience: int = 2
    stop: bool = False

    def __post_init__(self):
        if not 0 <= self.min_frac_rollouts <= 1:
            got = self.min_frac_rollouts
            raise ConfigError(
                "not a share",
                where="latent.alarm.min_frac_rollouts",
                got=got,
                expected="in [0, 1]",
            )
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(
                "not a count",
                where="latent.alarm.patience",
                got=self.patience,
                expected="int >= 1",
            )


class LatentWatch:
    """The trainer's end: asks a server to measure, and sounds the alarm.

    Each kind sounds once until it gets better.
    """

    def __init__(self, config, options):
        self.settings = build(UsageSettings, options.usage, "latent.usage")
        self.alarm = build(AlarmSettings, options.alarm, "latent.alarm")
        self.config = config
        self.folder = Path(options.output_dir or config.trainer.default_local_dir)
        self._request: UsageRequest | None = None
        self._bad = {"vanished": 0, "unused": 0}
        self._saved: Path | None = None  # of the step that is not yet counted

    def measure(
        self,
        holding: AbstractContextManager,
        rows: Iterable[dict],
        is_start: bool,
        router_address: str | None = None,
    ) -> tuple[dict[str, float], str | None]:
        """Metrics of the weights that a server holds, and the alarm line if there is one.

        Args:
            holding: gives the server; not entered where nothing is to be measured.
            rows: of the validation data, the first of which are the fixed set.
            router_address: of verl's reward model, which judges in the reward functions; None
                without one.
        """
        if not self.settings.num_prompts:
            return {}, None
        if self._request is None:
            self._request = self._make_request(rows, router_address)
        with holding as server:
            usage: Usage = ray.get(server.measure_usage.remote(self._request, is_start))
        line = self._count("unused", usage.verdict == NOT_USED, f"latents are {usage.sentence}")
        return as_metrics(usage), line

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

    def after_step(self, metrics: dict[str, float]) -> str | None:
        """Adds `latent/alarm_*` to a training step's metrics; gives the alarm line or None."""
        share = metrics["latent/frac_rollouts"]
        text = f"latents vanish: {share:.1%} of the trajectories have any"
        line = self._count("vanished", share < self.alarm.min_frac_rollouts, text)
        metrics |= {f"latent/alarm_{kind}": float(self._sounds(kind)) for kind in self._bad}
        self.complete_save()
        return line

    def save(self, checkpoint: Path) -> None:
        """Writes the counters into a checkpoint.

        verl saves a step before it validates and logs it, so they are written now, and anew by
        `complete_save`.
        """
        self._write(checkpoint, is_counted=False)
        self._saved = checkpoint

    def complete_save(self) -> None:
        """Writes the counters of the last save anew, its step counted; nothing without one."""
        if self._saved is not None:
            self._write(self._saved, is_counted=True)
            self._saved = None

    def _write(self, checkpoint: Path, is_counted: bool) -> None:
        write_json(
            checkpoint / STATE_FILE, {"bad_in_a_row": self._bad, "is_step_counted": is_counted}
        )

    def load(self, checkpoint: Path) -> list[str]:
        """Reads the counters of a checkpoint; what the user should know of them.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path = checkpoint / STATE_FILE
        if not path.is_file():  # of a release before the counters were saved
            return [f"{checkpoint} has no {STATE_FILE}: the alarm counts from zero"]
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            bad, is_counted = values["bad_in_a_row"], values["is_step_counted"]
            if set(bad) != set(self._bad) or not all(
                type(n) is int and n >= 0 for n in bad.values()
            ):
                raise ValueError(f"counters {bad}")
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                "not the alarm's counters",
                where=str(path),
                got=f"{type(error).__name__}: {error}",
                expected=f"a count for each of {sorted(self._bad)}",
                fix="Delete the file: the alarm then counts from zero.",
            ) from error
        self._bad = dict(bad)
        notes = (
            [] if is_counted else [f"{path}: the run ended before it had counted its last step"]
        )
        if self.should_stop:
            notes.append(
                "the alarm still sounds, so training stops after a step; "
                "latent.alarm.stop=false lets it go on"
            )
        return notes

    @property
    def should_stop(self) -> bool:
        return self.alarm.stop and any(self._sounds(kind) for kind in self._bad)

    def _sounds(self, kind: str) -> bool:
        return self._bad[kind] >= self.alarm.patience

    def _count(self, kind: str, is_bad: bool, text: str) -> str | None:
        self._bad[kind] = self._bad[kind] + 1 if is_bad else 0
        return text if self._bad[kind] == self.alarm.patience else None
