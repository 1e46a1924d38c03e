"""Engine `vllm`: the same protocol as engine `hf`, on stock vLLM in this process.

Greedy trajectories are engine hf's; sampled ones draw the same uniform numbers, so they differ
only where rounding moves a token across a boundary. In-process vLLM changes its process:
`torch.set_num_threads` no longer acts, a gloo group exists, and the environment pins the model
runner.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_latent import torchvision_ops
from grpo_latent.common.listeners import LOOPBACK
from grpo_latent.errors import CheckpointError, RolloutError
from grpo_latent.latent.treatments import Treatment
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.frontend import FrontEnd
from grpo_latent.rollout.vllm.supported import check_options, check_version, pin_runner
from grpo_latent.rollout.vllm.wire import agreed
from grpo_latent.trajectory import Trajectory

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


class VllmRolloutEngine:
    """Latent rollouts in vLLM. Implements `RolloutEngine`.

    Args:
        folder: a latent checkpoint (`load_latent_model`'s layout).
        overrides: settings of the mechanism to replace.
        banned_ids: tokens never sampled, besides those that engine hf bans.
        dtype: of weights, keys and values.
        max_model_len: longest prompt and completion together.
        max_latents: latent steps that a completion may hold; None takes what `max_spans` allows,
            or 256.
        treatment: what RL makes of latents; it decides what is fed and recorded at them. None is
            `mask`.
        vllm_options: further arguments of `vllm.LLM`, such as `gpu_memory_utilization` or
            `enforce_eager`.

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
        treatment: Treatment | None = None,
        **vllm_options: Any,
    ):
        self.front = FrontEnd(folder, overrides, max_model_len, max_latents, banned_ids, treatment)
        self.skeleton = self.front.skeleton
        self.mechanism = self.front.mechanism
        self.adapter = self.front.adapter
        check_options(vllm_options)
        pin_runner()
        # before vllm is imported: its models import torchvision
        torchvision_ops.install()
        # read when vllm is imported: the engine must live in this process, where its RPCs can take
        # tensors
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # one machine: vLLM's collectives of one rank would listen on its address to the network
        os.environ.setdefault("VLLM_HOST_IP", LOOPBACK)
        import vllm

        check_version(vllm.__version__)
        from vllm.platforms import current_platform

        from grpo_latent.rollout.vllm.model import register_latent_model

        architectures = self.adapter.model.config.architectures
        assert architectures  # `read_skeleton` asks for one
        register_latent_model(architectures[0])
        # vLLM turns asynchronous scheduling off on CPU after this; the scheduler class must agree
        # with the result
        is_cpu = current_platform.is_cpu()
        arguments = self.front.engine_arguments(
            is_cpu, is_async=vllm_options.pop("async_scheduling", not is_cpu)
        )
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            **arguments | vllm_options,
        )
        self._request_ids = itertools.count()
        self._num_cached_tokens = 0

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start: the worker's `latent_stats` and `num_cached_tokens`.

        The latter are prompt tokens whose keys and values the prefix cache had.
        """
        return self._rpc("latent_stats")[0] | {"num_cached_tokens": self._num_cached_tokens}

    @property
    def policy_version(self) -> int:
        """Of the weights that the engine holds."""
        return self.front.policy_version

    def _rpc(self, method: str, **kwargs: object) -> list[Any]:
        """What the workers answer, by rank."""
        return self._llm.collective_rpc(method, kwargs=kwargs)

    def generate(
        self, requests: list[RolloutRequest], sampling: SamplingParams
    ) -> list[list[Trajectory]]:
        """One list of trajectories a request, in the order of its seeds."""
        for request in requests:
            self.front.check(request, sampling)
        keys = [[str(next(self._request_ids)) for _ in request.seeds] for request in requests]
        try:
            for request, own_keys in zip(requests, keys, strict=True):
                for key, prompt, params in self.front.submissions(request, own_keys, sampling):
                    self._llm.llm_engine.add_request(key, prompt, params)
            outputs = self._run()
        except BaseException:
            # an interrupted batch must not go on beside the next one
            self._llm.llm_engine.abort_request([key for own_keys in keys for key in own_keys])
            raise
        finally:
            # after a failure, too: records that no one pops would stay in the worker
            answers = self._rpc("latent_pop", keys=[key for own_keys in keys for key in own_keys])
        packed = agreed(answers)
        return [
            [
                self.front.trajectory(request, seed, outputs[key], packed[key])
                for seed, key in zip(request.seeds, own_keys, strict=True)
            ]
            for request, own_keys in zip(requests, keys, strict=True)
        ]

    def _run(self) -> dict[str, CompletionOutput]:
        """Steps until all requests are done: request id -> completion."""
        engine = self._llm.llm_engine
        outputs = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outputs[output.request_id] = output.outputs[0]
                    self._num_cached_tokens += output.num_cached_tokens or 0
        return outputs

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replaces every parameter; names as in the Hugging Face model's `state_dict`.

        All weights are checked before the first one is loaded: vLLM cannot go back once it has
        begun.

        Raises:
            CheckpointError: an unknown name, a wrong shape, or a parameter that was not given.
            RolloutError: the prefix cache could not be emptied.
        """
        own = self.adapter.model.state_dict(keep_vars=True)
        missing = {id(tensor) for tensor in own.values()}
        received = []
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                expected = (
                    tuple(own[name].shape) if name in own else "a name of the model's state_dict"
                )
                raise CheckpointError(
                    "weight does not fit",
                    where=name,
                    got=f"shape {tuple(tensor.shape)}",
                    expected=str(expected),
                )
            # by identity: tied weights arrive under one of their names
            missing.discard(id(own[name]))
            received.append((name, tensor))
        if missing:
            names = [name for name, tensor in own.items() if id(tensor) in missing]
            raise CheckpointError(
                "weights were not sent",
                where="load_weights",
                got=names[:5],
                expected="all weights",
            )
        self._rpc("latent_reload", weights=self._under_embedding_name(received))
        # encoded images and keys of the old weights
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.llm_engine.reset_prefix_cache():
            raise RolloutError(
                "the prefix cache is in use", where="load_weights", expected="no request in flight"
            )
        self.front.policy_version = policy_version

    def _under_embedding_name(self, weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Tied weights under the name that vLLM loads: it skips `lm_head.weight` there."""
        model = self.adapter.model
        weight = model.get_input_embeddings().weight
        if model.get_output_embeddings().weight is not weight:
            return weights
        embedding = next(name for name, own in model.named_parameters() if own is weight)
        if any(name == embedding for name, _ in weights):
            return weights
        return [
            (embedding if name == "lm_head.weight" else name, tensor) for name, tensor in weights
        ]

    def close(self) -> None:
        """Stops vLLM and frees its memory."""
        self._llm.llm_engine.engine_core.shutdown()
