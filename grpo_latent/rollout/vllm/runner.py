"""Hooks into vLLM's V1 model runner, before its forward and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from grpo_latent.rollout.vllm.steps import LatentSteps

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class LatentRunner(GPUModelRunner):
    """What a built runner's class becomes; over its CPU subclass, where it is one.

    `_update_states` knows who comes and goes, `_preprocess` owns the input vectors, `_sample` the
    next ids.
    """

    latent_steps: LatentSteps

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable | None:
        self.latent_steps.finish(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            extra_args = None if new.sampling_params is None else new.sampling_params.extra_args
            self.latent_steps.add(new.req_id, len(new.prompt_token_ids), extra_args)
        return super()._update_states(scheduler_output)

    def _preprocess(
        self,
        scheduler_output: SchedulerOutput,
        num_input_tokens: int,
        *args: object,
        **kwargs: object,
    ) -> tuple:
        # after vLLM's own, which fills the buffer of input vectors with embeddings of the ids
        outputs = super()._preprocess(scheduler_output, num_input_tokens, *args, **kwargs)
        num_reqs = self.input_batch.num_reqs
        request_ids = self.input_batch.req_ids[:num_reqs]
        self.latent_steps.begin(
            outputs[1],
            request_ids,
            self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64),
            np.array(
                [scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids]
            ),
            # vLLM discards what a row samples before its known tokens are all computed
            ~self.discard_request_mask.np[:num_reqs].astype(bool),
        )
        return outputs

    def _sample(
        self, logits: Tensor, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        steps = self.latent_steps
        # vLLM's sampler, several passes over [N, V], only where someone reads what it draws
        if (
            steps.has_served_rows
            or self.input_batch.sampling_metadata.max_num_logprobs is not None
        ):
            output = super()._sample(steps.without_banned(logits), spec_decode_metadata)
        else:
            tokens_N1 = torch.zeros(
                self.input_batch.num_reqs, 1, dtype=torch.int32, device=logits.device
            )
            output = SamplerOutput(sampled_token_ids=tokens_N1, logprobs_tensors=None)
        steps.choose(
            self.get_model().scored_hidden,
            logits,
            output.sampled_token_ids,
            output.logprobs_tensors,
        )
        return output


def install(runner: GPUModelRunner, steps: LatentSteps) -> None:
    """Gives a built runner our hooks; its class keeps its own name in vLLM's logs."""
    base = type(runner)
    runner.__class__ = type(f"Latent{base.__name__}", (LatentRunner, base), {})
    runner.latent_steps = steps
