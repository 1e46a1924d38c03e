"""The rows of one batch while they decode: what `HFRolloutEngine` runs, step by step.

Legend: B prompts, P prompt positions, N rows still decoding, M some of them, S positions so far, T completion positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_latent.latent.config import LatentConfig
from grpo_latent.latent.lvr import UNBOUNDED, SpanState
from grpo_latent.latent.treatments import LatentSource, Treatment
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.head import end_vector, feedback
from grpo_latent.models.kv_cache import RolloutCache
from grpo_latent.models.positions import with_components
from grpo_latent.models.visibility import GrowingVisibility
from grpo_latent.rollout.override import OverrideTable
from grpo_latent.rollout.prefill import Prefill, prefill_prompts
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import latent_uniforms, sample, uniforms
from grpo_latent.trajectory import PositionKind, Trajectory


@dataclass(frozen=True)
class TokenRules:
    """What token ids mean while decoding.

    Attributes:
        banned_2V: bool [2, V], never sampled; the second row is for trajectories that may not open another span.
        is_eos_V: bool [V].
        placeholder_ids: int64, by `PositionKind`: the id that stands where nothing is sampled.
    """

    banned_2V: Tensor
    is_eos_V: Tensor
    placeholder_ids: Tensor

    @classmethod
    def build(
        cls, config: LatentConfig, eos_ids: Iterable[int], banned_ids: Iterable[int], vocab_size: int, device
    ) -> TokenRules:
        banned_2V = torch.zeros(2, vocab_size, dtype=torch.bool, device=device)
        banned_2V[:, sorted(banned_ids)] = True
        banned_2V[1, config.start_id] = True
        is_eos_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        is_eos_V[sorted(eos_ids)] = True
        placeholder_ids = torch.zeros(len(PositionKind), dtype=torch.long, device=device)
        placeholder_ids[PositionKind.LATENT] = config.latent_id
        placeholder_ids[PositionKind.FORCED] = config.end_id
        return cls(banned_2V, is_eos_V, placeholder_ids)


class DecodingBatch:
    """`choose` a position for every row, `forward` it, and so on; then `trajectories`.

    Rows that have stopped stay, as idle text rows, until half of the batch has; `rows_N` maps the rows that are left to the
    rows of the records. What an idle row records lies beyond its length and is never read.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        config: LatentConfig,
        rules: TokenRules,
        requests: list[RolloutRequest],
        sampling: SamplingParams,
        treatment: Treatment,
    ):
        self.adapter, self.config, self.rules, self.sampling = adapter, config, rules, sampling
        self.treatment = treatment
        device = adapter.device
        group_sizes = torch.tensor([len(request.seeds) for request in requests])
        row_to_prompt_N = torch.repeat_interleave(torch.arange(len(requests)), group_sizes).to(device)
        num_rows, length = row_to_prompt_N.shape[0], sampling.max_new_tokens

        hidden_BH, cache, kinds_BP, valid_BP, next_position_B = self._prefill(requests)
        self.prompt_length = kinds_BP.shape[1]
        row_to_prefill_N = self._rows_of_prefill(row_to_prompt_N)
        self.cache = RolloutCache(cache, row_to_prefill_N, self.prompt_length + length)
        self.hidden_NH = hidden_BH[row_to_prefill_N]
        self.next_position_N = next_position_B[row_to_prefill_N]
        self.seeds = np.array([seed for request in requests for seed in request.seeds], dtype=np.uint64)
        self.uniforms_NT = uniforms(self.seeds[:, None], np.arange(length)).to(device)
        self.state = SpanState(config, *(counts_B[row_to_prompt_N] for counts_B in self._span_counts(requests, device)))
        self.override = OverrideTable(requests, row_to_prompt_N, adapter.hidden_size)
        blind_B = torch.tensor([request.blind_after_span for request in requests], device=device)
        self.blind_after_span_N = blind_B[row_to_prompt_N] if bool(blind_B.any()) else None
        self.visibility = GrowingVisibility(
            kinds_BP[row_to_prefill_N],
            valid_BP[row_to_prefill_N],
            self.prompt_length + length,
            config.visibility,
            adapter.dtype,
            may_blind=self.blind_after_span_N is not None,
        )

        self.rows_N = torch.arange(num_rows, device=device)
        self.done_N = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.token_ids = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self.kinds = torch.zeros_like(self.token_ids)
        self.full_log_probs = torch.zeros(num_rows, length, device=device)
        self.drawn_log_probs = torch.zeros_like(self.full_log_probs)
        self.lengths = torch.full((num_rows,), length, device=device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.latent_rows: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.aux: list[Tensor] = []

    def _padded_prompts(self, requests: list[RolloutRequest]) -> tuple[Tensor, Tensor, ImageInputs | None]:
        """Left-padded ids and validity [B, P] of the prompts, and all their images."""
        device = self.adapter.device
        length = max(request.prompt_ids.shape[0] for request in requests)
        input_ids_BP = torch.zeros(len(requests), length, dtype=torch.long)
        valid_BP = torch.zeros(len(requests), length, dtype=torch.bool)
        for prompt_idx, request in enumerate(requests):
            input_ids_BP[prompt_idx, length - request.prompt_ids.shape[0] :] = request.prompt_ids
            valid_BP[prompt_idx, length - request.prompt_ids.shape[0] :] = True
        input_ids_BP, valid_BP = input_ids_BP.to(device), valid_BP.to(device)
        images = ImageInputs.concat([request.images for request in requests])
        if images is not None:
            images = images.to(device)
        return input_ids_BP, valid_BP, images

    def _rows_of_prefill(self, row_to_prompt_N: Tensor) -> Tensor:
        """int64 [N], the row of the prefill that each row goes on from."""
        return row_to_prompt_N

    def _prefill(self, requests: list[RolloutRequest]) -> Prefill:
        """Over the B prompts, with little padding."""
        prompts, images = [request.prompt_ids for request in requests], [request.images for request in requests]
        return prefill_prompts(prompts, images, self.adapter, self.config.visibility)

    def _span_counts(self, requests: list[RolloutRequest], device) -> tuple[Tensor, Tensor]:
        """Latent steps a span, and spans that may be opened, of each prompt."""
        defaults = (("steps", self.config.steps), ("max_spans", self.config.max_spans))
        counts = []
        for name, default in defaults:
            values = [getattr(request, name) for request in requests]
            values = [default if value is None else value for value in values]
            counts.append(torch.tensor([UNBOUNDED if value is None else value for value in values], device=device))
        return tuple(counts)

    def choose(self, position: int) -> Tensor | None:
        """Decides and records `position` of every row; returns the input vectors [N, H], None when no row goes on."""
        needs_all_logits = self.config.exit == "end_token"
        logits_NV = self.adapter.logits(self.hidden_NH) if needs_all_logits else None
        planned_N = self.state.plan(logits_NV).masked_fill(self.done_N, int(PositionKind.TEXT))
        token_ids_N, full_N, drawn_N = self._sample_text(position, planned_N, logits_NV)
        latent_rows_M = (planned_N == PositionKind.LATENT).nonzero()[:, 0]
        latents_MH = None
        if latent_rows_M.numel():
            latents_MH, densities_M = self._latents(latent_rows_M, position)
            if densities_M is not None:
                full_N = full_N.index_copy(0, latent_rows_M, densities_M)
                drawn_N = drawn_N.index_copy(0, latent_rows_M, densities_M)
        kinds_N = self._advance(planned_N, token_ids_N, latent_rows_M, latents_MH)
        self._record(position, kinds_N, token_ids_N, full_N, drawn_N)
        num_active = int((~self.done_N).sum())
        if position + 1 == self.sampling.max_new_tokens or num_active == 0:
            return None
        embeds_NH = self.adapter.embed(token_ids_N)
        if latents_MH is not None:
            embeds_NH = embeds_NH.index_copy(0, latent_rows_M, latents_MH.to(embeds_NH.dtype))
        self.last_kinds_N = kinds_N
        return self._drop_stopped_rows(embeds_NH) if num_active * 2 <= self.done_N.shape[0] else embeds_NH

    def _sample_text(self, position: int, planned_N: Tensor, logits_NV: Tensor | None):
        """Token ids (placeholders where nothing is sampled) and both log-probs (0 there), each [N]."""
        token_ids_N = self.rules.placeholder_ids[planned_N]
        rows_M = ((planned_N == PositionKind.TEXT) & ~self.done_N).nonzero()[:, 0]
        if rows_M.numel() == 0:
            nothing = torch.zeros(planned_N.shape, device=planned_N.device)
            return token_ids_N, nothing, nothing
        is_all = rows_M.numel() == planned_N.numel()
        if logits_NV is None:
            logits_MV = self.adapter.logits(self.hidden_NH if is_all else self.hidden_NH[rows_M])
        else:
            logits_MV = logits_NV if is_all else logits_NV[rows_M]
        banned_MV = self.rules.banned_2V[:1]
        if self.state.is_bounded:
            banned_MV = self.rules.banned_2V[(~self.state.may_open_N[rows_M]).long()]
        sampling, draws_M = self.sampling, self.uniforms_NT[rows_M, position]
        picked = sample(logits_MV, draws_M, sampling.temperature, sampling.top_k, sampling.top_p, banned_MV)
        if is_all:
            return picked
        zeros = torch.zeros(planned_N.shape, device=planned_N.device)
        targets = zip((token_ids_N, zeros, zeros), picked, strict=True)
        return tuple(target.index_copy(0, rows_M, values) for target, values in targets)

    def _latents(self, rows_M: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        """Vectors [M, H] for the rows at a latent step, and their log-densities [M] where the treatment gives them."""
        hidden_MH, greedy = self.hidden_NH[rows_M], self.sampling.temperature == 0
        scale = 1.0 if greedy else self.sampling.temperature
        source = LatentSource(
            feedback(self.adapter.model, hidden_MH),
            lambda: self.adapter.logits(hidden_MH).float() / scale,
            self.treatment.features(self.adapter.model, hidden_MH),
        )
        num_uniforms = 0 if greedy else self.treatment.num_uniforms(hidden_MH.shape[1])
        uniforms_MU = None
        if num_uniforms:
            seeds_M = self.seeds[self.rows_N[rows_M].cpu().numpy()]
            uniforms_MU = latent_uniforms(seeds_M, position, num_uniforms).to(hidden_MH.device)
        latents_MH, aux_MA = self.treatment.draw(source, uniforms_MU, self.adapter.embed)
        kinds_M1 = torch.full_like(rows_M, int(PositionKind.LATENT))[:, None]
        span_M = self.state.num_spans_N[rows_M] - 1
        used_M1 = torch.ones_like(kinds_M1, dtype=torch.bool)
        latents_MH = self.override.feed(rows_M, latents_MH[:, None], kinds_M1, used_M1, span_M)[:, 0]
        self.latent_rows.append(self.rows_N[rows_M])
        self.latents.append(latents_MH.float())
        if aux_MA is not None:
            self.aux.append(aux_MA)
        acts = self.treatment.is_action
        return latents_MH, self.treatment.log_density(source, latents_MH, aux_MA) if acts else None

    def _advance(self, planned_N: Tensor, token_ids_N: Tensor, latent_rows_M: Tensor, latents_MH) -> Tensor:
        """Final kinds [N], after telling the span state what stands at this position."""
        if self.config.exit != "latent_end" or latents_MH is None:
            return self.state.advance(planned_N, token_ids_N, None, None)
        latents_NH = torch.zeros_like(self.hidden_NH).index_copy(0, latent_rows_M, latents_MH)
        return self.state.advance(planned_N, token_ids_N, latents_NH, end_vector(self.adapter.model))

    def _record(self, position: int, kinds_N: Tensor, token_ids_N: Tensor, full_N: Tensor, drawn_N: Tensor) -> None:
        self.token_ids[self.rows_N, position] = token_ids_N
        self.kinds[self.rows_N, position] = kinds_N
        self.full_log_probs[self.rows_N, position] = full_N
        self.drawn_log_probs[self.rows_N, position] = drawn_N
        is_eos_N = self.rules.is_eos_V[token_ids_N] & (kinds_N == PositionKind.TEXT) & ~self.done_N
        rows_M = self.rows_N[is_eos_N]
        self.lengths[rows_M] = position + 1
        self.stopped[rows_M] = True
        self.done_N |= is_eos_N

    def _drop_stopped_rows(self, embeds_NH: Tensor) -> Tensor:
        keep_M = (~self.done_N).nonzero()[:, 0]
        names = ["rows_N", "done_N", "next_position_N", "uniforms_NT", "last_kinds_N"]
        for name in names:
            setattr(self, name, getattr(self, name)[keep_M])
        self.visibility.keep_rows(keep_M)
        self.state.keep_rows(keep_M)
        self.cache.keep_rows(keep_M)
        self.override.keep_rows(keep_M)
        if self.blind_after_span_N is not None:
            self.blind_after_span_N = self.blind_after_span_N[keep_M]
        return embeds_NH[keep_M]

    def forward(self, position: int, embeds_NH: Tensor) -> None:
        """Feeds `position`: the hidden states that decide the next one."""
        is_before_latent_N = ~self.state.is_last_latent_N if self.visibility.has_sighted else None
        is_blind_N = None if self.blind_after_span_N is None else self.blind_after_span_N & self._is_after_span_N()
        bias_NS = self.visibility.see(self.last_kinds_N, is_before_latent_N, is_blind_N)
        position_ids = with_components((self.next_position_N + position)[:, None], self.adapter.has_mrope)
        self.hidden_NH = self.adapter.decode_hidden(embeds_NH, bias_NS[:, None, None], position_ids, self.cache)

    def _is_after_span_N(self) -> Tensor:
        """bool [N], asked after `choose`: the chosen position stands after the first span, and in none."""
        return (self.state.num_spans_N > 0) & ~self.state.in_span_N

    def trajectories(self, requests: list[RolloutRequest], policy_version: int) -> list[list[Trajectory]]:
        """The records, cut to each trajectory's length, on the CPU."""
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        fields = {
            "token_ids": self.token_ids.cpu(),
            "kinds": self.kinds.cpu(),
            "rollout_log_probs": self.full_log_probs.cpu(),
            "sampling_log_probs": self.drawn_log_probs.cpu(),
        }
        latents_by_row = self._by_row(self.latents, self.adapter.hidden_size)
        aux_by_row = self._by_row(self.aux, self.treatment.aux_size)
        groups, row = [], 0
        for request in requests:
            prompt_ids, group = request.prompt_ids.cpu(), []
            for seed in request.seeds:
                trajectory = Trajectory(
                    prompt_ids=prompt_ids,
                    # copies, not views that would keep the whole batch alive
                    **{name: values[row, : lengths[row]].clone() for name, values in fields.items()},
                    latents=latents_by_row[row],
                    latent_aux=aux_by_row[row],
                    stop_reason="eos" if stopped[row] else "length",
                    group_id=request.group_id,
                    seed=seed,
                    policy_version=policy_version,
                )
                group.append(trajectory)
                row += 1
            groups.append(group)
        return groups

    def _by_row(self, values: list[Tensor], width: int) -> list[Tensor]:
        """[n, width] float32 for each row of the records; `Trajectory` checks their number against the kinds."""
        num_rows = self.token_ids.shape[0]
        if not values:
            return [torch.zeros(0, width) for _ in range(num_rows)]
        rows_L = torch.cat(self.latent_rows).cpu()
        values_LW = torch.cat(values).cpu()[rows_L.argsort(stable=True)]
        counts = torch.bincount(rows_L, minlength=num_rows).tolist()
        return [rows.clone() for rows in values_LW.split(counts)]
