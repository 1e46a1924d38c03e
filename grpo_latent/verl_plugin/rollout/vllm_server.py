"""Rollout backend `vllm_latent`: verl's vLLM replica and server, with latents and whole groups.

    agent loop ──group, ticket──▶ LatentVllmServer ──▶ AsyncLLM ══▶ engine core ▸ latent worker
                                  wave barrier                      a process of its own  ▲ ▲
                                  records ◀────────── latent_pop ─────────────────────────┘ │
    training worker ── verl's ServerAdapter: weights by CUDA IPC, on CPU shared memory ─────┘

The same code serves GPU and CPU; verl's server runs vLLM's asynchronous engine, whose core is a
process of its own. What differs on CPU: the launch (there is no accelerator to ask a worker for),
the executor (one worker, inside the engine's process: vLLM's multi-process executor would reserve
one of the cores), the reload of packed weights, and no sleep.

A wave is admitted as a whole before vLLM schedules any of it, so that continuous batching,
preemption and chunked prefill depend on the wave and not on timing, and a resumed run repeats an
uninterrupted one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.device import get_device_name

from grpo_latent.common.listeners import listen_on
from grpo_latent.common.manifest import check_whole
from grpo_latent.errors import RolloutError
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.frontend import FrontEnd
from grpo_latent.rollout.vllm.supported import check_options, check_version, pin_runner
from grpo_latent.rollout.vllm.wire import agreed
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import VLLM_ROLLOUT_NAME, verify
from grpo_latent.verl_plugin.rollout import vllm_compat  # noqa: F401  (before verl's)
from grpo_latent.verl_plugin.rollout.server import GroupResult, group_result, whereabouts
from grpo_latent.verl_plugin.rollout.waves import MAX_CALLS, Ticket, Waves

# isort: split
import vllm
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

EXTENSION = "grpo_latent.verl_plugin.rollout.vllm_worker.LatentWorkerExtension"
DISCARD_TIMEOUT_S = 30.0
# vLLM lets the worker stay in the engine's process ("uni") on CPU only where it believes that it
# runs in one process
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class LatentVllmServer(vLLMHttpServer):
    """verl's server of one replica; whole groups come in, by `generate_group`, no requests."""

    def __init__(self, config, model_config, *args, **kwargs):
        name = f"vLLM server {kwargs['replica_rank']}"
        verify(name)
        check_version(vllm.__version__)
        pin_runner()  # inherited by the engine's process
        listen_on(ray.util.get_node_ip_address())  # as this is, in its environment,
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())  # and this
        self.options = LatentOptions.from_rollout(config)
        super().__init__(config, model_config, *args, **kwargs)
        check_whole(self.model_config.local_path, self.options.verify_digests)
        self.front = FrontEnd(
            self.model_config.local_path,
            self.options.overrides,
            self.config.max_model_len,
            self.options.max_latents,
            treatment=self.options.treatment,
        )
        self.waves = Waves(self._run_wave, self.options.rollout_timeout_s, name)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keys = itertools.count()

    # ---- verl's hooks ---------------------------------------------------------------------------

    def _validate_configs(self) -> None:
        if self.config.max_model_len is None:
            # the latent table has room for as many positions in each of its seats
            self.config.max_model_len = self.config.prompt_length + self.config.response_length
        super()._validate_configs()

    def _preprocess_engine_kwargs(self, engine_kwargs: dict) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        check_options(engine_kwargs)
        is_cpu = get_device_name() == "cpu"
        if is_cpu:
            engine_kwargs.setdefault("distributed_executor_backend", "uni")
        is_async = bool(engine_kwargs.pop("async_scheduling", not is_cpu))
        engine_kwargs.update(self.front.engine_arguments(is_cpu, is_async) | engine_kwargs)

    def _get_worker_extension_cls(self) -> str:
        return EXTENSION

    # ---- groups ---------------------------------------------------------------------------------

    async def generate(self, *args, **kwargs):
        raise RolloutError(
            "engine vllm serves whole groups, not single requests",
            where="actor_rollout_ref.rollout.agent.default_agent_loop",
            got="an agent loop of verl's",
            expected="latent_agent",
        )

    async def generate_group(
        self, ticket: Ticket, request: RolloutRequest, sampling: SamplingParams
    ) -> GroupResult:
        self._loop = asyncio.get_running_loop()
        return await self.waves.join(ticket, (request, sampling))

    async def fail_wave(self, wave_id: str, error: BaseException) -> None:
        self.waves.fail(wave_id, error)

    def _run_wave(
        self, payloads: list[tuple[RolloutRequest, SamplingParams]]
    ) -> list[GroupResult]:
        """In the thread of the waves; vLLM's client belongs to the event loop."""
        assert self._loop is not None, "a wave runs once its requests have come in"
        return asyncio.run_coroutine_threadsafe(self._generate(payloads), self._loop).result()

    async def _generate(
        self, payloads: list[tuple[RolloutRequest, SamplingParams]]
    ) -> list[GroupResult]:
        front = self.front
        front.policy_version = int(self.global_steps or 0)
        keys_of_group = [[str(next(self._keys)) for _ in request.seeds] for request, _ in payloads]
        submissions: list[tuple[str, Any, Any]] = []
        for (request, sampling), keys in zip(payloads, keys_of_group, strict=True):
            front.check(request, sampling)
            submissions += front.submissions(request, keys, sampling)
        all_keys = [key for key, _, _ in submissions]
        try:
            completions = await self._complete(submissions)
        except BaseException:
            await self._discard(all_keys)
            raise
        packed = agreed(await self._pop(all_keys))
        results = []
        for (request, _), keys in zip(payloads, keys_of_group, strict=True):
            pairs = zip(request.seeds, keys, strict=True)
            group = [
                front.trajectory(request, seed, completions[key], packed[key])
                for seed, key in pairs
            ]
            results.append(group_result(front.adapter, request, group, front.skeleton.eos_ids))
        return results

    async def _pop(self, keys: list[str]) -> list:
        return await self.engine.collective_rpc("latent_pop", kwargs={"keys": keys})

    async def _discard(self, keys: list[str]) -> None:
        """Drops requests and records of a failed wave; an engine that has died may not answer."""
        with suppress(Exception):
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                await self.engine.abort(keys)
                await self._pop(keys)

    async def _complete(self, submissions: list[tuple[str, Any, Any]]) -> dict[str, Any]:
        """vLLM's completions by key."""
        # the scheduler stands still until all requests are there, so that what it batches does not
        # depend on timing
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        try:
            queues = {
                key: await self.engine.add_request(key, prompt, params)
                for key, prompt, params in submissions
            }
        finally:
            await self.engine.resume_generation()
        return {key: (await queue.get()).outputs[0] for key, queue in queues.items()}


class LatentVllmReplica(vLLMReplica):
    """verl's replica around `LatentVllmServer`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(LatentVllmServer)

    def _get_server_name_prefix(self) -> str:
        # verl's adapter in the training workers makes it of the backend's name
        return f"{VLLM_ROLLOUT_NAME}_"

    @property
    def max_concurrency(self) -> int:
        return MAX_CALLS

    def rollout_worker_use_gpu(self) -> bool:
        return get_device_name() != "cpu"

    async def launch_servers(self) -> None:
        if get_device_name() != "cpu":
            await super().launch_servers()
            return
        # verl's launch for one node, without the devices of the workers
        node_id, _ = await self.workers[0].__ray_call__.remote(whereabouts)
        server = self.server_class.options(
            num_cpus=0,
            max_concurrency=self.max_concurrency,
            name=f"{self._get_server_name_prefix()}server_{self.replica_rank}_0{self.name_suffix}",
            runtime_env={"env_vars": CPU_ENVIRONMENT},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        ).remote(
            config=self.config,
            model_config=self.model_config,
            rollout_mode=self.rollout_mode,
            workers=self.workers,
            replica_rank=self.replica_rank,
            node_rank=0,
            gpus_per_node=1,
            nnodes=1,
            cuda_visible_devices="",
        )
        await server.launch_server.remote()
        address, port = await server.get_server_address.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = f"{address}:{port}"
