"""Hooks on vLLM's V2 model runner, through the state class that a model may bring with it.

`LatentModelState` sees requests come, owns the input vectors and wraps the sampler. A request that
is preempted leaves the state as a finished one does, so who has finished is read from the runner
itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from grpo_latent.rollout.vllm.steps import LatentSteps


class LatentModelState(DefaultModelState):
    """What `init_model_state` builds inside `load_model`; `install` gives it its steps afterwards."""

    latent_steps: LatentSteps | None = None

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self._embeds = None
        if not self.supports_mm_inputs:  # this runner gives text-only models ids
            shape = (self.max_num_tokens, self.inputs_embeds_size)
            self._embeds = torch.zeros(shape, dtype=self.dtype, device=device)

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        sampling_params = new_req_data.sampling_params
        extra_args = None if sampling_params is None else sampling_params.extra_args
        self.latent_steps.add(new_req_data.req_id, len(new_req_data.prompt_token_ids), extra_args)

    def get_mm_embeddings(self, scheduled_encoder_inputs, input_batch, *args) -> Tensor:
        embeds = super().get_mm_embeddings(scheduled_encoder_inputs, input_batch, *args)
        self._begin(embeds, input_batch)
        return embeds

    def prepare_inputs(self, input_batch, req_states) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if self._embeds is None:
            return inputs
        num_tokens = input_batch.num_tokens
        self._embeds[:num_tokens].copy_(
            self.model.embed_input_ids(input_batch.input_ids[:num_tokens])
        )
        embeds = self._embeds[: input_batch.num_tokens_after_padding]
        self._begin(embeds, input_batch)
        return {**inputs, "input_ids": None, "inputs_embeds": embeds}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self._embeds is None:
            return inputs
        return {**inputs, "input_ids": None, "inputs_embeds": self._embeds[:num_tokens]}

    def _begin(self, embeds: Tensor, batch) -> None:
        if not self._is_real(batch):
            return
        starts_N, counts_N = (
            batch.num_computed_tokens_np.astype(np.int64),
            batch.num_scheduled_tokens.astype(np.int64),
        )
        self.latent_steps.begin(
            embeds, batch.req_ids, starts_N, counts_N, starts_N + counts_N >= batch.prefill_len_np
        )

    def _is_real(self, batch) -> bool:
        """False for the dummy batches of profiling and graph capture, whose requests no one has
        added.
        """
        return (
            self.latent_steps is not None and batch.req_ids[0] in self.latent_steps.prompt_lengths
        )

    def custom_sampler(self, sampler):
        return LatentSampler(sampler, self), None


class LatentSampler:
    """vLLM's sampler, then our choice."""

    def __init__(self, stock, state: LatentModelState):
        self._stock, self._state = stock, state

    def __getattr__(self, name: str):
        return getattr(self._stock, name)

    def __call__(self, logits, input_batch, *args, **kwargs):
        if not self._state._is_real(input_batch):
            return self._stock(logits, input_batch, *args, **kwargs)
        steps = self._state.latent_steps
        shown = steps.without_banned(logits) if steps.has_served_rows else logits
        output = self._stock(shown, input_batch, *args, **kwargs)
        steps.choose(
            self._state.model.scored_hidden,
            logits,
            output.sampled_token_ids,
            output.logprobs_tensors,
        )
        return output


class LatentRunnerV2:
    """Mixin over V2's `GPUModelRunner` (or its CPU subclass)."""

    latent_steps: LatentSteps

    def finish_requests(self, scheduler_output):
        self.latent_steps.finish(scheduler_output.finished_req_ids)
        return super().finish_requests(scheduler_output)


def install(runner, steps: LatentSteps) -> None:
    """Gives a built runner and its model state our steps."""
    base = type(runner)
    runner.__class__ = type(f"Latent{base.__name__}", (LatentRunnerV2, base), {})
    runner.latent_steps = runner.model_state.latent_steps = steps
