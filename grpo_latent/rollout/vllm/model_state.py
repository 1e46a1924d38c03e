"""Hooks into vLLM's V2 model runner, through the state class that a model may bring with it.

`LatentModelState` sees requests come, owns the input vectors and wraps the sampler. A request that
is preempted leaves the state as a finished one does, so who has finished is read from the runner
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from grpo_latent.rollout.vllm.steps import LatentSteps

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState


class LatentModelState(DefaultModelState):
    """What `init_model_state` builds inside `load_model`; `install` gives it its steps later."""

    latent_steps: LatentSteps | None = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self._embeds: Tensor | None = None
        if not self.supports_mm_inputs:  # this runner gives text-only models ids
            shape = (self.max_num_tokens, self.inputs_embeds_size)
            self._embeds = torch.zeros(shape, dtype=self.dtype, device=device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        assert self.latent_steps is not None  # requests come to a loaded model
        sampling_params = new_req_data.sampling_params
        extra_args = None if sampling_params is None else sampling_params.extra_args
        self.latent_steps.add(new_req_data.req_id, len(new_req_data.prompt_token_ids), extra_args)

    def get_mm_embeddings(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        *args: object,
    ) -> Tensor:
        # a model with images: this runner makes its input vectors here, before 0.29
        embeds = super().get_mm_embeddings(scheduled_encoder_inputs, input_batch, *args)
        self._begin(embeds, input_batch)
        return embeds

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        *args: object,
    ) -> Tensor:
        # and here from 0.29 on
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, *args)
        self._begin(embeds, input_batch)
        return embeds

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if self._embeds is None:
            return inputs
        # written in place: a captured graph reads this very buffer
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

    def _begin(self, embeds: Tensor, batch: InputBatch) -> None:
        """Feeds the recorded vectors of a step's inputs, in place."""
        steps = self.steps_of(batch)
        if steps is None:
            return
        starts_N = batch.num_computed_tokens_np.astype(np.int64)
        counts_N = batch.num_scheduled_tokens.astype(np.int64)
        # a row chooses where this step leaves no known token to compute
        is_choosing_N = starts_N + counts_N >= batch.prefill_len_np
        steps.begin(embeds, batch.req_ids, starts_N, counts_N, is_choosing_N)

    def steps_of(self, batch: InputBatch) -> LatentSteps | None:
        """The steps; None for the dummy batches of profiling and graph capture.

        No one has added the requests of those.
        """
        steps = self.latent_steps
        if steps is None or batch.req_ids[0] not in steps.prompt_lengths:
            return None
        return steps

    def custom_sampler(self, sampler: Sampler) -> tuple[LatentSampler, None]:
        """Wraps vLLM's sampler; it has no other for speculative decoding, which is refused."""
        return LatentSampler(sampler, self), None


class LatentSampler:
    """vLLM's sampler, then our choice."""

    def __init__(self, stock: Sampler, state: LatentModelState):
        self._stock = stock
        self._state = state

    def __getattr__(self, name: str) -> Any:
        # the runner asks its sampler for more than a call: `add_request`, `sampling_states`, …
        return getattr(self._stock, name)

    def __call__(
        self, logits: Tensor, input_batch: InputBatch, *args: object, **kwargs: object
    ) -> SamplerOutput:
        steps = self._state.steps_of(input_batch)
        if steps is None:
            return self._stock(logits, input_batch, *args, **kwargs)
        # as they are where nobody reads its draws: the copy costs a pass over [N, V]
        shown = steps.without_banned(logits) if steps.has_served_rows else logits
        output = self._stock(shown, input_batch, *args, **kwargs)
        steps.choose(
            self._state.model.scored_hidden,
            logits,
            output.sampled_token_ids,
            output.logprobs_tensors,
        )
        return output


class LatentRunnerV2(GPUModelRunner):
    """What a built runner's class becomes; over its CPU subclass, where it is one."""

    latent_steps: LatentSteps

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        # here, not in the state's `remove_request`, which preempted requests go through as well
        self.latent_steps.finish(scheduler_output.finished_req_ids)
        super().finish_requests(scheduler_output)


def install(runner: GPUModelRunner, steps: LatentSteps) -> None:
    """Gives a built runner and its model state our steps."""
    base = type(runner)
    runner.__class__ = type(f"Latent{base.__name__}", (LatentRunnerV2, base), {})
    runner.latent_steps = runner.model_state.latent_steps = steps
