"""The rows of one batch while they decode: what `HFRolloutEngine` runs, step by step.

    choose    plan kinds ▸ sample tokens ▸ make vectors ▸ record: what stands next in each row
    forward   its input vectors ▸ the hidden states that decide the position after it

Legend: N rows still decoding, M some of them, S positions so far, T completion positions, H
hidden, V vocabulary, K kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_latent.common.row_tensors import RowTensors
from grpo_latent.latent.mechanisms import UNBOUNDED, HiddenSource, Mechanism
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.kv_cache import RolloutCache
from grpo_latent.models.positions import with_components
from grpo_latent.models.visibility import GrowingVisibility
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.recorder import Recorder, with_slots
from grpo_latent.rollout.sampling import Bans, latent_uniforms, sample, seed_bits, uniforms
from grpo_latent.rollout.start import Start, rows_of_prompts
from grpo_latent.trajectory import PositionKind, Trajectory, is_text, made_mask


@dataclass(frozen=True)
class TokenRules:
    """What token ids and kinds mean while decoding.

    Attributes:
        bans_2: never sampled; the second row is for trajectories that may not open another span.
        is_eos_V: bool [V].
        placeholder_ids_K: int64, by `PositionKind`: the id that stands where nothing is sampled.
        is_text_K, is_made_K: bool, by `PositionKind`: a token is sampled there; a vector is made
            there.
    """

    bans_2: Bans
    is_eos_V: Tensor
    placeholder_ids_K: Tensor
    is_text_K: Tensor
    is_made_K: Tensor

    @classmethod
    def build(
        cls,
        mechanism: Mechanism,
        eos_ids: Iterable[int],
        banned_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> TokenRules:
        """The rules of a mechanism, whose `opening_ids` are banned where no span may open."""
        is_eos_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        is_eos_V[sorted(eos_ids)] = True
        kinds_K = torch.arange(len(PositionKind), device=device)
        placeholder_ids = [mechanism.placeholder_id(kind) for kind in PositionKind]
        return cls(
            Bans.build(banned_ids, mechanism.opening_ids, device),
            is_eos_V,
            torch.tensor(placeholder_ids, device=device),
            is_text(kinds_K),
            made_mask(kinds_K),
        )


@dataclass
class DecodingRows(RowTensors):
    """What is known of each row that still decodes.

    Attributes:
        record_N: int64, its row in the records.
        done_N: bool, rows that have stopped and idle along as text rows.
        limit_N: int64, positions that it may take; None where all may take as many.
        next_position_N: int64, position id of its first completion position.
        uniforms_NT: float64, what its tokens are drawn by.
        blind_after_span_N: bool, text after its first span does not see the image; None where no
            row wants that.
        last_kinds_N: int64, what was chosen last.
    """

    record_N: Tensor
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
    ):
        self.adapter = adapter
        self.mechanism = adapter.mechanism
        self.rules = rules
        self.sampling = sampling
        self.treatment = treatment
        self.start = start
        device = adapter.device
        length = sampling.max_new_tokens
        row_to_prompt_N = rows_of_prompts(requests, device)
        # another index than the prompt's where drawn slots gave each row a prefill of its own
        row_to_prefill_N = start.row_to_prefill_N
        prefill = start.prefill
        self.prompt_length = prefill.kinds_BP.shape[1]
        self.cache = RolloutCache(prefill.cache, row_to_prefill_N, self.prompt_length + length)
        self.hidden_NH = prefill.hidden_BH[row_to_prefill_N]
        seeds = [seed for request in requests for seed in request.seeds]
        self.seeds_R = seed_bits(seeds).to(device)
        counts = [counts_B[row_to_prompt_N] for counts_B in self._span_counts(requests, device)]
        self.state = self.mechanism.begin(adapter.model, *counts)
        self.override = OverrideTable(requests, row_to_prompt_N, adapter.hidden_size)
        blind_B = torch.tensor([request.blind_after_span for request in requests], device=device)
        self.rows = DecodingRows(
            record_N=torch.arange(row_to_prompt_N.shape[0], device=device),
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
        # logits of all rows only for a mechanism that plans by them: rows inside a span need none
        logits_NV = self.adapter.logits(self.hidden_NH) if self.mechanism.reads_logits else None
        # a row that has stopped idles as text: it must make, and record, no vector
        planned_N = self.state.plan(logits_NV).masked_fill(
            self.rows.done_N, int(PositionKind.TEXT)
        )
        token_ids_N, full_N, drawn_N = self._sample_text(position, planned_N, logits_NV)
        made_rows_M = self.rules.is_made_K[planned_N].nonzero()[:, 0]
        latents_MH = None
        if made_rows_M.numel():
            latents_MH, densities_M = self._make(made_rows_M, position, planned_N, logits_NV)
            if densities_M is not None:
                # the treatment takes latents as actions: their density stands where a token's
                # log-prob would
                full_N = full_N.index_copy(0, made_rows_M, densities_M)
                drawn_N = drawn_N.index_copy(0, made_rows_M, densities_M)
        kinds_N = self._advance(planned_N, token_ids_N, made_rows_M, latents_MH)
        if self.mechanism.feeds_start:
            made_rows_M, latents_MH = self._feed_starts(
                position, kinds_N, logits_NV, made_rows_M, latents_MH
            )
        self.recorder.add(position, self.rows.record_N, kinds_N, token_ids_N, full_N, drawn_N)
        self._note_ends(position, kinds_N, token_ids_N)
        num_active = int((~self.rows.done_N).sum())
        if position + 1 == self.sampling.max_new_tokens or num_active == 0:
            return None
        self.rows.last_kinds_N = kinds_N
        embeds_NH = self._fed(token_ids_N, made_rows_M, latents_MH)
        # dropping rows copies the keys and values of all that stay, so not at every stop
        if num_active * 2 <= self.rows.done_N.shape[0]:
            return self._drop_stopped_rows(embeds_NH)
        return embeds_NH

    def _sample_text(
        self, position: int, planned_N: Tensor, logits_NV: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Token ids and both log-probs, each [N]: placeholders and 0 where nothing is sampled."""
        token_ids_N = self.rules.placeholder_ids_K[planned_N]
        rows_M = (self.rules.is_text_K[planned_N] & ~self.rows.done_N).nonzero()[:, 0]
        if rows_M.numel() == 0:
            nothing = torch.zeros(planned_N.shape, device=planned_N.device)
            return token_ids_N, nothing, nothing
        is_all = rows_M.numel() == planned_N.numel()
        if logits_NV is None:
            logits_MV = self.adapter.logits(self.hidden_NH if is_all else self.hidden_NH[rows_M])
        else:
            logits_MV = logits_NV if is_all else logits_NV[rows_M]
        may_not_open_M = torch.zeros_like(rows_M[:1])
        if self.state.is_bounded:  # otherwise one row of rules serves all
            may_not_open_M = (~self.state.may_open_N[rows_M]).long()
        bans = self.rules.bans_2.rows(may_not_open_M)
        sampling = self.sampling
        draws_M = self.rows.uniforms_NT[rows_M, position]
        picked = sample(
            logits_MV, draws_M, sampling.temperature, sampling.top_k, sampling.top_p, bans
        )
        if is_all:
            return picked
        zeros = torch.zeros(planned_N.shape, device=planned_N.device)
        targets = zip((token_ids_N, zeros, zeros), picked, strict=True)
        return tuple(target.index_copy(0, rows_M, values) for target, values in targets)

    def _make(
        self, rows_M: Tensor, position: int, planned_N: Tensor, logits_NV: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Makes and records the vectors [M, H] of `rows_M`, and scores them if they are actions.

        Returns:
            the vectors as fed, and their log-densities [M] or None.
        """
        hidden_MH = self.hidden_NH[rows_M]
        greedy = self.sampling.temperature == 0
        scale = 1.0 if greedy else self.sampling.temperature

        def logits() -> Tensor:
            """Logits [M, V] of these rows, made for those who ask."""
            # where every token has a vector the logits of all rows are there already; a subset's
            # own would be another matrix product, which rounds differently
            if self.mechanism.composes and logits_NV is not None:
                return logits_NV[rows_M]
            return self.adapter.logits(hidden_MH)

        mean_MH = self.mechanism.make(
            self.adapter.model, HiddenSource(hidden_MH, logits, self.adapter.embed)
        )
        features_MF = self.treatment.features(self.adapter.model, hidden_MH)
        source = LatentSource(mean_MH, lambda: logits().float() / scale, features_MF)
        num_uniforms = 0 if greedy else self.treatment.num_uniforms(hidden_MH.shape[1])
        uniforms_MU = None
        if num_uniforms:
            # by record row: rows move up when others are dropped, seeds stay with trajectories
            seeds_M = self.seeds_R[self.rows.record_N[rows_M]]
            uniforms_MU = latent_uniforms(seeds_M, position, num_uniforms)
        latents_MH, aux_MA = self.treatment.draw(source, uniforms_MU, self.adapter.embed)
        if not self.override.is_empty:
            kinds_M1 = planned_N[rows_M][:, None]
            used_M1 = torch.ones_like(kinds_M1, dtype=torch.bool)
            spans_M = self.state.span_N[rows_M]
            latents_MH = self.override.feed(
                rows_M, latents_MH[:, None], kinds_M1, used_M1, spans_M
            )[:, 0]
        # after the override: the record holds what was fed, and so does a replay of it
        self.recorder.add_latents(self.rows.record_N[rows_M], latents_MH, aux_MA)
        if not self.treatment.is_action:
            return latents_MH, None
        return latents_MH, self.treatment.log_density(source, latents_MH, aux_MA)

    def _feed_starts(
        self,
        position: int,
        kinds_N: Tensor,
        logits_NV: Tensor | None,
        made_rows_M: Tensor,
        latents_MH: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows with a vector at this position, and the vectors, with those that open a span."""
        # known only once the token is: the other vectors are made before the state advances
        rows_S = (kinds_N == PositionKind.FED_START).nonzero()[:, 0]
        if not rows_S.numel():
            return made_rows_M, latents_MH
        vectors_SH, _ = self._make(rows_S, position, kinds_N, logits_NV)
        if latents_MH is None:
            return rows_S, vectors_SH
        return torch.cat([made_rows_M, rows_S]), torch.cat([latents_MH, vectors_SH])

    def _advance(
        self,
        planned_N: Tensor,
        token_ids_N: Tensor,
        made_rows_M: Tensor,
        latents_MH: Tensor | None,
    ) -> Tensor:
        """Final kinds [N], after telling the rows' state what stands at this position."""
        if not self.mechanism.reads_latents or latents_MH is None:
            return self.state.advance(planned_N, token_ids_N, None)
        latents_NH = torch.zeros_like(self.hidden_NH).index_copy(0, made_rows_M, latents_MH)
        return self.state.advance(planned_N, token_ids_N, latents_NH)

    def _note_ends(self, position: int, kinds_N: Tensor, token_ids_N: Tensor) -> None:
        """Marks the rows for which `position` is the last one."""
        rows = self.rows
        # kinds decide, not ids alone: a placeholder's id says nothing, and idle rows draw no token
        is_eos_N = self.rules.is_eos_V[token_ids_N] & self.rules.is_text_K[kinds_N] & ~rows.done_N
        self.recorder.stop(position, rows.record_N[is_eos_N])
        rows.done_N = rows.done_N | is_eos_N
        if rows.limit_N is not None:
            reaches_limit_N = (rows.limit_N <= position + 1) & ~rows.done_N
            self.recorder.end(position, rows.record_N[reaches_limit_N])
            rows.done_N = rows.done_N | reaches_limit_N

    def _fed(self, token_ids_N: Tensor, made_rows_M: Tensor, latents_MH: Tensor | None) -> Tensor:
        """Input vectors [N, H] of what was chosen."""
        embeds_NH = self.adapter.embed(token_ids_N)
        if latents_MH is None:
            return embeds_NH
        fed_MH = latents_MH.to(embeds_NH.dtype)
        if self.mechanism.composes:
            fed_MH = self.mechanism.compose(self.adapter.model, embeds_NH[made_rows_M], fed_MH)
        return embeds_NH.index_copy(0, made_rows_M, fed_MH)

    def _drop_stopped_rows(self, embeds_NH: Tensor) -> Tensor:
        """Goes on with the rows that have not stopped: their input vectors."""
        # all that has a row each; `recorder` and `seeds_R` keep the rows of the beginning, and
        # `hidden_NH` is made anew by the forward that follows
        keep_M = (~self.rows.done_N).nonzero()[:, 0]
        self.rows = self.rows.keep(keep_M)
        self.visibility.keep_rows(keep_M)
        self.state.keep_rows(keep_M)
        self.cache.keep_rows(keep_M)
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
        self.hidden_NH = self.adapter.decode_hidden(
            embeds_NH, bias_NS[:, None, None], position_ids, self.cache
        )

    def trajectories(
        self, requests: list[RolloutRequest], policy_version: int
    ) -> list[list[Trajectory]]:
        """What was recorded, on the CPU."""
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
