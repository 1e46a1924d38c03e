"""The curriculum of IVT-LR and Coconut: step after step of the rationale becomes a slot.

    optimizer step     0 … a      … b      … c      …
    stage              0     1        2        S       slots before what is still written out

The stage is a function of the optimizer step alone, so that a resumed run is at the stage of an
uninterrupted one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainerCallback

from grpo_latent.common.settings import check_choice
from grpo_latent.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """What a stage trains: `num_slots` slots, then the rationale from `first_step` on.

    `first_step` None leaves the whole rationale out: the answer alone.
    """

    num_slots: int
    first_step: int | None


@dataclass(frozen=True)
class CurriculumConfig:
    """What the stages minimise, and how long each lasts: the `loss` section of these methods.

    Attributes:
        gradient: through the slots' h: `cut` (IVT-LR, 2510.12603) or `bptt` (Coconut, 2412.06769).
        slots_per_step: slots that replace a step (Coconut's c).
        answers_only: whether one more stage follows, in which the steps that have no slot are left
            out too (Coconut: of rationales with more steps than the slots stand for).
        epochs_per_stage: of each stage; the last one goes on to the end of training. Or
        steps_per_stage: optimizer steps of each stage but the last; replaces `epochs_per_stage`.
        reset_optimizer: whether a new stage begins with an optimizer that has no moments, as
            published.
        save_stages: whether each stage but the last is saved when it ends, as
            `<output_dir>/stage_<s>`.
    """

    gradient: str = "cut"
    slots_per_step: int = 1
    answers_only: bool = False
    epochs_per_stage: int | None = 4
    steps_per_stage: tuple[int, ...] | None = None
    reset_optimizer: bool = True
    save_stages: bool = False
    trains_end_vector: ClassVar[bool] = False

    def __post_init__(self):
        check_choice(self.gradient, ("cut", "bptt"), "loss.gradient")
        typed = {
            "slots_per_step": (int, self.slots_per_step),
            "answers_only": (bool, self.answers_only),
        }
        for name, (kind, value) in typed.items():
            if type(value) is not kind or (kind is int and value < 1):
                expected = "true or false" if kind is bool else "int >= 1"
                raise ConfigError(
                    "not a value of this option",
                    where=f"loss.{name}",
                    got=repr(value),
                    expected=expected,
                )
        lengths = (
            (self.epochs_per_stage,) if self.steps_per_stage is None else self.steps_per_stage
        )
        if not all(isinstance(length, int) and length >= 1 for length in lengths):
            raise ConfigError(
                "stages without a length",
                where="loss.epochs_per_stage, loss.steps_per_stage",
                got=lengths,
                expected="epochs_per_stage >= 1, or a list of optimizer steps",
            )

    def stages(self, num_slots: int) -> tuple[Stage, ...]:
        """Stages 0, …, S, the last of which have all `num_slots`.

        >>> coconut = CurriculumConfig(slots_per_step=2, answers_only=True)
        >>> [(stage.num_slots, stage.first_step) for stage in coconut.stages(4)]
        [(0, 0), (2, 1), (4, 2), (4, None)]

        Raises:
            ConfigError: the slots stand for no whole number of steps.
        """
        if num_slots % self.slots_per_step:
            raise ConfigError(
                "slots for a part of a step",
                where="latent.steps, loss.slots_per_step",
                got=f"{num_slots} slots, {self.slots_per_step} a step",
                expected="a multiple",
            )
        stages = tuple(
            Stage(step * self.slots_per_step, step)
            for step in range(num_slots // self.slots_per_step + 1)
        )
        return (*stages, Stage(num_slots, None)) if self.answers_only else stages

    def boundaries(self, num_stages: int, steps_per_epoch: int) -> tuple[int, ...]:
        """Optimizer steps at which stages 1, …, `num_stages` begin.

        >>> CurriculumConfig(epochs_per_stage=4).boundaries(3, 10)
        (40, 80, 120)
        """
        if self.steps_per_stage is not None:
            lengths = list(self.steps_per_stage)
        else:
            assert self.epochs_per_stage is not None, "checked with the other settings"
            lengths = [self.epochs_per_stage * steps_per_epoch] * num_stages
        if len(lengths) != num_stages:
            raise ConfigError(
                "stages and slots differ",
                where="loss.steps_per_stage",
                got=lengths,
                expected=f"{num_stages} numbers: stages 0 to {num_stages - 1}; "
                "the last one takes the rest of trainer.max_steps",
            )
        return tuple(itertools.accumulate(lengths))


@dataclass(frozen=True)
class CoconutConfig(CurriculumConfig):
    """With the gradient that Coconut published."""

    gradient: str = "bptt"


class Curriculum(TrainerCallback):
    """Knows the stage of each optimizer step, and acts where one ends.

    Args:
        num_stages: S, number of the last stage.
        save: called with a stage that has ended, None for never.
    """

    def __init__(
        self, config: CurriculumConfig, num_stages: int, save: Callable[[int], None] | None = None
    ):
        self.config = config
        self.num_stages = num_stages
        self.save = save
        self.num_resets = 0
        self._boundaries: tuple[int, ...] = ()

    def stage_of(self, step: int) -> int:
        """Of the optimizer step that follows `step` finished ones."""
        return bisect_right(self._boundaries, step)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # the Trainer makes a step of an epoch's last, incomplete accumulation too
        steps_per_epoch = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        self._boundaries = self.config.boundaries(self.num_stages, steps_per_epoch)
        if self._boundaries and state.max_steps <= self._boundaries[-1]:
            raise ConfigError(
                "training ends before its last stage",
                where="trainer.max_steps, trainer.num_train_epochs",
                got=f"{state.max_steps} steps",
                expected=f"more than {self._boundaries[-1]}, where stage {self.num_stages} begins",
            )

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # at the step's beginning, not at the end of the one before: a run resumed here resets as
        # well
        if self.config.reset_optimizer and state.global_step in self._boundaries:
            optimizer.state.clear()
            self.num_resets += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.save is not None and state.global_step in self._boundaries:
            self.save(self.stage_of(state.global_step - 1))
