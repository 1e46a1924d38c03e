"""Whether latents are used, measured again and again on a small fixed set while a model trains.

fixed prompts ──greedy──▶ own ──┬─ ablations ──greedy──▶ usage_gap/<ablation>, verdict
                                ├─ against the start of training ─▶ drift
                                └─ against the boxes ─▶ alignment (not quality)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from grpo_latent.common.files import write_bytes
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.ablations import (
    IMAGE_SWAP,
    AblationInputs,
    check_decides,
    make_changes,
    parse_name,
)
from grpo_latent.eval.alignment import nearest_token_hits
from grpo_latent.eval.decode import Evaluator, with_partners_images
from grpo_latent.eval.geometry import geometry
from grpo_latent.eval.journal import UNREADABLE, pack, unpack
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import Scorer, accuracy
from grpo_latent.eval.statistics import usage_verdict
from grpo_latent.latent.treatments import Mask, Treatment
from grpo_latent.models.loading import LatentModel
from grpo_latent.trajectory import Trajectory


@dataclass(frozen=True)
class UsageSettings:
    """What the measurement that training repeats decodes and decides by.

    Attributes:
        num_prompts: of the fixed set; 0 measures nothing. Below about 75 "not used" cannot be
            shown at a margin of 0.05.
        ablations: names of `eval.ablations.ABLATIONS`, or `name@part`; the first one decides about
            use (`check_decides`).
        prompts_per_batch: prompts decoded together, and kept encoded together.
        margin, chance: see `statistics.usage_verdict`.
    """

    num_prompts: int = 128
    ablations: tuple[str, ...] = ("shuffle", "zero")
    prompts_per_batch: int = 256
    margin: float = 0.05
    chance: float = 0.0

    def __post_init__(self):
        for name in self.ablations:
            parse_name(name)
        for name in self.ablations[:1]:
            check_decides(name, "latent.usage.ablations")
        if self.num_prompts and not self.ablations:
            raise ConfigError(
                "nothing to measure use by",
                where="latent.usage.ablations",
                got="[]",
                expected="shuffle or image_swap, and others beside it",
                fix="latent.usage.num_prompts=0 leaves the measurement out.",
            )
        size = self.prompts_per_batch
        if not isinstance(size, int) or size < 1:
            raise ConfigError(
                "not a count",
                where="latent.usage.prompts_per_batch",
                got=size,
                expected="int >= 1",
            )


@dataclass(frozen=True)
class Usage:
    """One measurement.

    `verdict` and `sentence` are of the first ablation, empty where it changed no prompt.
    """

    metrics: dict[str, float]
    verdict: str = ""
    sentence: str = ""


class UsageProbe:
    """Measures one model, whose weights may change in between, on prompts that do not.

    Args:
        treatment: what RL makes of latents; its mode is what the policy feeds greedily.
        reference: file that keeps the trajectories of the first measurement with `is_start`, over
            resumes.
    """

    def __init__(
        self,
        loaded: LatentModel,
        prompts: Sequence[EvalPrompt],
        scorer: Scorer,
        settings: UsageSettings,
        max_new_tokens: int,
        reference: Path | None = None,
        max_batch_rows: int = 512,
        treatment: Treatment | None = None,
    ):
        self.prompts = prompts
        self.scorer = scorer
        self.settings = settings
        self.reference = reference
        self.evaluator = Evaluator(
            loaded, max_new_tokens, max_batch_rows=max_batch_rows, treatment=treatment or Mask()
        )
        self.mechanism = loaded.mechanism
        size = settings.prompts_per_batch
        self.batches = [slice(start, start + size) for start in range(0, len(prompts), size)]

    def measure(self, is_start: bool = False) -> Usage:
        """Measures metrics, named without a prefix; what cannot be measured is left out."""
        prompts = list(self.prompts)
        # several batches are encoded twice: only when all have been decoded can the first be
        # ablated
        with self.evaluator.encoded_once(prompts) if len(self.batches) == 1 else nullcontext():
            own, ideal, metrics = self._own(prompts)
            inputs = AblationInputs(
                prompts, own, ideal, self.mechanism, swapped=self._swapped(prompts)
            )
            ablated = self._ablated(inputs)
        own_P = [outcome.correct for outcome in self.scorer(prompts, own)]
        metrics["own_accuracy"] = accuracy(own_P) or 0.0
        metrics |= {
            name: value
            for name, value in geometry([[t.latents] for t in own]).items()
            if "group" not in name
        }
        metrics |= self._drift(own, is_start)
        usage = Usage(metrics)
        for name, trajectories in ablated.items():
            changed = [(i, t) for i, t in enumerate(trajectories) if t is not None]
            outcomes = self.scorer([prompts[i] for i, _ in changed], [t for _, t in changed])
            correct = [(own_P[i], o.correct) for (i, _), o in zip(changed, outcomes, strict=True)]
            pairs = [(own, other) for own, other in correct if None not in (own, other)]
            if not pairs:
                continue
            own_C, ablated_C = zip(*pairs, strict=True)
            metrics[f"gap/{name}"] = fmean(own_C) - fmean(ablated_C)
            if name == self.settings.ablations[0]:
                verdict = usage_verdict(
                    own_C,
                    ablated_C,
                    ablation=name,
                    chance=self.settings.chance,
                    margin=self.settings.margin,
                    num_resamples=2000,
                )
                usage = Usage(metrics, verdict.verdict, verdict.sentence)
        return usage

    def _own(
        self, prompts: list[EvalPrompt]
    ) -> tuple[list[Trajectory], list[Tensor | None], dict[str, float]]:
        """Decodes greedily; returns trajectories, embeddings of each row's boxes, and alignment.

        Alignment is `alignment_cosine` of latents and embeddings, and `alignment_hit`, how often
        the nearest visual token is the box's. It says nothing about the latents' quality or use.
        """
        own: list[Trajectory] = []
        ideal: list[Tensor | None] = []
        cosines: list[Tensor] = []
        hits: list[bool] = []
        for batch in self.batches:
            with self.evaluator.encoded_once(prompts[batch]) as visual:
                decoded = self.evaluator.greedy(prompts[batch])
                for prompt, trajectory, visual_MH in zip(
                    prompts[batch], decoded, visual, strict=True
                ):
                    if visual_MH is None or not prompt.roi:
                        ideal.append(None)
                        continue
                    ideal_RH = visual_MH[list(prompt.roi)].cpu()
                    ideal.append(ideal_RH)
                    num = min(len(prompt.roi), len(trajectory.latents))
                    cosines.append(
                        cosine_similarity(trajectory.latents[:num], ideal_RH[:num], dim=-1)
                    )
                    hits += nearest_token_hits(trajectory, prompt.roi, visual_MH.cpu())
            own += decoded
        alignment: dict[str, float] = {}
        if hits:
            alignment["alignment_cosine"] = float(torch.cat(cosines).mean())
            alignment["alignment_hit"] = fmean(hits)
        return own, ideal, alignment

    def _swapped(self, prompts: list[EvalPrompt]) -> list[Trajectory | None]:
        if not any(parse_name(name)[0] == IMAGE_SWAP for name in self.settings.ablations):
            return [None] * len(prompts)
        swapped = with_partners_images(prompts)
        decoded: list[Trajectory] = []
        for batch in self.batches:
            decoded += self.evaluator.greedy(
                [prompt for prompt in swapped[batch] if prompt is not None]
            )
        rest = iter(decoded)
        return [None if prompt is None else next(rest) for prompt in swapped]

    def _ablated(self, inputs: AblationInputs) -> dict[str, list[Trajectory | None]]:
        """Decodes a trajectory a prompt under each ablation, None where it changes nothing."""
        changes = {name: make_changes(name, inputs) for name in self.settings.ablations}
        ablated: dict[str, list[Trajectory | None]] = {name: [] for name in changes}
        for batch in self.batches:
            prompts = inputs.prompts[batch]
            with self.evaluator.encoded_once(prompts):
                for name in changes:
                    wanted = changes[name][batch]
                    changed = [i for i, change in enumerate(wanted) if change is not None]
                    decoded = self.evaluator.greedy(
                        [prompts[i] for i in changed], [wanted[i] for i in changed]
                    )
                    found = dict(zip(changed, decoded, strict=True))
                    ablated[name] += [found.get(i) for i in range(len(wanted))]
        return ablated

    def _drift(self, own: list[Trajectory], is_start: bool) -> dict[str, float]:
        """Measures how far the latents are from the start's, prompt by prompt and step by step."""
        if self.reference is None:
            return {}
        if is_start:
            write_bytes(self.reference, pack(own))
        if not self.reference.is_file():
            return {}
        start = _read_start(self.reference)
        same = len(start) == len(own) and all(
            torch.equal(a.prompt_ids, b.prompt_ids) for a, b in zip(start, own, strict=True)
        )
        if not same:
            raise DataError(
                "the latents of the start are of other prompts",
                where=str(self.reference),
                got=f"{len(start)} prompts",
                expected=f"the first {len(own)} rows of data.val_files, as at the start",
                fix="Delete the file; drift is then left out until a run starts anew.",
            )
        return drift(own, start)


def _read_start(path: Path) -> list[Trajectory]:
    try:
        return [trajectory for trajectory in unpack(path.read_bytes()) if trajectory is not None]
    except UNREADABLE as error:
        raise DataError(
            "the latents of the start cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="a file of this program",
            fix="Delete the file; drift is then left out until a run starts anew.",
        ) from error


def drift(own: Sequence[Trajectory], start: Sequence[Trajectory]) -> dict[str, float]:
    """Averages cosine and |z - z0| / |z0| over latent steps that both have; {} without any.

    They are `drift_cosine` and `drift_relative`.
    """
    pairs = [
        (a.latents[:n], b.latents[:n])
        for a, b in zip(own, start, strict=True)
        for n in [common(a, b)]
        if n
    ]
    if not pairs:
        return {}
    now_NH, then_NH = (torch.cat(side) for side in zip(*pairs, strict=True))
    relative_N = (now_NH - then_NH).norm(dim=-1) / then_NH.norm(dim=-1).clamp(min=1e-12)
    return {
        "drift_cosine": float(cosine_similarity(now_NH, then_NH, dim=-1).mean()),
        "drift_relative": float(relative_N.mean()),
    }


def common(a: Trajectory, b: Trajectory) -> int:
    """Counts the latent steps that both trajectories have."""
    return min(len(a.latents), len(b.latents))
