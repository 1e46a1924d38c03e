"""`LatentConfig`: what a checkpoint's latents are. Stored beside the weights as `latent_config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from grpo_latent.errors import CheckpointError, ConfigError

LATENT_CONFIG_FILE = "latent_config.json"
LATENT_CONFIG_VERSION = 1
EXITS = ("steps", "latent_end", "end_token")
HEADS = ("none", "mlp", "glu")
VISIBILITIES = ("full", "latents_only")
MECHANISMS = ("lvr", "ilvr", "ivt_lr", "coconut")
TRIGGERS = ("emitted", "prompt_slots")
POSITIONS = ("text_style", "1d")


@dataclass(frozen=True)
class LatentConfig:
    """Mechanism, tokens, span rules and head of a latent model.

    Attributes:
        start_id, latent_id, end_id: token ids; `latent_id` is only a placeholder.
        mechanism: whose rules these are (`latent.mechanisms` has the published ones); the fields below decide.
        trigger: `emitted` (the model opens a span by `start`) or `prompt_slots` (every completion begins with `steps`
            latent steps, and no span is opened later).
        top_k_image: image embeddings inserted before each slot, chosen by attention (IVT-LR); 0 for none.
        positions: `text_style` (the model's own for the prompt, latents count on as text) or `1d` (0, 1, 2, … for
            everything, images included).
        latent_end_id: id whose learned embedding ends a span by distance (exit `latent_end`), else None.
        steps: latent steps of a span (exit `steps`), or their cap (the other exits); the number of slots.
        exit: `steps` (exactly `steps`), `latent_end` (a fed vector within `latent_end_threshold` mean squared distance of
            the learned end vector is the span's last), `end_token` (the arg-max token at a latent position is the end).
        max_spans: spans a completion may open, None for no bound; `start` cannot be sampled after the last one.
        head: module applied to h before it is fed back (LVR section 3: `mlp` is LayerNorm-Linear-GELU-Linear).
        visibility: `full` (published) or `latents_only` (text sees question and latents only).
        start_is_action: whether emitting `start` counts as an action of the policy.
    """

    start_token: str
    latent_token: str
    end_token: str
    start_id: int
    latent_id: int
    end_id: int
    mechanism: str = "lvr"
    latent_end_token: str | None = None
    latent_end_id: int | None = None
    steps: int = 8
    exit: str = "steps"
    latent_end_threshold: float = 0.02
    max_spans: int | None = None
    head: str = "none"
    visibility: str = "full"
    start_is_action: bool = True
    trigger: str = "emitted"
    top_k_image: int = 0
    positions: str = "text_style"
    version: int = LATENT_CONFIG_VERSION

    def __post_init__(self):
        choices = dict(exit=EXITS, head=HEADS, visibility=VISIBILITIES, mechanism=MECHANISMS)
        choices |= dict(trigger=TRIGGERS, positions=POSITIONS)
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError("unknown value", where=f"latent.{name}", got=value, expected=f"one of {allowed}")
        has_slots = self.trigger == "prompt_slots"
        for name, minimum in (("steps", 0 if has_slots else 1), ("max_spans", 0), ("top_k_image", 0)):
            value = getattr(self, name)
            optional = name == "max_spans" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
                raise ConfigError("not a valid count", where=f"latent.{name}", got=value, expected=f"int >= {minimum}")
        threshold = self.latent_end_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ConfigError("not a distance", where="latent.latent_end_threshold", got=threshold, expected="> 0")
        if not isinstance(self.start_is_action, bool):
            raise ConfigError(
                "not a switch", where="latent.start_is_action", got=self.start_is_action, expected="true or false"
            )
        self._check_ids()
        if self.exit == "latent_end" and self.latent_end_id is None:
            raise ConfigError(
                "exit by distance needs the learned end vector",
                where="latent.exit",
                got="latent_end without latent_end_id",
                expected="latent_end_id set",
                fix="Train SFT with loss.end=latent_end, or set latent.exit=steps.",
            )
        if self.visibility == "latents_only" and self.exit != "steps":
            # the last latent of a span must be known when it is fed (it is a blind row), which only `steps` allows
            raise ConfigError(
                "visibility latents_only needs spans of known length",
                where="latent.exit",
                got=self.exit,
                expected="steps",
                fix="Set latent.exit=steps, or latent.visibility=full.",
            )
        self._check_trigger()

    def _check_trigger(self) -> None:
        if self.trigger == "emitted" and self.top_k_image:
            raise ConfigError(
                "image embeddings are inserted before slots of the prompt only",
                where="latent.top_k_image",
                got=f"{self.top_k_image} with trigger emitted",
                expected="trigger prompt_slots",
                fix="Set latent.trigger=prompt_slots, or latent.top_k_image=0.",
            )
        slot_rules = dict(exit="steps", visibility="full", max_spans=None, latent_end_id=None)
        for name, expected in slot_rules.items() if self.trigger == "prompt_slots" else ():
            if getattr(self, name) != expected:
                raise ConfigError(
                    "slots of the prompt have a fixed number, no delimiters, and see the image",
                    where=f"latent.{name}",
                    got=getattr(self, name),
                    expected=f"{expected} with latent.trigger=prompt_slots",
                )

    def _check_ids(self) -> None:
        ids = {name: getattr(self, name) for name in ("start_id", "latent_id", "end_id", "latent_end_id")}
        if ids["latent_end_id"] is None:
            del ids["latent_end_id"]
        are_ids = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in ids.values())
        if not are_ids or len(set(ids.values())) != len(ids):
            raise ConfigError("latent tokens need different ids", where="latent", got=ids, expected="distinct ids >= 0")

    def replace(self, **changes) -> LatentConfig:
        """A copy with `changes`; unknown fields raise `ConfigError`."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigError("unknown field", where="latent", got=unknown, expected="fields of LatentConfig")
        return dataclasses.replace(self, **changes)

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / LATENT_CONFIG_FILE
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def from_dict(cls, values: dict, where: str) -> LatentConfig:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise CheckpointError("not a JSON object", where=where, got=values, expected="an object")
        version = values.get("version")
        if version != LATENT_CONFIG_VERSION:
            raise CheckpointError(
                "unknown version of latent_config.json",
                where=where,
                got=version,
                expected=str(LATENT_CONFIG_VERSION),
                fix="Use the release of grpo_latent that wrote it, or write the file anew.",
            )
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        unknown = sorted(set(values) - set(fields))
        if missing or unknown:
            raise CheckpointError(
                "fields do not match",
                where=where,
                got=f"missing {missing}, unknown {unknown}",
                expected="the fields of LatentConfig",
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise CheckpointError(
                error.what, where=f"{where}: {error.where}", got=error.got, expected=error.expected, fix=error.fix
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> LatentConfig:
        """Reads `latent_config.json` of a checkpoint folder.

        Raises:
            CheckpointError: the file is missing, is no JSON, or its fields do not match.
        """
        path = Path(folder) / LATENT_CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(
                "no latent_config.json",
                where=str(folder),
                expected="a folder written by grpo_latent.sft",
                fix="Run SFT first: a plain Hugging Face model has no latents (evaluate takes one with model.plain=true).",
            )
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(
                "not valid JSON", where=str(path), got=str(error), expected="a JSON object"
            ) from error
        return cls.from_dict(values, where=str(path))
