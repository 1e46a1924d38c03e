"""The rows of one batch while they decode: what `HFRolloutEngine` runs, step by step.

    choose    plan kinds ▸ sample tokens ▸ make vectors ▸ record: what stands next in each row
    forward   its input vectors ▸ the hidden states that decide the position after it

Where steps are static (a device that works behind the host), `choose` computes all rows and waits
for nothing: the host learns a step late which rows have stopped and which vectors were made.

Legend: N rows still decoding, M some of them, S positions so far, T completion positions, H
hidden, V vocabulary, K kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.latent.mechanisms import UNBOUNDED, HiddenSource
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.positions import with_components
from grpo_latent.models.visibility import GrowingVisibility
from grpo_latent.rollout.chosen_rows import ChosenRows
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.progress import LateProgress, MadeVectors, Progress
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.recorder import LIMIT, Recorder, with_slots
from grpo_latent.rollout.sampling import latent_uniforms, sample, seed_bits, uniforms
from grpo_latent.rollout.start import Start, rows_of_prompts
from grpo_latent.rollout.steps import GrowingSteps, StaticSteps
from grpo_latent.rollout.token_rules import TokenRules
from grpo_latent.trajectory import PositionKind, Trajectory


@dataclass
class DecodingRows(RowTensors):
    """What is known of each row that still decodes.

    Attributes:
        record_N: int64, its row in the records.
        seed_N: int64, the bits of its seed.
        done_N: bool, rows that have stopped and idle along as text rows.
        limit_N: int64, positions that it may take; None where all may take as many.
        next_position_N: int64, position id of its first completion position.
        uniforms_NT: float64, what its tokens are drawn by.
        blind_after_span_N: bool, text after its first span does not see the image; None where no
            row wants that.
        last_kinds_N: int64, what was chosen last.
    """

    record_N: Tensor
    seed_N: Tensor
    done_N: Tensor
    limit_N: Tensor | None
    next_position_N: Tensor
    uniforms_NT: Tensor
    blind_after_span_N: Tensor | None
    last_kinds_N: Tensor


class DecodingBatch:
    """`choose` a position for every row, `forward` it, and so on; then `trajectories`.

    Rows that have stopped stay, as idle text rows, until half of the batch has.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        rules: TokenRules,
        requests: list[RolloutRequest],
        sampling: SamplingParams,
        treatment: Treatment,
        start: Start,
        steps: GrowingSteps | StaticSteps,
    ):
        self.adapter = adapter
        self.mechanism = adapter.mechanism
        self.rules = rules
        self.sampling = sampling
        self.treatment = treatment
        self.start = start
        self.steps = steps
        device = adapter.device
        length = sampling.max_new_tokens
        row_to_prompt_N = rows_of_prompts(requests, device)
        # another index than the prompt's where drawn slots gave each row a prefill of its own
        row_to_prefill_N = start.row_to_prefill_N
        prefill = start.prefill
        self.prompt_length = prefill.kinds_BP.shape[1]
        steps.begin(prefill.cache, row_to_prefill_N, self.prompt_length + length)
        self.hidden_NH = prefill.hidden_BH[row_to_prefill_N]
        seeds = [seed for request in requests for seed in request.seeds]
        counts = [counts_B[row_to_prompt_N] for counts_B in self._span_counts(requests, device)]
        self.state = self.mechanism.begin(adapter.model, *counts)
        self.override = OverrideTable(requests, row_to_prompt_N, adapter.hidden_size)
        blind_B = torch.tensor([request.blind_after_span for request in requests], device=device)
        self.rows = DecodingRows(
            record_N=torch.arange(row_to_prompt_N.shape[0], device=device),
            seed_N=seed_bits(seeds).to(device),
            done_N=torch.zeros_like(row_to_prompt_N, dtype=torch.bool),
            limit_N=start.limits_N,
            next_position_N=prefill.next_position_B[row_to_prefill_N],
            uniforms_NT=uniforms(np.array(seeds, dtype=np.uint64)[:, None], np.arange(length)).to(
                device
            ),
            # None, not all False: the bias then needs no second form (`may_blind`)
            blind_after_span_N=blind_B[row_to_prompt_N] if bool(blind_B.any()) else None,
            last_kinds_N=torch.full_like(row_to_prompt_N, int(PositionKind.PROMPT)),
        )
        self.visibility = GrowingVisibility(
            prefill.kinds_BP[row_to_prefill_N],
            prefill.valid_BP[row_to_prefill_N],
            self.prompt_length + length,
            self.mechanism.visibility,
            adapter.dtype,
            may_blind=self.rows.blind_after_span_N is not None,
        )
        self.recorder = Recorder(row_to_prompt_N.shape[0], length, device)
        self.progress = (LateProgress if steps.is_static else Progress)(self.recorder)

    def _span_counts(
        self, requests: list[RolloutRequest], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Latent steps a span, and spans that may be opened, of each prompt."""
        steps = [
            self.mechanism.steps if request.steps is None else request.steps
            for request in requests
        ]
        max_spans = [
            self.mechanism.max_spans if request.max_spans is None else request.max_spans
            for request in requests
        ]
        max_spans = [UNBOUNDED if value is None else value for value in max_spans]
        return torch.tensor(steps, device=device), torch.tensor(max_spans, device=device)

    # ---- choosing a position ---------------------------------------------------------------

    def choose(self, position: int) -> Tensor | None:
        """Decides and records `position` of every row.

        Returns:
            the input vectors [N, H] of the rows that are left, None when no row goes on.
        """
        # logits of all rows only where steps are static, or for a mechanism that plans by them:
        # rows inside a span need none
        needs_all = self.steps.is_static or self.mechanism.reads_logits
        logits_NV = self.adapter.logits(self.hidden_NH) if needs_all else None
        # a row that has stopped idles as text: it must make, and record, no vector
        planned_N = self.state.plan(logits_NV).masked_fill(
            self.rows.done_N, int(PositionKind.TEXT)
        )
        token_ids_N, full_N, drawn_N = self._sample_text(position, planned_N, logits_NV)
        rows = self._rows_of(self.rules.is_made_K[planned_N])
        made = None if rows.is_none else self._make(rows, position, planned_N, logits_NV)
        if made is not None and made.densities_M is not None:
            # the treatment takes latents as actions: their density stands where a token's
            # log-prob would
            full_N = rows.put(full_N, made.densities_M)
            drawn_N = rows.put(drawn_N, made.densities_M)
        kinds_N = self._advance(planned_N, token_ids_N, made)
        if self.mechanism.feeds_start:
            made = self._feed_starts(position, kinds_N, logits_NV, made)
        ends_N = self._note_ends(position, kinds_N, token_ids_N)
        self.recorder.add(
            position, self.rows.record_N, kinds_N, token_ids_N, full_N, drawn_N, ends_N
        )
        is_going_on = self.progress.tell(self.rows.done_N, made)
        if position + 1 == self.sampling.max_new_tokens or not is_going_on:
            return None
        self.rows.last_kinds_N = kinds_N
        return self._drop_stopped_rows(self._fed(token_ids_N, made))

    def _rows_of(self, mask_N: Tensor) -> ChosenRows:
        return ChosenRows.of(mask_N, self.steps.is_static)

    def _sample_text(
        self, position: int, planned_N: Tensor, logits_NV: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Token ids and both log-probs, each [N]: placeholders and 0 where nothing is sampled."""
        token_ids_N = self.rules.placeholder_ids_K[planned_N]
        rows = self._rows_of(self.rules.is_text_K[planned_N] & ~self.rows.done_N)
        if rows.is_none:
            nothing = torch.zeros(planned_N.shape, device=planned_N.device)
            return token_ids_N, nothing, nothing
        if logits_NV is None:
            logits_MV = self.adapter.logits(
                self.hidden_NH if rows.is_all else rows.take(self.hidden_NH)
            )
        else:
            logits_MV = logits_NV if rows.is_all else rows.take(logits_NV)
        may_not_open_M = torch.zeros_like(planned_N[:1])
        if self.state.is_bounded:  # otherwise one row of rules serves all
            may_not_open_M = (~rows.take(self.state.may_open_N)).long()
        bans = self.rules.bans_2.rows(may_not_open_M)
        sampling = self.sampling
        draws_M = rows.take(self.rows.uniforms_NT[:, position])
        picked = sample(
            logits_MV, draws_M, sampling.temperature, sampling.top_k, sampling.top_p, bans
        )
        if rows.is_all:
            return picked
        zeros = torch.zeros(planned_N.shape, device=planned_N.device)
        targets = zip((token_ids_N, zeros, zeros), picked, strict=True)
        return tuple(rows.put(target, values) for target, values in targets)

    def _make(
        self, rows: ChosenRows, position: int, planned_N: Tensor, logits_NV: Tensor | None
    ) -> MadeVectors:
        """Makes the vectors of `rows`, and scores them if they are actions."""
        hidden_MH = rows.take(self.hidden_NH)
        greedy = self.sampling.temperature == 0
        scale = 1.0 if greedy else self.sampling.temperature

        def logits() -> Tensor:
            """Logits [M, V] of these rows, made for those who ask."""
            # where every token has a vector the logits of all rows are there already; a subset's
            # own would be another matrix product, which rounds differently
            is_there = self.mechanism.composes or self.steps.is_static
            if is_there and logits_NV is not None:
                return rows.take(logits_NV)
            return self.adapter.logits(hidden_MH)

        mean_MH = self.mechanism.make(
            self.adapter.model, HiddenSource(hidden_MH, logits, self.adapter.embed)
        )
        features_MF = self.treatment.features(self.adapter.model, hidden_MH)
        source = LatentSource(mean_MH, lambda: logits().float() / scale, features_MF)
        num_uniforms = 0 if greedy else self.treatment.num_uniforms(hidden_MH.shape[1])
        uniforms_MU = None
        if num_uniforms:
            uniforms_MU = latent_uniforms(rows.take(self.rows.seed_N), position, num_uniforms)
        latents_MH, aux_MA = self.treatment.draw(source, uniforms_MU, self.adapter.embed)
        if not self.override.is_empty:
            latents_MH = self.override.feed(
                rows.rows_M,
                latents_MH[:, None],
                rows.take(planned_N)[:, None],
                rows.is_chosen_M[:, None],
                rows.take(self.state.span_N),
            )[:, 0]
        # after the override: the record holds what was fed, and so does a replay of it
        densities_M = None
        if self.treatment.is_action:
            densities_M = self.treatment.log_density(source, latents_MH, aux_MA)
        return MadeVectors(rows, self.rows.record_N, latents_MH, aux_MA, densities_M)

    def _feed_starts(
        self, position: int, kinds_N: Tensor, logits_NV: Tensor | None, made: MadeVectors | None
    ) -> MadeVectors | None:
        """The vectors of this position with those of rows that open a span."""
        # known only once the token is: the other vectors are made before the state advances
        starts = self._rows_of(kinds_N == PositionKind.FED_START)
        if starts.is_none:
            return made
        of_starts = self._make(starts, position, kinds_N, logits_NV)
        if made is None:
            return of_starts
        rows, latents_MH = made.rows.join(made.latents_MH, starts, of_starts.latents_MH)
        return replace(made, rows=rows, latents_MH=latents_MH)

    def _advance(self, planned_N: Tensor, token_ids_N: Tensor, made: MadeVectors | None) -> Tensor:
        """Final kinds [N], after telling the rows' state what stands at this position."""
        if not self.mechanism.reads_latents or made is None:
            return self.state.advance(planned_N, token_ids_N, None)
        latents_NH = made.rows.put(torch.zeros_like(self.hidden_NH), made.latents_MH)
        return self.state.advance(planned_N, token_ids_N, latents_NH)

    def _note_ends(self, position: int, kinds_N: Tensor, token_ids_N: Tensor) -> Tensor:
        """Marks the rows for which `position` is the last one; int8 [N], why they end there."""
        rows = self.rows
        # kinds decide, not ids alone: a placeholder's id says nothing, and idle rows draw no token
        is_eos_N = self.rules.is_eos_V[token_ids_N] & self.rules.is_text_K[kinds_N] & ~rows.done_N
        rows.done_N = rows.done_N | is_eos_N
        ends_N = is_eos_N.to(torch.int8)  # `EOS`
        if rows.limit_N is not None:
            reaches_limit_N = (rows.limit_N <= position + 1) & ~rows.done_N
            ends_N = ends_N.masked_fill(reaches_limit_N, LIMIT)
            rows.done_N = rows.done_N | reaches_limit_N
        return ends_N

    def _fed(self, token_ids_N: Tensor, made: MadeVectors | None) -> Tensor:
        """Input vectors [N, H] of what was chosen."""
        embeds_NH = self.adapter.embed(token_ids_N)
        if made is None:
            return embeds_NH
        fed_MH = made.latents_MH.to(embeds_NH.dtype)
        if self.mechanism.composes:
            fed_MH = self.mechanism.compose(self.adapter.model, made.rows.take(embeds_NH), fed_MH)
        return made.rows.put(embeds_NH, fed_MH)

    def _drop_stopped_rows(self, embeds_NH: Tensor) -> Tensor:
        """Goes on with fewer rows where half have stopped: input vectors of those that stay."""
        keep_M = self.progress.rows_to_keep()
        if keep_M is None:
            return embeds_NH
        # all that has a row each; `recorder` keeps the rows of the beginning, and `hidden_NH` is
        # made anew by the forward that follows
        self.rows = self.rows.keep(keep_M)
        self.visibility.keep_rows(keep_M)
        self.state.keep_rows(keep_M)
        self.steps.keep_rows(keep_M)
        self.override.keep_rows(keep_M)
        return embeds_NH[keep_M]

    # ---- feeding it ------------------------------------------------------------------------

    def forward(self, position: int, embeds_NH: Tensor) -> None:
        """Feeds `position`, which makes the hidden states that decide the next one."""
        rows = self.rows
        is_before_latent_N = ~self.state.is_last_latent_N if self.visibility.has_sighted else None
        is_blind_N = None
        if rows.blind_after_span_N is not None:
            is_blind_N = rows.blind_after_span_N & self.state.is_after_span_N
        bias_NS = self.visibility.see(rows.last_kinds_N, is_before_latent_N, is_blind_N)
        position_ids = with_components(
            (rows.next_position_N + position)[:, None], self.adapter.has_mrope
        )
        self.hidden_NH = self.steps.run(embeds_NH, bias_NS, position_ids)

    def trajectories(
        self, requests: list[RolloutRequest], policy_version: int
    ) -> list[list[Trajectory]]:
        """What was recorded, on the CPU."""
        self.progress.finish()
        self.steps.end()
        sizes = self.adapter.hidden_size, self.treatment.aux_size
        groups = self.recorder.trajectories(requests, policy_version, *sizes)
        if self.start.records is None:
            return groups
        # one record a row, in the order of requests and seeds, as the groups are
        records = iter(self.start.records)
        placeholder_id = self.mechanism.placeholder_id(PositionKind.LATENT)
        return [
            [with_slots(trajectory, next(records), placeholder_id) for trajectory in group]
            for group in groups
        ]
