"""Engine `vllm`: the same protocol as engine `hf`, on stock vLLM in this process.

Greedy trajectories are engine hf's; sampled ones draw the same uniform numbers, so they differ only where rounding moves a
token across a boundary. In-process vLLM changes its process: `torch.set_num_threads` no longer acts, a gloo group exists,
and the environment pins the V1 runner.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from grpo_latent import torchvision_ops
from grpo_latent.errors import CheckpointError, LatentMismatchError, RolloutError
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.compat import SCHEDULER_CLASSES, WORKER_CLASSES, check_options, check_version, pin_runner
from grpo_latent.rollout.vllm.skeleton import CONFIG_KEY, WorkerOptions, read_skeleton
from grpo_latent.rollout.vllm.wire import unpack
from grpo_latent.trajectory import PositionKind, Trajectory


class VllmRolloutEngine:
    """Latent rollouts in vLLM. Implements `RolloutEngine`.

    Args:
        folder: a latent checkpoint (`load_latent_model`'s layout).
        overrides: fields of `LatentConfig` to replace.
        banned_ids: tokens never sampled, besides those that engine hf bans.
        dtype: of weights, keys and values.
        max_model_len: longest prompt and completion together.
        max_latents: latent steps that a completion may hold; None takes what `max_spans` allows, or 256.
        vllm_options: further arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `enforce_eager`.

    Raises:
        PluginError: vLLM's version or symbols are not those that this engine was written against.
        ConfigError: a mechanism or option that latents do not go through in vLLM.
    """

    def __init__(
        self,
        folder: str | Path,
        overrides: dict | None = None,
        banned_ids: Iterable[int] = (),
        dtype: torch.dtype = torch.float32,
        max_model_len: int = 4096,
        max_latents: int | None = None,
        **vllm_options,
    ):
        self.skeleton = read_skeleton(folder, overrides)
        self.config, self.adapter = self.skeleton.config, self.skeleton.adapter
        check_options(vllm_options)
        pin_runner()
        torchvision_ops.install()
        # read when vllm is imported: the engine must live in this process, where its RPCs can take tensors
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        check_version(vllm.__version__)
        from vllm.platforms import current_platform

        from grpo_latent.rollout.vllm.model import register_latent_model

        register_latent_model(self.adapter.model.config.architectures[0])
        options = WorkerOptions(self.config, tuple(self.skeleton.banned_ids(banned_ids)), max_latents)
        # vLLM turns asynchronous scheduling off on CPU after this; the scheduler class must agree with the result
        is_async = vllm_options.pop("async_scheduling", not current_platform.is_cpu())
        if self.adapter.has_vision:
            vllm_options.setdefault("limit_mm_per_prompt", {"video": 0})
            vllm_options.setdefault("mm_processor_cache_gb", 0)
        else:
            vllm_options["enable_prompt_embeds"] = True  # makes the runner feed vectors
        self.max_model_len, self.max_latents, self.policy_version = max_model_len, options.room(max_model_len), 0
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            worker_cls=WORKER_CLASSES["cpu" if current_platform.is_cpu() else "cuda"],
            scheduler_cls=SCHEDULER_CLASSES[is_async],
            async_scheduling=is_async,
            additional_config={CONFIG_KEY: options.to_json()},
            **vllm_options,
        )
        self._request_ids, self._num_cached_tokens = itertools.count(), 0

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start: the worker's `latent_stats`, and `num_cached_tokens`, prefix-cache hits."""
        return self._rpc("latent_stats") | {"num_cached_tokens": self._num_cached_tokens}

    def _rpc(self, method: str, **kwargs):
        return self._llm.collective_rpc(method, kwargs=kwargs)[0]

    def generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        for request in requests:
            self._check_request(request, sampling)
        keys = [[str(next(self._request_ids)) for _ in request.seeds] for request in requests]
        try:
            for request, own_keys in zip(requests, keys, strict=True):
                self._submit(request, own_keys, sampling)
            outputs = self._run()
        except BaseException:
            self._llm.llm_engine.abort_request([key for own_keys in keys for key in own_keys])
            raise
        finally:
            packed = self._rpc("latent_pop", keys=[key for own_keys in keys for key in own_keys])
        records = {key: {name: unpack(value) for name, value in record.items()} for key, record in packed.items()}
        return [
            [
                self._trajectory(request, seed, outputs[key], records[key])
                for seed, key in zip(request.seeds, own_keys, strict=True)
            ]
            for request, own_keys in zip(requests, keys, strict=True)
        ]

    def _check_request(self, request: RolloutRequest, sampling: SamplingParams) -> None:
        where = f"request of group {request.group_id!r}"
        self.adapter.check_prompt(request.prompt_ids, request.images, where)
        ablated = request.latent_override is not None or request.blind_after_span or request.max_spans is not None
        if ablated or request.steps == 0:
            raise RolloutError(
                "engine vllm takes no latent_override and no other ablation",
                where=where,
                got=f"{request.latent_override}, steps {request.steps}, max_spans {request.max_spans}",
                expected="None, steps >= 1",
                fix="Run causal ablations on engine hf (rollout.engine=hf).",
            )
        steps, max_spans = request.steps or self.config.steps, self.config.max_spans
        if max_spans is not None and min(steps * max_spans, sampling.max_new_tokens) > self.max_latents:
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

    def _submit(self, request: RolloutRequest, keys: list[str], sampling: SamplingParams) -> None:
        from vllm import SamplingParams as VllmSamplingParams

        from grpo_latent.rollout.vllm.inputs import engine_input

        prompt = engine_input(request, self.adapter, self.policy_version)
        for key, seed in zip(keys, request.seeds, strict=True):
            latent = {
                "key": key,
                "seed": seed,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "steps": request.steps,
            }
            # our sampler draws; vLLM's is told greedy so that it prepares nothing. Its own EOS handling is replaced by the
            # list of all EOS ids: none of them can stand inside a span
            params = VllmSamplingParams(
                temperature=0.0,
                max_tokens=sampling.max_new_tokens,
                ignore_eos=True,
                stop_token_ids=list(self.skeleton.eos_ids),
                detokenize=False,
                extra_args={"latent": latent},
            )
            self._llm.llm_engine.add_request(key, prompt, params)

    def _run(self) -> dict:
        """Steps until all requests are done: request id -> completion."""
        engine, outputs = self._llm.llm_engine, {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outputs[output.request_id] = output.outputs[0]
                    self._num_cached_tokens += output.num_cached_tokens or 0
        return outputs

    def _trajectory(self, request: RolloutRequest, seed: int, completion, record: dict[str, Tensor]) -> Trajectory:
        token_ids = torch.tensor(list(completion.token_ids), dtype=torch.long)
        # asynchronous scheduling may have computed a position past the end
        kinds = record["kinds"][: len(token_ids)]
        num_latents = int((kinds == PositionKind.LATENT).sum())
        if record["latents"].shape[0] < num_latents:
            raise self._no_room(f"request of group {request.group_id!r}, seed {seed}", f"{num_latents} latent steps")
        if not torch.equal(token_ids == self.config.latent_id, kinds == PositionKind.LATENT):
            raise LatentMismatchError(
                "vLLM's tokens and the worker's record disagree",
                where=f"request of group {request.group_id!r}, seed {seed}",
                got=token_ids.tolist(),
                expected=f"latents at {(kinds == PositionKind.LATENT).nonzero()[:, 0].tolist()}",
            )
        return Trajectory(
            prompt_ids=request.prompt_ids.cpu(),
            token_ids=token_ids,
            kinds=kinds,
            latents=record["latents"][:num_latents].float(),
            rollout_log_probs=record["rollout_log_probs"][: len(token_ids)],
            sampling_log_probs=record["sampling_log_probs"][: len(token_ids)],
            stop_reason="eos" if completion.finish_reason == "stop" else "length",
            group_id=request.group_id,
            seed=seed,
            policy_version=self.policy_version,
        )

    def _no_room(self, where: str, got: str) -> RolloutError:
        return RolloutError(
            "more latent steps than the engine has room for",
            where=where,
            got=got,
            expected=f"<= max_latents = {self.max_latents} of a completion",
            fix="Raise max_latents of the engine, or set latent.max_spans.",
        )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces every parameter; names as in the Hugging Face model's `state_dict`.

        All weights are checked before the first one is loaded: vLLM cannot go back once it has begun.

        Raises:
            CheckpointError: an unknown name, a wrong shape, or a parameter that was not given.
            RolloutError: the prefix cache could not be emptied.
        """
        own = self.adapter.model.state_dict(keep_vars=True)
        missing, received = {id(tensor) for tensor in own.values()}, []
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                expected = tuple(own[name].shape) if name in own else "a name of the model's state_dict"
                raise CheckpointError(
                    "weight does not fit", where=name, got=f"shape {tuple(tensor.shape)}", expected=str(expected)
                )
            missing.discard(id(own[name]))  # by identity: tied weights arrive under one of their names
            received.append((name, tensor))
        if missing:
            names = [name for name, tensor in own.items() if id(tensor) in missing]
            raise CheckpointError("weights were not sent", where="load_weights", got=names[:5], expected="all weights")
        self._rpc("latent_reload", weights=self._under_embedding_name(received))
        if not self._llm.llm_engine.reset_prefix_cache():
            raise RolloutError("the prefix cache is in use", where="load_weights", expected="no request in flight")
        self.policy_version = policy_version

    def _under_embedding_name(self, weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Tied weights under the name that vLLM loads: it skips `lm_head.weight` there."""
        own = dict(self.adapter.model.named_parameters())
        tied = self.adapter.model.get_output_embeddings().weight is self.adapter.model.get_input_embeddings().weight
        if not tied or any(name in own and name.endswith("embed_tokens.weight") for name, _ in weights):
            return weights
        embedding = next(name for name in own if name.endswith("embed_tokens.weight"))
        return [(embedding if name == "lm_head.weight" else name, tensor) for name, tensor in weights]

    def close(self) -> None:
        """Stops vLLM and frees its memory."""
        self._llm.llm_engine.engine_core.shutdown()
