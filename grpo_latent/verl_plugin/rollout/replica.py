"""Rollout backend `hf_latent`: replica, weight adapter and client around `LatentRolloutServer`.

The client serves backend `vllm_latent` too, whose replica and server are in `vllm_server`;
importing that imports vllm, so both are registered here by name.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Generator
from typing import Any

import ray
from omegaconf import OmegaConf
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.device import get_device_name
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.errors import RolloutError
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.registration import ROLLOUT_NAME, VLLM_ROLLOUT_NAME
from grpo_latent.verl_plugin.rollout.server import GroupResult, LatentRolloutServer, whereabouts
from grpo_latent.verl_plugin.rollout.waves import MAX_CALLS, Ticket
from grpo_latent.verl_plugin.rollout.weights import Bucket, WeightSender


def server_name(replica_rank: int) -> str:
    return f"{ROLLOUT_NAME}_server_{replica_rank}"


class LatentReplica(RolloutReplica):
    """One server beside each training worker, on its node and, on GPUs, on its device."""

    def rollout_worker_use_gpu(self) -> bool:
        return get_device_name() != "cpu"

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise RolloutError(
                "engine hf runs on one device",
                where="actor_rollout_ref.rollout.tensor_model_parallel_size",
                got=self.world_size,
                expected="1",
            )
        name = server_name(self.replica_rank)
        server = await launch_server(
            name, self.workers[0], self.config, self.model_config, self.replica_rank
        )
        self.servers, self._server_handle, self._server_address = [server], server, name


async def launch_server(
    name: str, worker, rollout_config, model_config, replica_rank: int = 0
) -> ray.actor.ActorHandle:
    """A server with engine hf beside a training worker, on its node and, on GPUs, its device."""
    place = beside(*await worker.__ray_call__.remote(whereabouts))
    return await start_server(name, place, rollout_config, model_config, replica_rank)


def beside(node_id: str, visible: str | None) -> dict[str, Any]:
    """Options of an actor on a training worker's node, with the devices that the worker sees."""
    env_vars = {"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {}
    if visible is not None:
        # the server shares the worker's device and must not have Ray hide it from an actor with
        # num_gpus=0
        env_vars |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return {
        "num_cpus": 0,
        "runtime_env": {"env_vars": env_vars},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
    }


async def start_server(
    name: str, where: dict[str, Any], rollout_config, model_config, replica_rank: int
) -> ray.actor.ActorHandle:
    """A server with engine hf that is ready; see `make_server`."""
    server = make_server(name, where, rollout_config, model_config, replica_rank)
    await server.wake_up.remote()
    return server


def make_server(
    name: str, where: dict[str, Any], rollout_config, model_config, replica_rank: int
) -> ray.actor.ActorHandle:
    """A server with engine hf that loads its model; the one of this name, where there is one.

    Args:
        where: options of its actor that say where it runs.
    """
    # engine hf adds a bias to the scores, which flash kernels do not take: training may have them
    attention = (model_config.get("override_config", None) or {}).get(
        "attn_implementation", "sdpa"
    )
    server = (
        ray.remote(LatentRolloutServer)
        .options(name=name, get_if_exists=True, max_concurrency=MAX_CALLS, **where)
        .remote(
            local_folder(model_config),
            OmegaConf.to_container(OmegaConf.create(dict(rollout_config)), resolve=True),
            replica_rank,
            get_device_name(),
            attention if attention in ("sdpa", "eager") else "sdpa",
        )
    )
    # ray's annotation adds the class itself, for editors
    assert isinstance(server, ray.actor.ActorHandle)
    return server


def local_folder(model_config) -> str:
    from verl.utils.fs import copy_to_local

    return copy_to_local(model_config.path, use_shm=model_config.get("use_shm", False))


class LatentServerAdapter(BaseRollout):
    """Lives in a training worker and sends its weights to the server of the same rank."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1, **kwargs):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None:
        await ray.get_actor(server_name(self.replica_rank)).wake_up.remote()

    async def release(self) -> None:
        await ray.get_actor(server_name(self.replica_rank)).sleep.remote()

    async def update_weights(
        self, weights: Generator, wire_format="named_tensors", global_steps=None, **kwargs
    ) -> None:
        server = ray.get_actor(server_name(self.replica_rank))
        await send_weights_beside(server, weights, self.config, int(global_steps or 0))


async def send_weights(
    servers: list[ray.actor.ActorHandle], weights: Generator, rollout_config, policy_version: int
) -> None:
    """Sends every weight in buckets through the object store to servers with engine hf.

    Reading `weights` is a collective over all ranks.
    """
    dtype = parse_dtype(rollout_config.dtype)
    limit = rollout_config.checkpoint_engine.update_weights_bucket_megabytes << 20
    refs, bucket, num_bytes = [], [], 0
    for name, tensor in weights:
        # a copy: on CPU the generator hands out the live parameters
        tensor = tensor.detach().to(
            "cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True
        )
        bucket.append((name, tensor))
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes >= limit:
            refs.append(ray.put(bucket))
            bucket, num_bytes = [], 0
    refs.append(ray.put(bucket))
    # nested references are passed on as references, and are alive until the calls return
    await asyncio.gather(*(server.load_weights.remote(refs, policy_version) for server in servers))


async def send_weights_beside(
    server: ray.actor.ActorHandle, weights: Generator, rollout_config, policy_version: int
) -> None:
    """Sends every weight to the server on this node and device, through memory of both.

    Reading `weights` is a collective over all ranks.
    """
    loading = asyncio.ensure_future(_answer(server.load_weights_beside.remote(policy_version)))

    async def take(bucket: Bucket) -> None:
        taking = asyncio.ensure_future(_answer(server.take_bucket.remote(bucket)))
        # where the server has failed nobody takes the bucket, and its error is the loading's
        await asyncio.wait({loading, taking}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        await taking

    limit = rollout_config.checkpoint_engine.update_weights_bucket_megabytes << 20
    await WeightSender(take, limit, parse_dtype(rollout_config.dtype)).send(weights)
    await loading


async def _answer(reference: Awaitable[None]) -> None:
    await reference


class LatentServerManager(LLMServerManager):
    """verl's without the actor that balances load, which the client below does not ask."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None


class LatentRolloutClient(LLMServerClient):
    """What agent loops hold; a request goes to the replica that its ticket names.

    verl's client takes the least busy one, so what a server batches would depend on timing.
    """

    def __init__(self, config, load_balancer_handle=None, servers: list | None = None, **kwargs):
        super().__init__(config, load_balancer_handle, **kwargs)
        self.servers = list(servers or [])

    async def generate_group(
        self, ticket: Ticket, request: RolloutRequest, sampling: SamplingParams
    ) -> GroupResult:
        return await self.servers[ticket.replica].generate_group.remote(ticket, request, sampling)

    async def fail_wave(self, wave_id: str, error: BaseException) -> None:
        """Tells every server; one that has died keeps none of the others from hearing it."""
        calls = [server.fail_wave.remote(wave_id, error) for server in self.servers]
        await asyncio.gather(*calls, return_exceptions=True)

    async def generate(self, request_id, **kwargs):
        raise RolloutError(
            "a rollout server serves whole groups, not single requests",
            where="actor_rollout_ref.rollout.agent.default_agent_loop",
            got="an agent loop of verl's",
            expected="latent_agent",
        )


compat.register_rollout_adapter(ROLLOUT_NAME, f"{__name__}.{LatentServerAdapter.__name__}")
RolloutReplicaRegistry.register(ROLLOUT_NAME, lambda: LatentReplica)


def _vllm_replica() -> type[RolloutReplica]:
    from grpo_latent.verl_plugin.rollout.vllm_server import LatentVllmReplica

    return LatentVllmReplica


compat.register_rollout_adapter(
    VLLM_ROLLOUT_NAME, "grpo_latent.verl_plugin.rollout.vllm_compat.ServerAdapter"
)
RolloutReplicaRegistry.register(VLLM_ROLLOUT_NAME, _vllm_replica)
