"""The settings of an SFT run as types, built strictly from a plain dict (what hydra resolves to)."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.latents import LatentSettings
from grpo_latent.sft.common.parameters import LoraSettings
from grpo_latent.sft.common.settings import DTYPES, DataSettings, ModelSettings
from grpo_latent.sft.methods import METHODS, Method

_REQUIRED = "???"


@dataclass(frozen=True)
class SFTSettings:
    """All of a run.

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
        """Settings of a resolved config.

        Raises:
            ConfigError: a key is unknown or missing, or a value cannot be used.
        """
        sections = {"method", "model", "data", "latent", "loss", "trainer", "schedule"}
        _check_keys(config, sections, sections, where="config")
        name = config["method"]
        _check_choice("method", name, tuple(METHODS))
        method = METHODS[name]
        model = dict(config["model"])
        model["lora"] = _build(LoraSettings, model.get("lora") or {}, "model.lora")
        trainer = dict(config["trainer"])
        schedule = dict(config["schedule"] or {})
        _check_keys(schedule, {"horizon_steps"}, set(), where="schedule")
        settings = cls(
            method=name,
            model=_build(ModelSettings, model, "model"),
            data=_build(DataSettings, config["data"], "data"),
            latent=_build(method.latent, config["latent"], "latent", note=f" of method {name}"),
            loss=_build(method.loss, config["loss"], "loss", note=f" of method {name}"),
            resume=trainer.pop("resume_from_checkpoint", "auto"),
            trainer=trainer,
            horizon_steps=schedule.get("horizon_steps"),
        )
        _check_choice("model.dtype", settings.model.dtype, tuple(DTYPES))
        _check_choice("data.format", settings.data.format, tuple(method.readers), note=f" for method {name}")
        return settings

    @property
    def parts(self) -> Method:
        """What runs this method."""
        return METHODS[self.method]

    def training_arguments(self) -> TrainingArguments:
        """Raises `ConfigError` where transformers refuses an argument."""
        known = {item.name for item in dataclasses.fields(TrainingArguments)}
        _check_keys(self.trainer, known, {"output_dir"}, where="trainer")
        values = {"report_to": [], "use_cpu": not torch.cuda.is_available(), **self.trainer}
        # the bar and the log of this package replace the Trainer's; a loss that is not finite stops the run
        values |= {"disable_tqdm": True, "logging_nan_inf_filter": False}
        try:
            return TrainingArguments(**values)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(
                "transformers refuses the arguments",
                where="trainer",
                got=f"{type(error).__name__}: {error}",
                expected="arguments of transformers.TrainingArguments",
            ) from error


def _check_choice(where: str, value: object, allowed: tuple[str, ...], note: str = "") -> None:
    if value not in allowed:
        raise ConfigError("unknown value", where=where, got=value, expected=f"one of {allowed}{note}")


def _check_keys(values: object, known: set[str], required: set[str], where: str, note: str = "") -> None:
    if not isinstance(values, dict):
        raise ConfigError("not a section", where=where, got=values, expected=f"keys {sorted(known)}")
    unknown = sorted(set(values) - known)
    if unknown:
        near = [name for key in unknown for name in difflib.get_close_matches(str(key), known)]
        raise ConfigError("unknown key", where=where, got=unknown, expected=f"among {near or sorted(known)[:20]}{note}")
    missing = sorted(name for name in required if values.get(name, _REQUIRED) == _REQUIRED)
    if missing:
        raise ConfigError(
            "missing value",
            where=where,
            got=f"no {', '.join(missing)}",
            expected="a value",
            fix=f"Set {where}.{missing[0]}=… on the command line.",
        )


def _build(cls, values: object, where: str, note: str = ""):
    fields = {item.name: item for item in dataclasses.fields(cls)}
    required = {
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    _check_keys(values, set(fields), required, where, note)
    values = dict(values)
    for name, value in values.items():
        if str(fields[name].type).startswith("tuple") and value is not None:
            values[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for name, value in values.items():
        _check_type(fields[name], value, f"{where}.{name}")
    return cls(**values)


_TYPES = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _check_type(item: dataclasses.Field, value: object, where: str) -> None:
    names = [name.strip() for name in str(item.type).split("|")]
    allowed = tuple(kind for name in names for kind in _TYPES.get(name, ()))
    if not allowed or (value is None and "None" in names):
        return
    is_bool = isinstance(value, bool)
    if not isinstance(value, allowed) or (is_bool and bool not in allowed):
        raise ConfigError("wrong type", where=where, got=repr(value), expected=str(item.type))
