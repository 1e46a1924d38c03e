"""Drives a vLLM engine with latents, whether the engine runs in this process or in another.

request ──submissions──▶ (key, vLLM's prompt, vLLM's sampling params), one a trajectory
vLLM's completion + the worker's record ──trajectory──▶ Trajectory
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError, RolloutError
from grpo_latent.latent.treatments import Mask, Treatment
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.request import LatentRequest, RowSampling
from grpo_latent.rollout.vllm.skeleton import (
    CONFIG_KEY,
    WorkerOptions,
    check_treatment,
    read_skeleton,
)
from grpo_latent.rollout.vllm.supported import (
    ENGINE_HF,
    NORMALIZES_PIXELS,
    SCHEDULER_CLASSES,
    WORKER_CLASSES,
    installed_release,
)
from grpo_latent.rollout.vllm.wire import Packed, unpack
from grpo_latent.trajectory import PositionKind, Trajectory, fed_mask

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


class FrontEnd:
    """Knows one checkpoint: what its engine is started with, is asked, and has answered.

    Args: as `VllmRolloutEngine`.

    Attributes:
        policy_version: of the weights that the engine holds; whoever loads weights sets it.
    """

    def __init__(
        self,
        folder: str | Path,
        overrides: dict | None,
        max_model_len: int,
        max_latents: int | None = None,
        banned_ids: Iterable[int] = (),
        treatment: Treatment | None = None,
    ):
        self.skeleton = read_skeleton(folder, overrides)
        treatment = treatment or Mask()
        check_treatment(treatment, self.skeleton.mechanism)
        self.mechanism = self.skeleton.mechanism
        self.adapter = self.skeleton.adapter
        self.options = WorkerOptions(
            self.mechanism,
            tuple(self.skeleton.banned_ids(banned_ids)),
            max_latents,
            treatment,
        )
        self.max_model_len = max_model_len
        self.max_latents = self.options.room(max_model_len)
        self.policy_version = 0

    def engine_arguments(self, is_cpu: bool, is_async: bool) -> dict:
        """Arguments of vLLM's engine that latents need.

        By the names of `vllm.LLM` and, as JSON, of its command line.
        """
        arguments = {
            "worker_cls": WORKER_CLASSES["cpu" if is_cpu else "cuda"],
            "scheduler_cls": SCHEDULER_CLASSES[is_async],
            "async_scheduling": is_async,
            "additional_config": {CONFIG_KEY: self.options.to_json()},
        }
        if not self.adapter.has_vision:
            return arguments
        arguments |= {"limit_mm_per_prompt": {"video": 0}, "mm_processor_cache_gb": 0}
        if installed_release() >= (0, 28):
            arguments[NORMALIZES_PIXELS] = False
        return arguments

    def check(self, request: RolloutRequest, sampling: SamplingParams) -> None:
        """Raises `RolloutError` for a request that this engine cannot run."""
        where = f"request of group {request.group_id!r}"
        self.adapter.check_prompt(request.prompt_ids, request.images, where)
        ablated = (
            request.latent_override is not None
            or request.blind_after_span
            or request.max_spans is not None
        )
        if ablated or request.steps == 0:
            raise RolloutError(
                "engine vllm takes no latent_override and no other ablation",
                where=where,
                got=f"{request.latent_override}, steps {request.steps}, "
                f"max_spans {request.max_spans}",
                expected="None, steps >= 1",
                fix=f"Run causal ablations on {ENGINE_HF}.",
            )
        steps = request.steps or self.mechanism.steps
        self._check_slots(self.mechanism.num_slots(steps), sampling, where)
        max_spans = self.mechanism.max_spans
        # without a bound of spans nobody knows yet: then `trajectory` finds that room ran out
        if (
            max_spans is not None
            and min(steps * max_spans, sampling.max_new_tokens) > self.max_latents
        ):
            raise self._no_room(where, f"{max_spans} span(s) of {steps} steps")
        length = request.prompt_ids.shape[0] + sampling.max_new_tokens
        if length > self.max_model_len:
            raise RolloutError(
                "prompt and completion do not fit",
                where=where,
                got=f"{request.prompt_ids.shape[0]} + {sampling.max_new_tokens} positions",
                expected=f"<= max_model_len = {self.max_model_len}",
                fix="Raise max_model_len, or lower max_new_tokens.",
            )

    def _check_slots(self, num_slots: int, sampling: SamplingParams, where: str) -> None:
        """Raises `RolloutError` where slots leave no position to text, which is what acts."""
        if num_slots > self.max_latents:
            raise self._no_room(where, f"{num_slots} slots")
        if num_slots >= sampling.max_new_tokens:
            raise RolloutError(
                "no room for text after the slots",
                where=where,
                got=f"max_new_tokens {sampling.max_new_tokens}, {num_slots} slots",
                expected="max_new_tokens beyond the slots",
                fix="Raise the response length, or lower latent.steps.",
            )

    def submissions(
        self, request: RolloutRequest, keys: list[str], sampling: SamplingParams
    ) -> list[tuple]:
        """(key, prompt, sampling params) of each trajectory, as `add_request` takes them."""
        # here, so that a front end can be made, and its requests checked, without vLLM
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind

        from grpo_latent.rollout.vllm.inputs import engine_input

        prompt = engine_input(request, self.adapter, self.policy_version)
        submissions = []
        row_sampling = RowSampling(sampling.temperature, sampling.top_k, sampling.top_p)
        for key, seed in zip(keys, request.seeds, strict=True):
            latent = LatentRequest(key, request.steps, row_sampling, seed)
            # our sampler draws; vLLM's is told greedy so that it prepares nothing. Its own EOS
            # handling is replaced by the list of all EOS ids: none of them can stand inside a span
            params = VllmSamplingParams(
                temperature=0.0,
                max_tokens=sampling.max_new_tokens,
                ignore_eos=True,
                stop_token_ids=list(self.skeleton.eos_ids),
                detokenize=False,
                # outputs on the way would be dropped
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=latent.to_extra_args(),
            )
            submissions.append((key, prompt, params))
        return submissions

    def trajectory(
        self,
        request: RolloutRequest,
        seed: int,
        completion: CompletionOutput,
        packed: dict[str, Packed],
    ) -> Trajectory:
        """The trajectory of a completion and of what `latent_pop` returned for the same key.

        Raises:
            LatentMismatchError: the two disagree.
            RolloutError: more latents than there was room for, or vLLM gave the request up.
        """
        where = f"request of group {request.group_id!r}, seed {seed}"
        if completion.finish_reason not in ("stop", "length"):
            got = f"finish_reason {completion.finish_reason!r}"
            raise RolloutError(
                "vLLM did not finish a request", where=where, got=got, expected="stop or length"
            )
        record: dict[str, Tensor] = {name: unpack(value) for name, value in packed.items()}
        token_ids = torch.tensor(list(completion.token_ids), dtype=torch.long)
        # asynchronous scheduling may have computed a position past the end
        kinds = record["kinds"][: len(token_ids)]
        num_latents = int(fed_mask(kinds).sum())
        if record["latents"].shape[0] < num_latents:
            raise self._no_room(where, f"{num_latents} latent steps")
        # the worker places the ids that vLLM returns, so they agree unless a step was lost
        if not torch.equal(
            token_ids == self.mechanism.placeholder_id(PositionKind.LATENT),
            kinds == PositionKind.LATENT,
        ):
            raise LatentMismatchError(
                "vLLM's tokens and the worker's record disagree",
                where=where,
                got=token_ids.tolist(),
                expected=f"latents at {(kinds == PositionKind.LATENT).nonzero()[:, 0].tolist()}",
            )
        return Trajectory(
            prompt_ids=request.prompt_ids.cpu(),
            token_ids=token_ids,
            kinds=kinds,
            latents=record["latents"][:num_latents].float(),
            # as engine hf has it, no rows where a treatment records nothing
            latent_aux=record["latent_aux"][
                : num_latents if self.options.treatment.aux_size else 0
            ],
            rollout_log_probs=record["rollout_log_probs"][: len(token_ids)],
            sampling_log_probs=record["sampling_log_probs"][: len(token_ids)],
            stop_reason="eos" if completion.finish_reason == "stop" else "length",
            group_id=request.group_id,
            seed=seed,
            policy_version=self.policy_version,
        )

    def _no_room(self, where: str, got: str) -> RolloutError:
        """The error of more latents than the worker's table has room for."""
        return RolloutError(
            "more latent steps than the engine has room for",
            where=where,
            got=got,
            expected=f"<= max_latents = {self.max_latents} of a completion",
            fix="Raise max_latents of the engine (under verl latent.max_latents), "
            "or set latent.max_spans.",
        )
