"""Engine `hf`: batched latent rollouts on a Hugging Face model, the reference that other engines are compared with.

    requests ──prefill, once a prompt──▶ keys and values ──expand to G rows a prompt──▶ decoding loop ──▶ trajectories
                                                                                          │
      each step, every row in its own mode:  plan kinds ▸ sample text ▸ feed h back ▸ record ▸ one forward ▸ drop rows

An image is encoded once, a prompt prefilled once, keys and values are written in place, rows that have stopped are
dropped when they are half of the batch. A row's result depends on weights, prompt, seed and sampling; the batch that it
shares moves its numbers by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from grpo_latent.errors import CheckpointError, ConfigError, LatentMismatchError, RolloutError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.latent.lvr import SpanState
from grpo_latent.models.adapter import ImageInputs, ModelAdapter
from grpo_latent.models.attention import folded_attention
from grpo_latent.models.head import END_VECTOR_ATTRIBUTE, end_vector, feedback
from grpo_latent.models.kv_cache import RolloutCache
from grpo_latent.models.visibility import attention_bias
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import sample, uniforms
from grpo_latent.trajectory import PositionKind, Trajectory


class HFRolloutEngine:
    """Batched latent rollouts. Implements `RolloutEngine`.

    Args:
        model: a Hugging Face model that `ModelAdapter` accepts, attention `sdpa` or `eager`.
        config: the checkpoint's latents.
        eos_ids: tokens that end a completion, outside latent spans.
        banned_ids: tokens never sampled, besides the latent tokens other than `start` and the image placeholders (a
            sampled image placeholder would break the count of image features in every later forward).
        max_batch_rows: trajectories decoded together; a group is never split.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LatentConfig,
        eos_ids: Iterable[int],
        banned_ids: Iterable[int] = (),
        max_batch_rows: int = 512,
    ):
        self.adapter = ModelAdapter(model)
        self.model, self.config, self.max_batch_rows = model, config, max_batch_rows
        self.policy_version = 0
        attention = self.adapter.text_config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ConfigError(
                "engine hf decodes with an additive attention bias",
                where="attn_implementation",
                got=attention,
                expected="sdpa or eager",
                fix="Load the rollout model with attn_implementation=sdpa.",
            )
        if config.exit == "latent_end" and not hasattr(model, END_VECTOR_ATTRIBUTE):
            raise CheckpointError("exit latent_end without an end vector", where="model", expected=END_VECTOR_ATTRIBUTE)
        eos_ids = sorted(set(eos_ids))
        if not eos_ids:
            raise ConfigError("no end-of-sequence token", where="eos_ids", expected="at least one id")
        if max_batch_rows < 1:
            raise ConfigError("not a batch size", where="max_batch_rows", got=max_batch_rows, expected=">= 1")
        latent_ids = {config.latent_id, config.end_id, config.latent_end_id} - {None}
        banned = (set(banned_ids) | latent_ids | self.adapter.vision_ids) - set(eos_ids)
        self._check_ids(config, eos_ids, banned)
        device = self.adapter.device
        self._eos_ids = torch.tensor(eos_ids, device=device)
        self._banned_V = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=device)
        self._banned_V[sorted(banned)] = True

    def _check_ids(self, config: LatentConfig, eos_ids: list[int], banned: set[int]) -> None:
        special = {config.start_id, config.latent_id, config.end_id}
        if special & set(eos_ids):
            expected = f"none of {sorted(special)}"
            raise ConfigError(
                "an end-of-sequence token is a latent token", where="eos_ids", got=eos_ids, expected=expected
            )
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        outside = sorted(token_id for token_id in {*banned, *special, *eos_ids} if not 0 <= token_id < vocab_size)
        if outside:
            raise ConfigError(
                "ids outside the vocabulary",
                where="latent config, eos_ids or banned_ids",
                got=outside[:5],
                expected=f"ids in 0..{vocab_size - 1}",
                fix="Model and latent_config.json must come from the same checkpoint.",
            )

    def _check_request(self, request: RolloutRequest) -> None:
        where = f"request of group {request.group_id!r}"
        self.adapter.check_prompt(request.prompt_ids, request.images, where)
        table = request.latent_override
        if table is not None and (table.ndim != 2 or table.shape[1] != self.adapter.hidden_size):
            shape, expected = tuple(table.shape), f"[K, {self.adapter.hidden_size}]"
            raise RolloutError("not a latent_override", where=where, got=f"shape {shape}", expected=expected)

    @torch.no_grad()
    def generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        for request in requests:
            self._check_request(request)
        was_training = self.model.training
        self.model.eval()
        try:
            with folded_attention(self.adapter.text_config):
                return [group for chunk in self._chunks(requests) for group in self._generate_chunk(chunk, sampling)]
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copies every parameter in place.

        Raises:
            CheckpointError: an unknown name, a wrong shape, or a parameter that was not given.
        """
        own = self.model.state_dict(keep_vars=True)
        missing = {tensor.data_ptr() for tensor in own.values()}
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                expected = tuple(own[name].shape) if name in own else "a name of the model's state_dict"
                raise CheckpointError(
                    "weight does not fit", where=name, got=f"shape {tuple(tensor.shape)}", expected=str(expected)
                )
            own[name].copy_(tensor)
            missing.discard(own[name].data_ptr())  # by address: tied weights arrive under one of their names
        if missing:
            names = [name for name, tensor in own.items() if tensor.data_ptr() in missing]
            raise CheckpointError("weights were not sent", where="load_weights", got=names[:5], expected="all weights")
        self.policy_version = policy_version

    def _chunks(self, requests: list[RolloutRequest]) -> Iterable[list[RolloutRequest]]:
        chunk, num_rows = [], 0
        for request in requests:
            if chunk and num_rows + len(request.seeds) > self.max_batch_rows:
                yield chunk
                chunk, num_rows = [], 0
            chunk.append(request)
            num_rows += len(request.seeds)
        if chunk:
            yield chunk

    def _generate_chunk(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[list[Trajectory]]:
        batch = _DecodingBatch(self, requests, sampling)
        for position in range(sampling.max_new_tokens):
            embeds_NH = batch.choose(position)
            if embeds_NH is None:
                break
            batch.forward(position, embeds_NH)
        return batch.trajectories(requests)


class _DecodingBatch:
    """The rows of one chunk while they decode. `rows_N` maps the rows still here to the rows of the records."""

    def __init__(self, engine: HFRolloutEngine, requests: list[RolloutRequest], sampling: SamplingParams):
        self.engine, self.adapter, self.config = engine, engine.adapter, engine.config
        self.sampling = sampling
        device = self.adapter.device
        group_sizes = torch.tensor([len(request.seeds) for request in requests])
        row_to_prompt_N = torch.repeat_interleave(torch.arange(len(requests)), group_sizes).to(device)
        num_rows, length = row_to_prompt_N.shape[0], sampling.max_new_tokens

        hidden_BH, cache, kinds_BP, valid_BP, next_position_B = self._prefill(requests)
        self.prompt_length = kinds_BP.shape[1]
        self.cache = RolloutCache(cache, row_to_prompt_N, self.prompt_length + length)
        self.hidden_NH = hidden_BH[row_to_prompt_N]
        self.next_position_N = next_position_B[row_to_prompt_N]
        self.seeds_N = np.array([seed for request in requests for seed in request.seeds], dtype=np.uint64)
        steps = torch.tensor([request.steps or self.config.steps for request in requests], device=device)
        self.state = SpanState(self.config, steps[row_to_prompt_N])
        self.override_NKH, self.num_override_N = self._override_table(requests, row_to_prompt_N)
        self.num_latents_N = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._init_bias(kinds_BP[row_to_prompt_N], valid_BP[row_to_prompt_N], length)

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

    def _prefill(self, requests: list[RolloutRequest]):
        """Left-padded forward over the B prompts: last hidden states, cache, kinds, validity, next position."""
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
            images = ImageInputs(images.pixel_values.to(device), images.image_grid_thw.to(device))
        kinds_BP = self.adapter.prompt_kinds(input_ids_BP)
        position_ids = self.adapter.position_ids(input_ids_BP, valid_BP, images)
        cache = DynamicCache(config=self.adapter.text_config)
        bias = attention_bias(kinds_BP, valid_BP, self.config.visibility, self.adapter.dtype)
        hidden = self.adapter.forward_hidden(input_ids_BP, bias, position_ids, images, cache)
        last_position_B = position_ids.amax(-1) if position_ids.ndim == 2 else position_ids.amax((0, -1))
        return hidden[:, -1], cache, kinds_BP, valid_BP, last_position_B + 1

    def _init_bias(self, kinds_NP: Tensor, valid_NP: Tensor, length: int) -> None:
        minimum = torch.finfo(self.adapter.dtype).min
        self.bias_NS = torch.zeros(
            kinds_NP.shape[0], self.prompt_length + length, dtype=self.adapter.dtype, device=kinds_NP.device
        )
        self.bias_NS[:, : self.prompt_length].masked_fill_(~valid_NP, minimum)
        self.hidden_NS = torch.zeros_like(self.bias_NS, dtype=torch.bool)
        self.hidden_NS[:, : self.prompt_length] = kinds_NP == PositionKind.VISION

    def _override_table(self, requests, row_to_prompt_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
        tables = [request.latent_override for request in requests]
        if all(table is None for table in tables):
            return None, None
        sizes = torch.tensor([0 if table is None else table.shape[0] for table in tables], device=self.adapter.device)
        padded = torch.zeros(len(tables), int(sizes.max()), self.adapter.hidden_size, device=self.adapter.device)
        for prompt_idx, table in enumerate(tables):
            if table is not None:
                padded[prompt_idx, : table.shape[0]] = table
        has_table = torch.tensor([table is not None for table in tables], device=self.adapter.device)
        sizes = torch.where(has_table, sizes, -1)
        return padded[row_to_prompt_N], sizes[row_to_prompt_N]

    def choose(self, position: int) -> Tensor | None:
        """Decides and records `position` of every row; returns the input vectors [N, H], None when no row goes on."""
        needs_all_logits = self.config.exit == "end_token"
        logits_NV = self.adapter.logits(self.hidden_NH) if needs_all_logits else None
        planned_N = self.state.plan(logits_NV)
        token_ids_N, full_N, drawn_N = self._sample_text(position, planned_N, logits_NV)
        is_latent_N = planned_N == PositionKind.LATENT
        latents_MH = self._latents(is_latent_N)
        latents_NH = None
        if self.config.exit == "latent_end" and latents_MH is not None:
            latents_NH = torch.zeros_like(self.hidden_NH).masked_scatter(is_latent_N[:, None], latents_MH)
        vector = end_vector(self.adapter.model) if self.config.exit == "latent_end" else None
        kinds_N = self.state.advance(planned_N, token_ids_N, latents_NH, vector)
        self._record(position, kinds_N, token_ids_N, full_N, drawn_N, is_latent_N, latents_MH)
        if position + 1 == self.sampling.max_new_tokens or bool(self.done_N.all()):
            return None
        embeds_NH = self.adapter.embed(token_ids_N)
        if latents_MH is not None:
            embeds_NH = embeds_NH.masked_scatter(is_latent_N[:, None], latents_MH.to(embeds_NH.dtype))
        self.last_kinds_N = kinds_N
        return self._drop_stopped_rows(embeds_NH)

    def _sample_text(self, position: int, planned_N: Tensor, logits_NV: Tensor | None):
        """Token ids (placeholders where nothing is sampled) and both log-probs (0 there), each [N]."""
        forced = {int(PositionKind.LATENT): self.config.latent_id, int(PositionKind.FORCED): self.config.end_id}
        token_ids_N = torch.zeros_like(planned_N)
        for kind, token_id in forced.items():
            token_ids_N = torch.where(planned_N == kind, token_id, token_ids_N)
        full_N = torch.zeros(planned_N.shape[0], device=planned_N.device)
        drawn_N = torch.zeros_like(full_N)
        is_text_N = (planned_N == PositionKind.TEXT) & ~self.done_N
        rows_M = is_text_N.nonzero()[:, 0]
        if rows_M.numel() == 0:
            return token_ids_N, full_N, drawn_N
        logits_MV = self.adapter.logits(self.hidden_NH[rows_M]) if logits_NV is None else logits_NV[rows_M]
        banned = self.engine._banned_V[None]
        may_open_M = self.state.may_open_N[rows_M]
        if self.config.max_spans is not None:
            banned = banned.repeat(rows_M.shape[0], 1)
            banned[:, self.config.start_id] |= ~may_open_M
        draws = uniforms(self.seeds_N[rows_M.cpu().numpy()], position)
        sampling = self.sampling
        picked = sample(logits_MV, draws, sampling.temperature, sampling.top_k, sampling.top_p, banned)
        return tuple(
            target.index_put((rows_M,), values.to(target.dtype))
            for target, values in zip((token_ids_N, full_N, drawn_N), picked, strict=True)
        )

    def _latents(self, is_latent_N: Tensor) -> Tensor | None:
        """Vectors [M, H] for the rows at a latent step, None when there is none."""
        rows_M = is_latent_N.nonzero()[:, 0]
        if rows_M.numel() == 0:
            return None
        latents_MH = feedback(self.adapter.model, self.hidden_NH[rows_M])
        if self.override_NKH is not None:
            latent_idx_M, size_M = self.num_latents_N[rows_M], self.num_override_N[rows_M]
            beyond_M = (size_M >= 0) & (latent_idx_M >= size_M) & ~self.done_N[rows_M]
            if bool(beyond_M.any()):
                raise RolloutError(
                    "more latent steps than vectors in latent_override",
                    where=f"row {int(self.rows_N[rows_M][beyond_M][0])}",
                    got=f"latent step {int(latent_idx_M[beyond_M][0])}",
                    expected="latent_override of at least max_new_tokens vectors",
                )
            chosen_MH = self.override_NKH[rows_M, latent_idx_M.clamp(max=self.override_NKH.shape[1] - 1)]
            latents_MH = torch.where((size_M >= 0)[:, None], chosen_MH.to(latents_MH.dtype), latents_MH)
        return latents_MH

    def _record(self, position, kinds_N, token_ids_N, full_N, drawn_N, is_latent_N, latents_MH) -> None:
        active_N = ~self.done_N
        rows_M = self.rows_N[active_N]
        self.token_ids[rows_M, position] = token_ids_N[active_N]
        self.kinds[rows_M, position] = kinds_N[active_N]
        self.full_log_probs[rows_M, position] = full_N[active_N]
        self.drawn_log_probs[rows_M, position] = drawn_N[active_N]
        if latents_MH is not None:
            kept_M = active_N[is_latent_N]
            self.latent_rows.append(self.rows_N[is_latent_N][kept_M])
            self.latents.append(latents_MH[kept_M].float())
        self.num_latents_N += is_latent_N
        is_eos_N = torch.isin(token_ids_N, self.engine._eos_ids) & (kinds_N == PositionKind.TEXT) & active_N
        self.lengths[self.rows_N[is_eos_N]] = position + 1
        self.stopped[self.rows_N[is_eos_N]] = True
        self.done_N |= is_eos_N

    def _drop_stopped_rows(self, embeds_NH: Tensor) -> Tensor:
        keep_M = (~self.done_N).nonzero()[:, 0]
        if keep_M.shape[0] * 2 > self.done_N.shape[0]:
            return embeds_NH
        for name in ("rows_N", "done_N", "next_position_N", "bias_NS", "hidden_NS", "num_latents_N", "last_kinds_N"):
            setattr(self, name, getattr(self, name)[keep_M])
        self.seeds_N = self.seeds_N[keep_M.cpu().numpy()]
        self.state.keep_rows(keep_M)
        self.cache.keep_rows(keep_M)
        if self.override_NKH is not None:
            self.override_NKH, self.num_override_N = self.override_NKH[keep_M], self.num_override_N[keep_M]
        return embeds_NH[keep_M]

    def forward(self, position: int, embeds_NH: Tensor) -> None:
        """Feeds `position`: the hidden states that decide the next one."""
        column = self.prompt_length + position
        bias_NS = self.bias_NS[:, : column + 1]
        if self.config.visibility == "latents_only":
            is_start_N = self.last_kinds_N == PositionKind.START
            is_inner_latent_N = (self.last_kinds_N == PositionKind.LATENT) & ~self.state.is_last_latent_N
            self.hidden_NS[:, column] = is_start_N
            unseen_NS = self.hidden_NS[:, : column + 1] & ~(is_start_N | is_inner_latent_N)[:, None]
            bias_NS = bias_NS.masked_fill(unseen_NS, torch.finfo(bias_NS.dtype).min)
        position_N1 = (self.next_position_N + position)[:, None]
        position_ids = position_N1[None].expand(3, -1, -1) if self.adapter.has_mrope else position_N1
        self.hidden_NH = self.adapter.decode_hidden(embeds_NH, bias_NS[:, None, None], position_ids, self.cache)

    def trajectories(self, requests: list[RolloutRequest]) -> list[list[Trajectory]]:
        """The records, cut to each trajectory's length, on the CPU."""
        latents_by_row = self._latents_by_row()
        token_ids, kinds = self.token_ids.cpu(), self.kinds.cpu()
        full, drawn = self.full_log_probs.cpu(), self.drawn_log_probs.cpu()
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        groups, row = [], 0
        for request in requests:
            group = []
            for seed in request.seeds:
                end = lengths[row]
                group.append(
                    Trajectory(
                        prompt_ids=request.prompt_ids.cpu(),
                        token_ids=token_ids[row, :end].clone(),
                        kinds=kinds[row, :end].clone(),
                        latents=latents_by_row[row],
                        rollout_log_probs=full[row, :end].clone(),
                        sampling_log_probs=drawn[row, :end].clone(),
                        stop_reason="eos" if stopped[row] else "length",
                        group_id=request.group_id,
                        seed=seed,
                        policy_version=self.engine.policy_version,
                    )
                )
                row += 1
            groups.append(group)
        return groups

    def _latents_by_row(self) -> list[Tensor]:
        num_rows = self.token_ids.shape[0]
        if not self.latents:
            return [torch.zeros(0, self.adapter.hidden_size) for _ in range(num_rows)]
        rows_L = torch.cat(self.latent_rows).cpu()
        counts = torch.bincount(rows_L, minlength=num_rows)
        recorded = (self.kinds == PositionKind.LATENT).sum(-1).cpu()
        if not torch.equal(counts, recorded):
            raise LatentMismatchError(
                "recorded latents differ from latent positions", got=counts, expected=str(recorded)
            )
        latents_LH = torch.cat(self.latents).cpu()[rows_L.argsort(stable=True)]
        return [rows.clone() for rows in latents_LH.split(counts.tolist())]
