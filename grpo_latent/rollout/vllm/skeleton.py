"""Reads a checkpoint without its weights: what front end, scheduler and worker need to know of it.

The Hugging Face model is built on the meta device, so names, shapes, vision ids and prompt checks
are those of engine `hf` by construction, at no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import LVR, Mechanism, from_dict  # noqa: F401  (LVR: doctest)
from grpo_latent.latent.treatments import Mask, Treatment, parse_treatment, to_dict
from grpo_latent.latent.treatments.registry import names_without_parameters
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import check_tokens, find_eos_ids, read_mechanism, reading
from grpo_latent.rollout.vllm.supported import ENGINE_HF, NORMALIZES_PIXELS
from grpo_latent.trajectory import PLACED_KINDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# key of vLLM's `additional_config`
CONFIG_KEY = "grpo_latent"
# latents that a request has room for where neither `max_spans` nor `max_latents` bounds them
DEFAULT_MAX_LATENTS = 256


@dataclass(frozen=True)
class Skeleton:
    """What a checkpoint says besides its weights.

    Attributes:
        adapter: of the model on the meta device.
        eos_ids: of the generation config and the tokenizer.
    """

    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    mechanism: Mechanism
    eos_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """V, of the logits; a tokenizer may know fewer tokens."""
        return self.adapter.model.get_output_embeddings().weight.shape[0]

    def banned_ids(self, extra: Iterable[int] = ()) -> list[int]:
        """Tokens that are never drawn.

        They are `extra`, image placeholders and latent tokens that open nothing; EOS is never one.
        """
        return sorted(
            (set(extra) | self.mechanism.banned_ids | self.adapter.vision_ids) - set(self.eos_ids)
        )


def read_skeleton(folder: str | Path, overrides: dict | None = None) -> Skeleton:
    """Reads everything but the weights of a checkpoint folder.

    Args:
        overrides: settings of the mechanism to replace.

    Raises:
        CheckpointError: the folder is missing, damaged, or disagrees with itself, or its
            config.json does not name the model's class.
        ConfigError: a mechanism or a model that vLLM cannot run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=str(folder), expected="a folder written by grpo_latent.sft"
        )
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    mechanism = read_mechanism(folder, tokenizer)
    check_tokens(mechanism, tokenizer, where=str(folder))
    mechanism = mechanism.replace(**overrides) if overrides else mechanism
    check_mechanism(mechanism)
    with reading("config.json", folder):
        hf_config, backbone = read_backbone(folder)
    backbone.check_vllm(hf_config, where=f"{folder}/config.json")
    if not hf_config.architectures:
        # Hugging Face goes by model_type, vLLM by this name
        raise CheckpointError(
            "vLLM is not told which model this is",
            where=f"{folder}/config.json: architectures",
            got=hf_config.architectures,
            expected='the name of the model\'s class, such as ["Qwen2ForCausalLM"]',
            fix="Add it, as `save_pretrained` of transformers does.",
        )
    with torch.device("meta"):
        model = backbone.auto_class.from_config(hf_config)
    if (folder / "generation_config.json").is_file():
        with reading("generation config", folder):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    # attached before anyone asks for names: latent parameters are weights of a checkpoint, too
    mechanism.attach(model)
    skeleton = Skeleton(
        ModelAdapter(model, mechanism), tokenizer, mechanism, find_eos_ids(model, tokenizer)
    )
    _check_positions(skeleton, folder)
    forced = {mechanism.placeholder_id(kind) for kind in PLACED_KINDS} & set(skeleton.eos_ids)
    if forced:
        # vLLM is told to stop at EOS ids, and does so wherever they stand
        raise ConfigError(
            "a latent token also ends completions",
            where=str(folder),
            got=sorted(forced),
            expected="placeholders of latents and delimiters that are no EOS token",
        )
    return skeleton


def check_mechanism(mechanism: Mechanism) -> None:
    """Raises `ConfigError` for what vLLM cannot run."""
    for refusal in mechanism.refusals("vllm"):
        raise ConfigError(
            refusal.why,
            where=f"latent.{refusal.setting}",
            got=refusal.got,
            expected=str(refusal.expected),
            fix=f"Use {ENGINE_HF}, or set latent.{refusal.setting}={refusal.expected}.",
        )


def _check_positions(skeleton: Skeleton, folder: Path) -> None:
    """Raises `ConfigError` where vLLM would number positions otherwise than the checkpoint."""
    if skeleton.mechanism.positions != "text_style" and skeleton.adapter.has_vision:
        raise ConfigError(
            "vLLM numbers the positions of images as their model does",
            where=f"{folder}: latent.positions",
            got=f"{skeleton.mechanism.positions} with a model that takes images",
            expected="text_style, or a text model",
            fix=f"Use {ENGINE_HF}.",
        )


def check_treatment(treatment: Treatment, mechanism: Mechanism) -> None:
    """Raises `ConfigError` for what RL cannot make of latents in vLLM."""
    treatment.check(mechanism)
    if treatment.has_parameters:
        raise ConfigError(
            "engine vllm keeps no parameters of a treatment",
            where="latent.treatment.name",
            got=type(treatment).__name__,
            expected=f"one without parameters ({names_without_parameters()})",
            fix=f"Use {ENGINE_HF}.",
        )


@dataclass(frozen=True)
class WorkerOptions:
    """What the worker and scheduler processes need; JSON under `additional_config["grpo_latent"]`.

    Raises:
        ConfigError: `max_latents` has no room for one span, so that none would ever open.
    """

    mechanism: Mechanism
    banned_ids: tuple[int, ...]
    max_latents: int | None = None
    treatment: Treatment = field(default_factory=Mask)

    def __post_init__(self) -> None:
        if self.max_latents is not None and self.max_latents < self.mechanism.steps:
            raise ConfigError(
                "no room for one latent span",
                where="max_latents",
                got=self.max_latents,
                expected=f">= latent.steps = {self.mechanism.steps}",
                fix="Raise max_latents, or lower latent.steps.",
            )

    def room(self, max_model_len: int) -> int:
        """Latents that a request has room for.

        The option, or what `max_spans` allows, or `DEFAULT_MAX_LATENTS`.

        >>> lvr = LVR("s", "l", "e", 0, 1, 2, steps=8, max_spans=2)
        >>> unbounded = lvr.replace(max_spans=None)
        >>> WorkerOptions(lvr, ()).room(4096), WorkerOptions(unbounded, ()).room(4096)
        (16, 256)
        """
        if self.max_latents is not None:
            return min(self.max_latents, max_model_len)
        max_spans = self.mechanism.max_spans
        bound = (
            DEFAULT_MAX_LATENTS if max_spans is None else max(1, max_spans * self.mechanism.steps)
        )
        return min(bound, max_model_len)

    def to_json(self) -> dict:
        """What `worker_options` reads back in another process."""
        return {
            "mechanism": self.mechanism.to_dict(),
            "banned_ids": list(self.banned_ids),
            "max_latents": self.max_latents,
            "treatment": to_dict(self.treatment),
        }


def worker_options(vllm_config: VllmConfig) -> WorkerOptions:
    """Options that the engine sent, or, where there is none, those of the model's folder.

    There is none under `vllm serve`, where an option may change them:
    `--additional-config '{"grpo_latent": {"overrides": {"steps": 4}, "max_latents": 512}}'`.
    Unless it says otherwise there is room for `DEFAULT_MAX_LATENTS` at least: clients may ask for
    more steps a span.
    """
    values = (vllm_config.additional_config or {}).get(CONFIG_KEY) or {}
    known = {"mechanism", "banned_ids", "max_latents", "treatment", "overrides"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            "unknown option",
            where=f"additional_config.{CONFIG_KEY}",
            got=unknown,
            expected="overrides",
        )
    if "mechanism" in values:
        mechanism = from_dict(values["mechanism"], where=f"additional_config.{CONFIG_KEY}")
        treatment, _ = parse_treatment(values["treatment"])
        return WorkerOptions(
            mechanism, tuple(values["banned_ids"]), values["max_latents"], treatment
        )
    overrides = tuple(sorted((values.get("overrides") or {}).items()))
    skeleton = _cached_skeleton(vllm_config.model_config.model, overrides)
    max_latents = values.get("max_latents")
    mechanism = skeleton.mechanism
    if max_latents is None:
        max_latents = max(DEFAULT_MAX_LATENTS, mechanism.steps * (mechanism.max_spans or 1))
    return WorkerOptions(mechanism, tuple(skeleton.banned_ids()), max_latents)


def check_pixels(vllm_config: VllmConfig) -> None:
    """Raises `ConfigError` where our engine's pixels would be whitened a second time.

    A server's come from vLLM's own processor, which leaves it to the model.
    """
    is_sent = "mechanism" in ((vllm_config.additional_config or {}).get(CONFIG_KEY) or {})
    multimodal_config = vllm_config.model_config.multimodal_config
    if is_sent and getattr(multimodal_config, NORMALIZES_PIXELS, False):
        raise ConfigError(
            "images come whitened, and vLLM would do it again",
            where=f"vllm.{NORMALIZES_PIXELS}",
            got=True,
            expected="False",
            fix=f"Leave {NORMALIZES_PIXELS} as engine vllm sets it.",
        )


@functools.lru_cache(maxsize=4)
def _cached_skeleton(folder: str, overrides: tuple[tuple[str, object], ...]) -> Skeleton:
    """`read_skeleton`, once a process: model, scheduler and worker all ask."""
    return read_skeleton(folder, dict(overrides))
