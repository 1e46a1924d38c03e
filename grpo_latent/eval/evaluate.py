"""A checkpoint on prompts: how right it is, what its latents look like, and whether they are used.

prompts ──greedy──▶ own ──┬─ accuracy, latent statistics, hit, leak
   │                      └─ ablations: changed requests ──greedy──▶ accuracy, follow, verdicts
   ├──────sampled──▶ accuracy, pass@k
   └──further decodings──▶ the same

Each is a phase, done batch by batch; the journal keeps each batch that a phase has finished.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field

from torch import Tensor

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import (
    IMAGE_SWAP,
    SHUFFLE,
    AblationInputs,
    Changes,
    make_changes,
    parse_name,
)
from grpo_latent.eval.alignment import nearest_token_hits
from grpo_latent.eval.decode import GREEDY, Decoding, Evaluator, with_partners_images
from grpo_latent.eval.donors import donors, with_truth_of
from grpo_latent.eval.journal import Journal, PhaseBatch
from grpo_latent.eval.leak import leak
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.report import Findings, build_report
from grpo_latent.eval.scoring import Outcome, Scorer
from grpo_latent.eval.verdict import VerdictSettings
from grpo_latent.latent.treatments import Mask, Treatment
from grpo_latent.models.loading import LatentModel
from grpo_latent.trajectory import Trajectory

OWN, SAMPLED, SWAPPED = "own", "sampled", "swapped images"


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation decodes, ablates and decides by.

    Attributes:
        max_new_tokens: positions of a completion, latents included.
        num_sampled: trajectories a prompt for the sampled accuracy, 0 for none.
        temperature, top_k, top_p: of the sampled ones.
        decodings: further strategies.
        ablations: names of `eval.ablations.ABLATIONS`, or `name@part`.
        leak_prompts: prompts of the leak test, 0 for none.
        prompts_per_batch: prompts decoded together, and kept encoded together.
        treatment: what RL made of latents; greedy trajectories take its mode, sampled ones its
            noise.
    """

    max_new_tokens: int
    num_sampled: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    decodings: tuple[Decoding, ...] = ()
    ablations: tuple[str, ...] = ("zero", "noise", "shuffle", "oracle")
    leak_prompts: int = 64
    seed: int = 0
    prompts_per_batch: int = 256
    verdict: VerdictSettings = field(default_factory=VerdictSettings)
    treatment: Treatment = field(default_factory=Mask)

    def __post_init__(self):
        for name, minimum in (("leak_prompts", 0), ("prompts_per_batch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ConfigError(
                    "not a valid count", where=name, got=value, expected=f"int >= {minimum}"
                )
        for name in self.ablations:
            parse_name(name)
        for decoding in (self.sampled, *self.decodings):
            decoding.params(self.max_new_tokens)

    @property
    def sampled(self) -> Decoding:
        return Decoding(SAMPLED, self.num_sampled, self.temperature, self.top_k, self.top_p)

    def phases(self) -> list[str]:
        names = [
            OWN,
            *([SAMPLED] if self.num_sampled else []),
            *(decoding.name for decoding in self.decodings),
        ]
        return names + ([SWAPPED] if self.needs_swapped else []) + list(self.ablations)

    @property
    def needs_swapped(self) -> bool:
        return any(parse_name(name)[0] == IMAGE_SWAP for name in self.ablations)


class Evaluation:
    """One evaluation.

    Args:
        progress: called with the phase and the number of prompts that went through it.
        journal: of batches that are done; None keeps none.
    """

    def __init__(
        self,
        loaded: LatentModel,
        prompts: Sequence[EvalPrompt],
        scorer: Scorer,
        settings: EvalSettings,
        progress: Callable[[str, int], None] = lambda phase, num_prompts: None,
        max_batch_rows: int = 512,
        journal: Journal | None = None,
    ):
        self.prompts = prompts
        self.scorer = scorer
        self.settings = settings
        self.progress = progress
        self.evaluator = Evaluator(
            loaded, settings.max_new_tokens, settings.seed, max_batch_rows, settings.treatment
        )
        self.mechanism = loaded.mechanism
        self.journal = journal or Journal(None, {})
        size = settings.prompts_per_batch
        self.batches = [slice(start, start + size) for start in range(0, len(prompts), size)]
        for decoding in settings.decodings:  # what cannot run fails before anything has
            self.evaluator.engine(decoding)

    def run(self) -> dict:
        """Computes all results as one JSON-ready dict; `grpo_latent.evaluate` lists its keys."""
        started = time.monotonic()
        settings = self.settings
        findings = Findings(self.prompts, settings.verdict)
        own, ideal = self._decode_all(findings)
        inputs = AblationInputs(
            self.prompts, own, ideal, self.mechanism, settings.seed, self._swapped()
        )
        # made of all prompts before any is ablated: a donor may stand in another batch
        changes = {name: make_changes(name, inputs) for name in settings.ablations}
        sources = donors(
            [len(t.latents) for t in own], [p.cluster for p in self.prompts], settings.seed
        )
        ablated: dict[str, list[PhaseBatch]] = {name: [] for name in settings.ablations}
        # batches outside, ablations inside: the images of a batch are encoded once for all
        for batch_idx, batch in enumerate(self.batches):
            with self._encoded_once(batch, settings.ablations, batch_idx):
                for name in settings.ablations:
                    ablated[name].append(self._ablated(name, changes[name], sources, batch_idx))
        for name in settings.ablations:
            is_changed = [change is not None for change in changes[name]]
            findings.add_ablation(name, ablated[name], is_changed)
        if settings.leak_prompts:
            findings.leak = leak(
                self.evaluator.adapter,
                self.prompts,
                own,
                self.mechanism.visibility,
                settings.leak_prompts,
            )
        return build_report(findings) | {"seconds": time.monotonic() - started}

    def _done(self, phase: str, batch_idx: int, make: Callable[[], PhaseBatch]) -> PhaseBatch:
        """Reads a batch of a phase from the journal, or makes it and writes it there."""
        done = self.journal.load(phase, batch_idx)
        if done is None:
            done = make()
            self.journal.save(phase, batch_idx, done)
        self.progress(phase, len(done.outcomes))
        return done

    def _encoded_once(
        self, batch: slice, phases: Sequence[str], batch_idx: int
    ) -> AbstractContextManager:
        """Encodes the images of a batch for some phases; not where all of them are done."""
        if all(self.journal.has(phase, batch_idx) for phase in phases):
            return nullcontext()
        return self.evaluator.encoded_once(self.prompts[batch])

    def _scored(
        self, prompts: Sequence[EvalPrompt], groups: Sequence[Sequence[Trajectory]]
    ) -> list[list[Outcome]]:
        rows = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        outcomes = iter(
            self.scorer(rows, [trajectory for group in groups for trajectory in group])
        )
        return [[next(outcomes) for _ in group] for group in groups]

    def _decode_all(self, findings: Findings) -> tuple[list[Trajectory], list[Tensor | None]]:
        """Runs all decodings; returns greedy trajectories and embeddings of each row's boxes."""
        settings = self.settings
        others = ([settings.sampled] if settings.num_sampled else []) + list(settings.decodings)
        own: list[Trajectory] = []
        ideal: list[Tensor | None] = []
        done: dict[Decoding, list[PhaseBatch]] = {decoding: [] for decoding in (GREEDY, *others)}
        for batch_idx, batch in enumerate(self.batches):
            prompts = self.prompts[batch]
            with self.evaluator.encoded_once(prompts) as visual:
                for decoding, batches in done.items():
                    batches.append(self._decoded(decoding, batch_idx))
            kept = done[GREEDY][-1].trajectories
            for prompt, trajectory, visual_MH in zip(prompts, kept, visual, strict=True):
                assert trajectory is not None, "the greedy phase decodes every prompt"
                own.append(trajectory)
                if visual_MH is None or not prompt.roi:
                    ideal.append(None)
                    continue
                ideal.append(visual_MH[list(prompt.roi)].cpu())
                findings.hits += nearest_token_hits(trajectory, prompt.roi, visual_MH.cpu())
        findings.add_own(own, done[GREEDY])
        for decoding in others:
            findings.add_decoding(decoding, done[decoding])
        return own, ideal

    def _decoded(self, decoding: Decoding, batch_idx: int) -> PhaseBatch:
        """Decodes a batch; keeps the trajectories of the plain greedy decoding for ablations."""
        prompts = self.prompts[self.batches[batch_idx]]

        def make() -> PhaseBatch:
            started = time.perf_counter()
            groups = self.evaluator.generate(prompts, decoding)
            seconds = time.perf_counter() - started
            num_tokens = sum(len(trajectory.token_ids) for group in groups for trajectory in group)
            first = [group[0] for group in groups] if decoding is GREEDY else []
            # behind the clock: `seconds` is what decoding takes, not the reward
            outcomes = self._scored(prompts, groups)
            return PhaseBatch(outcomes, num_tokens, seconds, trajectories=first)

        return self._done(OWN if decoding is GREEDY else decoding.name, batch_idx, make)

    def _swapped(self) -> list[Trajectory | None]:
        """Decodes greedily with the images of other prompts, where an ablation needs that."""
        if not self.settings.needs_swapped:
            return [None] * len(self.prompts)
        swapped = with_partners_images(self.prompts)
        trajectories: list[Trajectory | None] = []
        for batch_idx, batch in enumerate(self.batches):
            rows = swapped[batch]

            def make(rows: list[EvalPrompt | None] = rows) -> PhaseBatch:
                present = [row for row in rows if row is not None]
                with self.evaluator.encoded_once(present):
                    decoded = iter(self.evaluator.greedy(present))
                kept = [None if row is None else next(decoded) for row in rows]
                return PhaseBatch([[] for _ in rows], 0, 0.0, trajectories=kept)

            trajectories += self._done(SWAPPED, batch_idx, make).trajectories
        return trajectories

    def _ablated(
        self, name: str, changes: Changes, sources: list[int | None], batch_idx: int
    ) -> PhaseBatch:
        batch = self.batches[batch_idx]
        prompts = self.prompts[batch]
        changes = changes[batch]

        def make() -> PhaseBatch:
            changed = [i for i, change in enumerate(changes) if change is not None]
            rows = [prompts[i] for i in changed]
            started = time.perf_counter()
            decoded = self.evaluator.greedy(rows, [changes[i] for i in changed])
            seconds = time.perf_counter() - started
            outcomes: list[list[Outcome]] = [[] for _ in prompts]
            for i, outcome in zip(changed, self.scorer(rows, decoded), strict=True):
                outcomes[i] = [outcome]
            follow = self._follow(batch, changed, decoded, sources) if name == SHUFFLE else None
            num_tokens = sum(len(trajectory.token_ids) for trajectory in decoded)
            return PhaseBatch(outcomes, num_tokens, seconds, follow)

        return self._done(name, batch_idx, make)

    def _follow(
        self,
        batch: slice,
        changed: list[int],
        decoded: list[Trajectory],
        sources: Sequence[int | None],
    ) -> list[float | None] | None:
        """Says whether each shuffled answer is right for its donor.

        None where that cannot be told: a letter means another option in another question.
        """
        if any(prompt.item is not None and prompt.item.options for prompt in self.prompts):
            return None
        donated = with_truth_of(self.prompts, sources)[batch]
        follow: list[float | None] = [None] * len(donated)
        for i, outcome in zip(
            changed, self.scorer([donated[i] for i in changed], decoded), strict=True
        ):
            follow[i] = outcome.correct
        return follow


class PromptsDigest:
    """A digest of prompts in order, their pixels included, made while they are read."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, prompt: EvalPrompt) -> None:
        text = json.dumps([prompt.row_id, prompt.prompt_ids.tolist(), str(prompt.ground_truth)])
        self._digest.update(text.encode())
        # the pixels too: the file that a path names may be another one next time
        if prompt.images is not None:
            self._digest.update(prompt.images.pixel_values.float().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def fingerprint(loaded: LatentModel, prompts: PromptsDigest, settings: EvalSettings) -> dict:
    """Says what an evaluation depends on besides weights and reward.

    That is settings, latents and prompts.
    """
    return {
        # as the journal's file has them: tuples become lists
        "settings": json.loads(json.dumps(asdict(settings)))
        # its class as well, of which `asdict` keeps the fields only
        | {"treatment": repr(settings.treatment)},
        "latent_config": loaded.mechanism.to_dict(),
        "prompts": prompts.hexdigest(),
    }
