"""The settings of an SFT run as types, built strictly from the dict that hydra resolves to."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from grpo_latent.common.settings import build, check_choice, check_keys, check_types
from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.keys import SFT
from grpo_latent.sft.common.latents import LatentSettings
from grpo_latent.sft.common.settings import DTYPES, DataSettings, ModelSettings
from grpo_latent.sft.methods import METHODS, Method


@dataclass(frozen=True)
class SFTSettings:
    """All settings of a run.

    Attributes:
        method: key of `METHODS`; `latent` and `loss` are of that method's types.
        trainer: arguments of `transformers.TrainingArguments`.
    """

    method: str
    model: ModelSettings
    data: DataSettings
    latent: LatentSettings
    loss: Any
    trainer: dict[str, Any]
    horizon_steps: int | None = None
    resume: str | None = "auto"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> SFTSettings:
        """Builds the settings of a resolved config.

        Raises:
            ConfigError: a key is unknown or missing, or a value cannot be used.
        """
        sections = {"method", "model", "data", "latent", "loss", "trainer", "schedule"}
        check_keys(config, sections, "config", required=sections)
        name = config["method"]
        check_choice(name, tuple(METHODS), "method")
        SFT.check(config)
        method = METHODS[name]
        trainer = dict(config["trainer"])
        schedule = dict(config["schedule"] or {})
        check_keys(schedule, {"horizon_steps"}, "schedule")
        settings = cls(
            method=name,
            model=build(ModelSettings, config["model"], "model"),
            data=build(DataSettings, config["data"], "data"),
            latent=build(method.latent, config["latent"], "latent", note=f" of method {name}"),
            loss=build(method.loss, config["loss"], "loss", note=f" of method {name}"),
            resume=trainer.pop("resume_from_checkpoint", "auto"),
            trainer=trainer,
            horizon_steps=schedule.get("horizon_steps"),
        )
        check_choice(settings.model.dtype, DTYPES, "model.dtype")
        check_choice(
            settings.data.format, tuple(method.readers), "data.format", note=f" for method {name}"
        )
        return settings

    @property
    def method_row(self) -> Method:
        """The method's row of the table: what reads, encodes and trains."""
        return METHODS[self.method]

    def training_arguments(self) -> TrainingArguments:
        """Raises `ConfigError` where transformers refuses an argument."""
        known = {item.name for item in dataclasses.fields(TrainingArguments)}
        check_keys(self.trainer, known, "trainer", required=["output_dir"])
        if not isinstance(self.trainer.get("fsdp") or False, bool):
            raise ConfigError(
                "wrong type",
                where="trainer.fsdp",
                got=self.trainer["fsdp"],
                expected="true or false",
            )
        # whose annotation of `fsdp` is older than its own reading of it
        typed = {name: value for name, value in self.trainer.items() if name != "fsdp"}
        check_types(TrainingArguments, typed, "trainer")
        # a copy: transformers writes its own defaults into `fsdp_config`
        asked = copy.deepcopy(dict(self.trainer))
        values = {"report_to": [], "use_cpu": not torch.cuda.is_available(), **asked}
        # our own bar replaces the Trainer's, and a loss that is not finite stops the run
        values |= {"disable_tqdm": True, "logging_nan_inf_filter": False}
        if values.get("fsdp"):
            # gradients that wait for the last micro-batch are those of all weights on every rank
            accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
            values.setdefault("accelerator_config", accumulation)
        try:
            return TrainingArguments(**values)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(
                "transformers refuses the arguments",
                where="trainer",
                got=f"{type(error).__name__}: {error}",
                expected="arguments of transformers.TrainingArguments",
            ) from error
