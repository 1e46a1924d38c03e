"""Hooks on vLLM's V1 model runner: recorded vectors go in before the forward, the next position is chosen after it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from grpo_latent.rollout.vllm.skeleton import WorkerOptions
from grpo_latent.rollout.vllm.table import LatentRequest, LatentTable, StepRows


class LatentRunner:
    """Mixin over `GPUModelRunner` (or its CPU subclass).

    `_update_states` knows who comes and goes, `_preprocess` owns the input vectors, `_sample` the next ids. All three read
    what the scheduler announced, on the CPU, and tensors on the device: nothing waits for a sampled id, so asynchronous
    scheduling keeps its overlap.
    """

    def setup_latents(self, options: WorkerOptions) -> None:
        """Allocates the table; called once the model is loaded."""
        self.latent_parameters = self.get_model().latent_parameters
        vocab_size = self.model_config.get_vocab_size()
        banned_V = torch.zeros(vocab_size, dtype=torch.bool, device=self.device)
        banned_V[list(options.banned_ids)] = True
        self.latent_table = LatentTable(
            options.config,
            banned_V,
            num_slots=self.max_num_reqs,
            max_length=self.max_model_len,
            max_latents=options.room(self.max_model_len),
            hidden_size=self.inputs_embeds_size,
            dtype=self.dtype,
        )
        self._step_rows: StepRows | None = None
        self.num_replayed_rows = 0

    def _update_states(self, scheduler_output):
        for request_id in scheduler_output.finished_req_ids:
            self.latent_table.finish(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            extra_args = None if new.sampling_params is None else new.sampling_params.extra_args
            self.latent_table.add(new.req_id, LatentRequest.from_extra_args(extra_args))
        return super()._update_states(scheduler_output)

    def _preprocess(self, scheduler_output, num_input_tokens, *args, **kwargs):
        outputs = super()._preprocess(scheduler_output, num_input_tokens, *args, **kwargs)
        embeds = outputs[1]
        num_reqs = self.input_batch.num_reqs
        request_ids = self.input_batch.req_ids[:num_reqs]
        slots_N = np.array([self.latent_table.slots[request_id] for request_id in request_ids])
        prompt_lengths_N = np.array([self.requests[request_id].num_prompt_tokens for request_id in request_ids])
        starts_N = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        counts_N = np.array([scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids])
        ends_N = starts_N + counts_N

        self._feed(embeds, slots_N, starts_N - prompt_lengths_N, counts_N)
        # vLLM discards what a row samples before its known tokens are all computed
        rows_M = np.nonzero(~self.discard_request_mask.np[:num_reqs].astype(bool))[0]
        chosen_ids = [request_ids[row] for row in rows_M]
        positions_M = (ends_N - prompt_lengths_N)[rows_M]
        self._step_rows = StepRows(
            rows_M, slots_N[rows_M], positions_M, [self.latent_table.requests[request_id] for request_id in chosen_ids]
        )
        self.latent_table.note_chosen(chosen_ids, positions_M)
        return outputs

    def _feed(self, embeds: Tensor, slots_N: np.ndarray, positions_N: np.ndarray, counts_N: np.ndarray) -> None:
        """Writes recorded vectors over this step's inputs; `positions_N` may be negative, inside prompts."""
        first_rows_N = np.cumsum(counts_N) - counts_N
        offsets = np.arange(int(counts_N.sum())) - np.repeat(first_rows_N, counts_N)
        positions = np.repeat(positions_N, counts_N) + offsets
        rows_M = np.nonzero(positions >= 0)[0]
        if rows_M.size:
            self.latent_table.feed(embeds, rows_M, np.repeat(slots_N, counts_N)[rows_M], positions[rows_M])
        self.num_replayed_rows += rows_M.size - int(((counts_N == 1) & (positions_N >= 0)).sum())

    def sample_tokens(self, grammar_output):
        state = self.execute_model_state
        self._sample_hidden_states = None if state is None else state.sample_hidden_states
        return super().sample_tokens(grammar_output)

    def _sample(self, logits, spec_decode_metadata):
        rows, table = self._step_rows, self.latent_table
        num_reqs = self.input_batch.num_reqs
        rows_M = torch.from_numpy(rows.rows_N).to(logits.device)
        all_rows = len(rows.requests) == num_reqs
        logits_MV = logits if all_rows else logits[rows_M]
        banned = table.banned(rows) if rows.requests else None
        wants_log_probs = self.input_batch.sampling_metadata.max_num_logprobs is not None
        if wants_log_probs or any(request.key is None for request in rows.requests):
            masked = logits.clone()
            if rows.requests:
                masked[rows_M] = masked[rows_M].masked_fill(banned, -torch.inf)
            output = super()._sample(masked, spec_decode_metadata)
        else:
            tokens_N1 = torch.zeros(num_reqs, 1, dtype=torch.int32, device=logits.device)
            output = SamplerOutput(sampled_token_ids=tokens_N1, logprobs_tensors=None)
        if rows.requests:
            hidden = self._sample_hidden_states
            parameters = self.latent_parameters
            tokens_M, full_M, is_forced_M = table.choose(
                rows,
                hidden if all_rows else hidden[rows_M],
                logits_MV,
                banned,
                output.sampled_token_ids[rows_M, 0].long(),
                parameters.feedback,
                parameters.end_vector_H,
            )
            output.sampled_token_ids[rows_M, 0] = tokens_M.to(output.sampled_token_ids.dtype)
            if output.logprobs_tensors is not None:
                self._report(output.logprobs_tensors, rows, rows_M, tokens_M, full_M, is_forced_M)
        return output

    def _report(self, log_probs, rows: StepRows, rows_M: Tensor, tokens_M, full_M, is_forced_M) -> None:
        """Puts our log-probs into vLLM's own report where its sampler did not draw: 0 where nothing was sampled."""
        is_recorded_M = torch.tensor([request.key is not None for request in rows.requests], device=rows_M.device)
        ours_M = is_recorded_M | is_forced_M
        ids, values = log_probs.logprob_token_ids, log_probs.logprobs
        ids[rows_M, 0] = torch.where(ours_M, tokens_M.to(ids.dtype), ids[rows_M, 0])
        values[rows_M, 0] = torch.where(ours_M, full_M.to(values.dtype), values[rows_M, 0])


def install(runner, options: WorkerOptions) -> None:
    """Gives a built runner our hooks; its class keeps its own name in vLLM's logs."""
    base = type(runner)
    runner.__class__ = type(f"Latent{base.__name__}", (LatentRunner, base), {})
    runner.setup_latents(options)
