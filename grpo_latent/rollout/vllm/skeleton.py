"""A checkpoint without its weights: what front end, scheduler and worker need to know of it.

The Hugging Face model is built on the meta device, so names, shapes, vision ids and prompt checks are those of engine `hf`
by construction, at no memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from grpo_latent.backbones.registry import read_backbone
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.head import attach_latent_modules
from grpo_latent.models.loading import check_tokens, find_eos_ids, read_latent_config, reading
from grpo_latent.rollout.vllm.compat import ENGINE_HF

# key of vLLM's `additional_config`
CONFIG_KEY = "grpo_latent"
# latents that a request has room for where neither `max_spans` nor the option `max_latents` bounds them
DEFAULT_MAX_LATENTS = 256


@dataclass(frozen=True)
class Skeleton:
    """`adapter` wraps the model on the meta device; `eos_ids` are those of the generation config and the tokenizer."""

    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    config: LatentConfig
    eos_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.adapter.model.get_output_embeddings().weight.shape[0]

    def banned_ids(self, extra: Iterable[int] = ()) -> list[int]:
        """Tokens that are never drawn: `extra`, image placeholders, latent tokens other than `start`; EOS is never one."""
        latent_ids = {self.config.latent_id, self.config.end_id, self.config.latent_end_id} - {None}
        return sorted((set(extra) | latent_ids | self.adapter.vision_ids) - set(self.eos_ids))


def read_skeleton(folder: str | Path, overrides: dict | None = None) -> Skeleton:
    """Reads everything but the weights of a checkpoint folder.

    Args:
        overrides: fields of `LatentConfig` to replace.

    Raises:
        CheckpointError: the folder is missing, damaged, or disagrees with itself.
        ConfigError: a mechanism or a model that vLLM cannot run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), expected="a folder written by grpo_latent.sft")
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    config = read_latent_config(folder, tokenizer)
    check_tokens(config, tokenizer, where=str(folder))
    config = config.replace(**overrides) if overrides else config
    check_mechanism(config)
    with reading("config.json", folder):
        hf_config, backbone = read_backbone(folder)
    backbone.check_vllm(hf_config, where=f"{folder}/config.json")
    with torch.device("meta"):
        model = backbone.auto_class.from_config(hf_config)
    if (folder / "generation_config.json").is_file():
        with reading("generation config", folder):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    attach_latent_modules(model, config)
    skeleton = Skeleton(ModelAdapter(model), tokenizer, config, find_eos_ids(model, tokenizer))
    forced = {config.latent_id, config.end_id} & set(skeleton.eos_ids)
    if forced:
        raise ConfigError(
            "a latent token also ends completions",
            where=str(folder),
            got=sorted(forced),
            expected="latent_id and end_id that are no EOS token",
        )
    return skeleton


# fields of LatentConfig -> the value that engine vllm runs, and why it runs no other
_RUNS = {
    "mechanism": ("lvr", "engine vllm does not run this mechanism"),
    "visibility": ("full", "vLLM's kernels take no custom attention mask"),
    "trigger": ("emitted", "engine vllm opens spans at an emitted start only"),
    "top_k_image": (0, "vLLM gives no attention to select image positions by"),
    "positions": ("text_style", "vLLM numbers positions itself"),
}


def check_mechanism(config: LatentConfig) -> None:
    """Raises `ConfigError` for what vLLM cannot run."""
    for name, (expected, what) in _RUNS.items():
        got = getattr(config, name, expected)
        if got != expected:
            raise ConfigError(
                what,
                where=f"latent.{name}",
                got=got,
                expected=expected if isinstance(expected, str) else repr(expected),
                fix=f"Use {ENGINE_HF}, or set latent.{name}={expected}.",
            )


@dataclass(frozen=True)
class WorkerOptions:
    """What the worker and scheduler processes need; JSON under `additional_config["grpo_latent"]`.

    Raises:
        ConfigError: `max_latents` has no room for one span, so that none would ever open.
    """

    config: LatentConfig
    banned_ids: tuple[int, ...]
    max_latents: int | None = None

    def __post_init__(self):
        if self.max_latents is not None and self.max_latents < self.config.steps:
            raise ConfigError(
                "no room for one latent span",
                where="max_latents",
                got=self.max_latents,
                expected=f">= latent.steps = {self.config.steps}",
                fix="Raise max_latents, or lower latent.steps.",
            )

    def room(self, max_model_len: int) -> int:
        """Latents that a request has room for: the option, what `max_spans` allows, or `DEFAULT_MAX_LATENTS`.

        >>> config = LatentConfig("s", "l", "e", 0, 1, 2, steps=8, max_spans=2)
        >>> WorkerOptions(config, ()).room(4096), WorkerOptions(config.replace(max_spans=None), ()).room(4096)
        (16, 256)
        """
        if self.max_latents is not None:
            return min(self.max_latents, max_model_len)
        max_spans = self.config.max_spans
        bound = DEFAULT_MAX_LATENTS if max_spans is None else max(1, max_spans * self.config.steps)
        return min(bound, max_model_len)

    def to_json(self) -> dict:
        return {
            "config": dataclasses.asdict(self.config),
            "banned_ids": list(self.banned_ids),
            "max_latents": self.max_latents,
        }


def worker_options(vllm_config) -> WorkerOptions:
    """Options that the engine sent, or, where vLLM was started without it, read from the model's folder.

    There `--additional-config '{"grpo_latent": {"overrides": {"steps": 4}, "max_latents": 512}}'` may change them. Unless it
    says otherwise there is room for `DEFAULT_MAX_LATENTS` at least: clients may ask for more steps a span.
    """
    values = (vllm_config.additional_config or {}).get(CONFIG_KEY) or {}
    unknown = sorted(set(values) - {"config", "banned_ids", "max_latents", "overrides"})
    if unknown:
        raise ConfigError("unknown option", where=f"additional_config.{CONFIG_KEY}", got=unknown, expected="overrides")
    if "config" in values:
        config = LatentConfig.from_dict(values["config"], where=f"additional_config.{CONFIG_KEY}")
        return WorkerOptions(config, tuple(values["banned_ids"]), values["max_latents"])
    overrides = tuple(sorted((values.get("overrides") or {}).items()))
    skeleton = _cached_skeleton(vllm_config.model_config.model, overrides)
    max_latents, config = values.get("max_latents"), skeleton.config
    if max_latents is None:
        max_latents = max(DEFAULT_MAX_LATENTS, config.steps * (config.max_spans or 1))
    return WorkerOptions(config, tuple(skeleton.banned_ids()), max_latents)


@functools.lru_cache(maxsize=4)
def _cached_skeleton(folder: str, overrides: tuple) -> Skeleton:
    return read_skeleton(folder, dict(overrides))
