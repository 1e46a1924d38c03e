"""What each key of an evaluation's config may hold."""

from __future__ import annotations

from typing import Any

from grpo_latent.common.dtypes import DTYPES
from grpo_latent.common.kinds import (
    choice,
    entries,
    flag,
    null_or,
    number,
    one_or_some,
    seed,
    some,
    text,
    whole,
)
from grpo_latent.common.schema import Schema
from grpo_latent.eval.benchmarks import LABELS

_TABLE = {
    "model.path": text("a path"),
    "model.dtype": choice(*DTYPES),
    "model.device": text("cpu, cuda or cuda:<n>"),
    "model.attn_implementation": choice(
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ),
    "data.val_files": one_or_some(text("a path of a file")),
    "data.prompt_key": text("a column's name"),
    "data.image_key": text("a column's name"),
    "data.benchmark": entries("{name, path, subset, preset, labels}"),
    "data.benchmark.name": null_or(text("a benchmark's name")),
    "data.benchmark.path": null_or(text("a path")),
    "data.benchmark.subset": null_or(text()),
    "data.benchmark.preset": null_or(text("a preset's name")),
    "data.benchmark.labels": choice(*LABELS),
    "data.max_rows": null_or(whole(1)),
    "data.cache_bytes": whole(0),
    "data.max_response_length": whole(1),
    "latent.visibility": null_or(choice("full", "latents_only")),
    "latent.steps": null_or(whole(0)),
    "latent.exit": null_or(choice("steps", "end_token", "latent_end")),
    "latent.max_spans": null_or(whole(0)),
    "latent.cpu_threads": whole(1),
    "latent.max_batch_rows": whole(1),
    "latent.reward.functions": some(entries("{path, name, weight, term, kwargs}"), at_least=0),
    "latent.reward.timeout_s": number(above=0),
    "latent.reward.on_error": choice("raise", "drop", "score"),
    "latent.reward.error_score": number(),
    "latent.reward.num_processes": whole(1),
    "reward.custom_reward_function.path": null_or(text("a path")),
    "reward.custom_reward_function.name": text("a function's name"),
    "reward.custom_reward_function.reward_kwargs": null_or(entries("arguments of the function")),
    "rollout.n": whole(0),
    "rollout.temperature": number(at_least=0),
    "rollout.top_k": whole(0, also=-1),
    "rollout.top_p": number(above=0, at_most=1),
    "decodings": some(entries("{steps: 4}, {n: 8, temperature: 0.7}, …"), at_least=0),
    "ablations": some(text("an ablation's name"), at_least=0),
    "verdict.margin": number(above=0, below=1),
    "verdict.level": number(above=0, below=1),
    "verdict.chance": number(at_least=0, below=1),
    "verdict.primary": text("an ablation's name"),
    "verdict.num_resamples": whole(1),
    "leak_prompts": whole(0),
    "seed": seed(),
    "prompts_per_batch": whole(1),
    "output": null_or(text("a path")),
    "model.plain": flag(),
    "model.verify_digests": flag(),
}


def evaluate_schema(shipped: dict[str, Any]) -> Schema:
    """Of the config as it is shipped, `config/evaluate.yaml`."""
    return Schema(
        _TABLE, shipped, free=frozenset(), classes=frozenset({"latent.treatment", "verdict"})
    )
