"""What guards a run beside its steps: alarms, the way back, the best checkpoint.

    step ▸ saved ▸ validated ▸ judged ─┬─ an alarm of `rollback_on`: back to a good checkpoint
                                       ├─ the best held-out score so far: kept
                                       └─ an alarm of `stop_on`: the end
         ▸ state written into the step's checkpoint, if it has one, before that is committed

Numbers and files; what loads, scales and saves is the trainer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo_latent.common.best_checkpoint import STATE_FILE, Best, write_best
from grpo_latent.common.files import write_json
from grpo_latent.common.settings import build
from grpo_latent.common.step_folders import STEP_PREFIX, step_of
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.alarm_kinds import is_like
from grpo_latent.verl_plugin.trainer.alarm_settings import AlarmSettings
from grpo_latent.verl_plugin.trainer.alarms import Alarms, Line

ROLLBACK = "rollback"  # kind of a line
RESTORED = ("model", "optimizer", "extra")  # verl's names of what a rollback loads


class Guards:
    """The state of all three, in each checkpoint, so that a resumed run is guarded alike.

    Attributes:
        best: by held-out score; None without a validation, or where none is kept.
        rollbacks: how many so far.
        lr_factor: what they have made of the learning rate, 1 before the first.
        good_steps: of checkpoints that a rollback may go back to, ascending. They are this run's
            own: a branch that it has left behind has folders too.
        extras: steps with a checkpoint for the sake of its score only.
    """

    def __init__(self, options: LatentOptions, trainer: DictConfig):
        self.settings = build(AlarmSettings, options.alarm, "latent.alarm")
        self.root = Path(trainer.default_local_dir)
        self.keeps_best = options.keep_best and trainer.save_freq > 0 and not trainer.val_only
        self.alarms = Alarms(self.settings)
        self.best: Best | None = None
        self.rollbacks = 0
        self.lr_factor = 1.0
        self.good_steps: list[int] = []
        self.extras: list[int] = []
        self.has_given_up = False
        self._resumed: Path | None = None

    # ---- alarms ---------------------------------------------------------------------------------

    def after_step(self, metrics: dict[str, Any]) -> list[Line]:
        """Lines of a training step; adds the alarms' metrics to its own."""
        lines = self.alarms.after_step(metrics)
        if self.settings.rollback:
            metrics["latent/rollbacks"] = float(self.rollbacks)
            metrics["latent/lr_factor"] = self.lr_factor
        return lines

    @property
    def should_stop(self) -> bool:
        """Whether training ends after this step."""
        sounds = self.settings.stop and self.alarms.sounding(self.settings.stop_on)
        return bool(sounds) or self.has_given_up or self._is_exhausted

    @property
    def _is_exhausted(self) -> bool:
        return self.settings.rollback and self.rollbacks > self.settings.max_rollbacks

    # ---- the way back ---------------------------------------------------------------------------

    def reasons_to_go_back(self, is_last: bool = False) -> list[str]:
        """Kinds of alarms for which this step ends with a rollback; empty for none.

        Args:
            is_last: of the run, which does not end where it would not go back to if it has been
                at a better place: on the way down no alarm need sound yet.
        """
        if not self.settings.rollback:
            return []
        kinds = self.alarms.sounding(self.settings.rollback_on)
        if not kinds and is_last and self.last_good is not None:
            kinds = self.alarms.doubts
        return kinds

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint to go back to, None without any."""
        folders = (self._folder(step) for step in reversed(self.good_steps))
        return next((folder for folder in folders if folder.is_dir()), None)

    def _folder(self, step: int) -> Path:
        if self._resumed is not None and step_of(self._resumed) == step:
            return self._resumed  # it may lie elsewhere
        return self._own_folder(step)

    def _own_folder(self, step: int) -> Path:
        return self.root / f"{STEP_PREFIX}{step}"

    def go_back(self, folder: Path) -> float:
        """Takes the alarms' state of a good checkpoint; what is counted over the run goes on.

        Returns:
            what the learning rates of that checkpoint are to be multiplied by.

        Raises:
            CheckpointError: its state cannot be read.
        """
        values, num_silent = self._read(folder), self.alarms.silent.memory["steps"]
        self._restore_alarms(values, folder)
        self.alarms.silent.memory["steps"] = num_silent
        self.rollbacks += 1
        self.lr_factor *= self.settings.rollback_lr_factor
        return self.lr_factor / values["lr_factor"]

    def rollback_line(self, step: int, kinds: list[str]) -> Line:
        """Says what a rollback to `step` has done."""
        text = (
            f"back to step {step} after {', '.join(kinds)}; learning rate x {self.lr_factor:g} of "
            f"the configured from here on; rollback {self.rollbacks} of "
            f"{self.settings.max_rollbacks} (latent.alarm.max_rollbacks)"
        )
        end = ", one more than allowed: training ends here" if self._is_exhausted else ""
        return Line(ROLLBACK, text + end)

    def give_up(self) -> Line:
        """Ends training where there is nothing to go back to."""
        self.has_given_up = True
        return Line(
            ROLLBACK,
            f"no good checkpoint in {self.root} to go back to: training ends here. What helps: "
            "a smaller trainer.save_freq, or latent.alarm.rollback=true from a run's start",
        )

    # ---- the best checkpoint --------------------------------------------------------------------

    def is_best(self, score: float | None) -> bool:
        """Whether a held-out score is to be kept: better than all before."""
        if not self.keeps_best or score is None or not math.isfinite(score):
            return False
        return self.best is None or score > self.best.score

    def keep(self, best: Best, is_extra: bool = False) -> None:
        """Takes a checkpoint for the best one; `name_best` says so outside.

        Args:
            is_extra: it is there for its score only, and goes when a better one comes.
        """
        self.best = best
        if is_extra:
            self.extras.append(best.step)

    def name_best(self) -> None:
        """Names the best checkpoint, which is on disk, in a file beside the tracker."""
        if self.keeps_best:
            write_best(self.root, self.best)

    @property
    def pinned(self) -> set[int]:
        """Steps whose checkpoints are not pruned."""
        last_good = self.last_good if self.settings.rollback else None
        steps = [
            None if self.best is None else self.best.step,
            None if last_good is None else step_of(last_good),
        ]
        return {step for step in steps if step is not None}

    def remove_superseded(self, newest: int) -> None:
        """Removes checkpoints that were there for their score, which is no longer the best."""
        for step in self.extras:
            if step not in {newest, *self.pinned}:
                # a resumed run does this again, and may find it done
                shutil.rmtree(self._own_folder(step), ignore_errors=True)
        self.extras = [step for step in self.extras if self._own_folder(step).is_dir()]

    # ---- state ----------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Writes the state into a checkpoint, whose step is judged and logged."""
        step = step_of(checkpoint)
        assert step is not None, "checkpoints are named after steps"
        if not self.alarms.doubts:
            there = [good for good in self.good_steps if self._folder(good).is_dir()]
            self.good_steps = [*there, step]
        values = {
            "alarms": self.alarms.state(),
            "rollbacks": self.rollbacks,
            "lr_factor": self.lr_factor,
            "best": None if self.best is None else self.best.as_json(),
            "good_steps": self.good_steps,
            "extras": [step for step in self.extras if self._own_folder(step).is_dir()],
        }
        write_json(checkpoint / STATE_FILE, values)

    def begin(self) -> None:
        """Forgets what an earlier run has named in the same folder."""
        self.name_best()

    def load(self, checkpoint: Path) -> list[str]:
        """Takes the state of a checkpoint that a run resumes from; what the user should know.

        Raises:
            CheckpointError: the file cannot be read.
        """
        step = step_of(checkpoint)
        assert step is not None, "a run resumes from a step's checkpoint"
        self._resumed = checkpoint
        if step == 0:  # it is validated and measured anew
            self.good_steps = [0]
            return []
        path = checkpoint / STATE_FILE
        if not path.is_file():  # of a release before the guards
            self.good_steps = [step]
            return [f"{checkpoint} has no {STATE_FILE}: the alarms count from zero"]
        values = self._read(checkpoint)
        self._restore_alarms(values, checkpoint)
        self.rollbacks, self.lr_factor = values["rollbacks"], values["lr_factor"]
        self.good_steps, self.extras = list(values["good_steps"]), list(values["extras"])
        notes = self._restore_best(values["best"])
        if self.should_stop:
            lets_go_on = "max_rollbacks=<more>" if self._is_exhausted else "stop=false"
            notes.append(
                "the alarm still sounds, so training stops after a step; "
                f"latent.alarm.{lets_go_on} lets it go on"
            )
        return notes

    def _restore_best(self, values: Mapping[str, Any] | None) -> list[str]:
        if not self.keeps_best:
            return []
        self.best = None if values is None else Best.from_json(values)
        notes = []
        best = self.best
        if best is not None and best.step and not self._own_folder(best.step).is_dir():
            notes = [f"the best checkpoint, {best.folder}, is gone: it is sought anew"]
            self.best = None
        self.name_best()
        return notes

    def _restore_alarms(self, values: Mapping[str, Any], checkpoint: Path) -> None:
        try:
            self.alarms.restore(values["alarms"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise unreadable(checkpoint, error) from error

    def _read(self, checkpoint: Path) -> dict[str, Any]:
        fresh = {
            "rollbacks": 0,
            "lr_factor": 1.0,
            "good_steps": [],
            "extras": [],
        }
        try:
            values = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            values.pop("is_step_counted", None)  # of a release that saved before it judged
            if values.keys() != {*fresh, "alarms", "best"}:
                raise ValueError(f"keys {sorted(values)}")
            wrong = [name for name in fresh if not is_like(fresh[name], values[name])]
            if wrong or not values["lr_factor"] > 0:
                raise ValueError(f"{values} at {wrong or 'lr_factor'}")
            if values["best"] is not None:
                Best.from_json(values["best"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise unreadable(checkpoint, error) from error
        return values


def unreadable(checkpoint: Path, error: Exception) -> CheckpointError:
    """The error of a state that is none."""
    return CheckpointError(
        "not the guards' state",
        where=str(checkpoint / STATE_FILE),
        got=f"{type(error).__name__}: {error}",
        expected="what a training of this release has written",
        fix="Delete the file: the alarms then count from zero.",
    )


def check_guards(config: DictConfig, options: LatentOptions) -> None:
    """Refuses guards that could not do what they are told to.

    Raises:
        ConfigError: an unusable setting, or a rollback without whole checkpoints to go back to.
    """
    settings = build(AlarmSettings, options.alarm, "latent.alarm")
    if not settings.rollback:
        return
    if not config.trainer.save_freq > 0:
        raise ConfigError(
            "there are no checkpoints to go back to",
            where="trainer.save_freq",
            got=config.trainer.save_freq,
            expected="> 0 with latent.alarm.rollback=true",
        )
    for name in ("save_contents", "load_contents"):
        key = f"actor_rollout_ref.actor.checkpoint.{name}"
        contents = OmegaConf.select(config, key)
        missing = [part for part in RESTORED if contents is not None and part not in contents]
        if missing:
            raise ConfigError(
                "a checkpoint would not be whole",
                where=key,
                got=list(contents),
                expected=f"{', '.join(RESTORED)} with latent.alarm.rollback=true",
                fix=f"Add {', '.join(missing)}.",
            )
