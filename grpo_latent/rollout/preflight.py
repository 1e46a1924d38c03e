"""Checks whether a checkpoint can start RL, before a run fails, or learns nothing, for hours.

    folder ──load──▶ tokens ▸ embeddings ▸ chat template ▸ EOS ──roll a few prompts out──▶ rates

`latents that are never emitted` is the quiet failure: reward and loss look well, and text-only
GRPO is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from grpo_latent.errors import CheckpointError, ConfigError, PreflightError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.latent.treatments import Treatment
from grpo_latent.models.loading import LatentModel, load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.trajectory import Trajectory


@dataclass(frozen=True)
class PreflightPrompt:
    """A row to try: messages with split contents, its images, and where it comes from."""

    messages: Sequence[dict]
    images: Sequence[Image.Image] = ()
    where: str = "preflight prompt"


@dataclass(frozen=True)
class PreflightReport:
    """What a checkpoint does.

    Attributes:
        layout: `grpo_latent` (latent_config.json) or `official_lvr`, `official_ilvr` (fields of
            config.json).
        tokens: id of each latent token.
        emission_rate: share of the trajectories that open at least one span; None if no prompt was
            tried.
        num_latent_steps: mean over the trajectories.
        eos_rate: share of the trajectories that end by themselves within `max_new_tokens`.
    """

    folder: str
    layout: str
    model_type: str
    head: str
    tokens: dict[str, int]
    eos_ids: tuple[int, ...]
    num_trajectories: int
    emission_rate: float | None
    num_latent_steps: float | None
    eos_rate: float | None

    def summary(self) -> str:
        """What `preflight` prints, in one line."""
        clauses = [f"{self.folder}: {self.model_type}, {self.layout} layout, head {self.head}"]
        if self.emission_rate is not None:
            clauses.append(
                f"{self.emission_rate:.0%} of {self.num_trajectories} trajectories open a span, "
                f"{self.num_latent_steps:.1f} latent steps each, "
                f"{self.eos_rate:.0%} end by themselves"
            )
        return "; ".join(clauses)


def preflight(
    folder: str | Path,
    prompts: Sequence[PreflightPrompt] = (),
    min_emission_rate: float = 0.0,
    sampling: SamplingParams | None = None,
    trajectories_per_prompt: int = 4,
    overrides: dict | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    treatment: Treatment | None = None,
    seed: int = 0,
    verify_digests: bool = True,
) -> PreflightReport:
    """Checks a checkpoint; the folder is only read.

    Args:
        prompts: rows of the RL data, a few; none leaves the rollout out.
        min_emission_rate: least share of trajectories that must open a span.
        sampling: as RL will sample; by default temperature 1, 64 tokens.
        overrides: settings of the mechanism that RL will replace.
        treatment: of latents in RL; None is `mask`.
        seed: of its parameters, where the checkpoint has none.
        verify_digests: as `load_latent_model`.

    Raises:
        CheckpointError: the folder lacks something, or disagrees with itself.
        PreflightError: the model rolls out no latents, or no finite log-probs.
    """
    if not 0 <= min_emission_rate <= 1:
        raise ConfigError(
            "not a rate", where="min_emission_rate", got=min_emission_rate, expected="in [0, 1]"
        )
    loaded = load_latent_model(
        folder,
        dtype,
        device,
        overrides=overrides,
        treatment=treatment,
        seed=seed,
        verify_digests=verify_digests,
    )
    check_tokenizer(loaded, str(folder))
    trajectories: list[Trajectory] = []
    if prompts:
        sampling = sampling or SamplingParams(max_new_tokens=64)
        trajectories = roll_out(
            loaded, prompts, sampling, trajectories_per_prompt, str(folder), treatment
        )
    report = make_report(folder, loaded, trajectories)
    if report.emission_rate is not None and report.emission_rate < min_emission_rate:
        raise PreflightError(
            "the model opens too few latent spans",
            where=str(folder),
            got=f"{report.emission_rate:.0%} of {report.num_trajectories} trajectories",
            expected=f"at least {min_emission_rate:.0%}",
            fix="Train SFT longer, prompt as in SFT (system message, template), "
            "or lower the minimum.",
        )
    return report


def check_tokenizer(loaded: LatentModel, where: str) -> None:
    """Raises `CheckpointError` unless prompts can be made, and latent tokens have embeddings."""
    tokenizer = loaded.tokenizer
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)  # as `Backbone` demands
    num_rows = embedding.num_embeddings
    for token, token_id in loaded.mechanism.token_ids.items():
        encoded = tokenizer(token, add_special_tokens=False).input_ids
        if encoded != [token_id]:
            raise CheckpointError(
                f"{token} is in the vocabulary, but text is not split at it",
                where=where,
                got=f"encoded as {encoded}",
                expected=str([token_id]),
                fix="Add it with tokenizer.add_special_tokens, or write the folder with "
                "grpo_latent.sft.",
            )
        if token_id >= num_rows:
            raise CheckpointError(
                f"no embedding for {token}",
                where=where,
                got=f"id {token_id}, {num_rows} embeddings",
                expected="an id below the number of embeddings",
                fix="Resize the model's embeddings and train SFT again.",
            )
    both = sorted(set(loaded.mechanism.token_ids.values()) & set(loaded.eos_ids))
    if both:
        raise CheckpointError(
            "a latent token ends the sequence",
            where=where,
            got=f"id {both[0]} among the end-of-sequence ids {list(loaded.eos_ids)}",
            expected="latent tokens that are no end-of-sequence tokens",
            fix="Correct eos_token_id in generation_config.json.",
        )
    # a processor's own template, or the tokenizer's: which of them, differs by model
    if not (getattr(loaded.processor, "chat_template", None) or tokenizer.chat_template):
        raise CheckpointError(
            "no chat template",
            where=where,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="Copy it from the model that this one comes from.",
        )


def roll_out(
    loaded: LatentModel,
    prompts: Sequence[PreflightPrompt],
    sampling: SamplingParams,
    trajectories_per_prompt: int,
    where: str,
    treatment: Treatment | None = None,
) -> list[Trajectory]:
    """Rolls the prompts out on engine `hf`; seeds are fixed, so the same each time.

    Raises:
        PreflightError: a log-prob is not finite.
    """
    requests = []
    for prompt_idx, item in enumerate(prompts):
        prompt = encode_prompt(
            loaded.tokenizer, loaded.processor, item.messages, item.images, item.where
        )
        seeds = [trajectory_seed(0, 0, prompt_idx, idx) for idx in range(trajectories_per_prompt)]
        requests.append(RolloutRequest(prompt.ids, seeds, prompt.images, group_id=item.where))
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids, treatment=treatment)
    trajectories = [item for group in engine.generate(requests, sampling) for item in group]
    broken = [
        item.group_id
        for item in trajectories
        if not bool(torch.isfinite(item.rollout_log_probs).all())
    ]
    if broken:
        raise PreflightError(
            "log-probs are not finite",
            where=where,
            got=f"prompt {broken[0]!r} and {len(broken) - 1} more trajectories",
            expected="finite numbers",
            fix="The weights are damaged, or overflow in this dtype.",
        )
    return trajectories


def make_report(
    folder: str | Path, loaded: LatentModel, trajectories: Sequence[Trajectory]
) -> PreflightReport:
    """What loading and rolling out have shown; rates are None where nothing was rolled out."""
    num = len(trajectories)
    return PreflightReport(
        folder=str(folder),
        layout="grpo_latent"
        if (Path(folder) / LATENT_CONFIG_FILE).is_file()
        else f"official_{loaded.mechanism.key()}",
        model_type=loaded.model.config.model_type,
        # a setting of the mechanisms that have one
        head=getattr(loaded.mechanism, "head", "none"),
        tokens=loaded.mechanism.token_ids,
        eos_ids=loaded.eos_ids,
        num_trajectories=num,
        emission_rate=sum(bool(item.recorded_mask.any()) for item in trajectories) / num
        if num
        else None,
        num_latent_steps=sum(item.latents.shape[0] for item in trajectories) / num
        if num
        else None,
        eos_rate=sum(item.stop_reason == "eos" for item in trajectories) / num if num else None,
    )
