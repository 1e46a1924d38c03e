"""The rollout server: a Ray actor that holds engine `hf` and serves whole groups, wave by wave."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import torch
from torch import Tensor
from verl.utils.device import get_resource_name

from grpo_latent.common.dtypes import parse_dtype
from grpo_latent.eval.usage import Usage
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.steps import STATIC
from grpo_latent.trajectory import Trajectory
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import verify
from grpo_latent.verl_plugin.rollout.usage_probe import ServerUsage, UsageRequest
from grpo_latent.verl_plugin.rollout.waves import Ticket, Waves
from grpo_latent.verl_plugin.rollout.weights import Bucket, WeightInbox


@dataclass(frozen=True)
class GroupResult:
    """The group of one prompt. G trajectories, prompt length P.

    Attributes:
        prompt_kinds: int64 [P].
        prompt_positions: int64 [P], or [3, P] for mRoPE.
        eos_ids: of the model.
    """

    trajectories: list[Trajectory]
    prompt_kinds: Tensor
    prompt_positions: Tensor
    eos_ids: tuple[int, ...]


def group_result(
    adapter: ModelAdapter,
    request: RolloutRequest,
    group: list[Trajectory],
    eos_ids: tuple[int, ...],
) -> GroupResult:
    """Adds kinds and positions of the prompt.

    No weight enters them: a model on the meta device will do.
    """
    ids = request.prompt_ids[None]
    positions = adapter.position_ids(ids, torch.ones_like(ids, dtype=torch.bool), request.images)
    positions = positions[:, 0] if positions.ndim == 3 else positions[0]
    return GroupResult(
        group, adapter.prompt_kinds(request.prompt_ids), positions.contiguous(), eos_ids
    )


def whereabouts(worker) -> tuple[str, str | None]:
    """Node of a Ray worker, and the devices that it sees, if any."""
    context = ray.get_runtime_context()
    devices = context.get_accelerator_ids().get(get_resource_name()) or []
    return context.get_node_id(), ",".join(devices) if devices else None


class LatentRolloutServer:
    """Serves one replica.

    All methods are coroutines, so that control calls pass while the engine runs.

    Args:
        folder: local checkpoint, for architecture and tokenizer; the weights are replaced before
            the first wave.
        rollout_config: verl's, as a plain dict.
        device: "cpu", or "cuda" with the worker's device made visible.
    """

    def __init__(
        self,
        folder: str,
        rollout_config: dict,
        replica_rank: int,
        device: str,
        attn_implementation: str,
    ):
        name = f"rollout server {replica_rank}"
        verify(name)
        self.options = LatentOptions.from_rollout(rollout_config)
        self._set_threads()
        loaded = load_latent_model(
            folder,
            dtype=parse_dtype(rollout_config["dtype"], "actor_rollout_ref.rollout.dtype"),
            device=device,
            attn_implementation=attn_implementation,
            overrides=self.options.overrides,
            treatment=self.options.treatment,
            seed=self.options.seed,
            verify_digests=self.options.verify_digests,
        )
        self.device = torch.device(device)
        self.eos_ids = loaded.eos_ids
        self.engine = HFRolloutEngine(
            loaded.model,
            loaded.mechanism,
            loaded.eos_ids,
            max_batch_rows=self.options.max_batch_rows,
            treatment=self.options.treatment,
            selection_temperature=self.options.draw_temperature,
            decoding=self._decoding(rollout_config.get("enforce_eager", False)),
        )
        self.inbox = WeightInbox(self.device, self.options.rollout_timeout_s)
        self.usage = ServerUsage(loaded, self.options.max_batch_rows, self.options.treatment)
        self.waves = Waves(
            self._generate, self.options.rollout_timeout_s, name, initializer=self._set_threads
        )

    def _decoding(self, enforce_eager: bool) -> str | None:
        """Without graphs where the config says so."""
        if self.device.type != "cuda" or not enforce_eager:
            return None
        warnings.warn(
            "engine hf decodes without CUDA graphs: actor_rollout_ref.rollout.enforce_eager=true",
            stacklevel=2,
        )
        return STATIC

    def _set_threads(self) -> None:
        # OpenMP keeps the number of threads by thread: the executor's thread has to set its own
        if not torch.cuda.is_available():
            torch.set_num_threads(self.options.cpu_threads)

    def _generate(
        self, payloads: list[tuple[RolloutRequest, SamplingParams]]
    ) -> list[GroupResult]:
        """One engine call for each run of equal sampling parameters (a wave has one)."""
        groups = []
        for sampling, run in itertools.groupby(payloads, key=lambda payload: payload[1]):
            groups += self.engine.generate([request for request, _ in run], sampling)
        return [
            group_result(self.engine.adapter, request, group, self.eos_ids)
            for (request, _), group in zip(payloads, groups, strict=True)
        ]

    async def generate_group(
        self, ticket: Ticket, request: RolloutRequest, sampling: SamplingParams
    ) -> GroupResult:
        return await self.waves.join(ticket, (request, sampling))

    async def fail_wave(self, wave_id: str, error: BaseException) -> None:
        self.waves.fail(wave_id, error)

    async def load_weights(self, bucket_refs: list, policy_version: int) -> None:
        """Replaces all weights, after any wave that is running.

        Args:
            bucket_refs: object references of lists of (name, tensor); fetched one after the other.
        """
        weights = (weight for ref in bucket_refs for weight in ray.get(ref))
        await self.waves.run_alone(self._load_weights, weights, policy_version)

    async def load_weights_beside(self, policy_version: int) -> None:
        """The same of the buckets that a training worker on this node gives to `take_bucket`."""
        await self.waves.run_alone(self._load_weights, self.inbox.read(), policy_version)

    async def take_bucket(self, bucket: Bucket) -> None:
        """Comes back when `load_weights_beside` has read the bucket."""
        await self.inbox.take(bucket)

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        # the trainer sends while the server sleeps, its engine on the CPU
        self.engine.move_to(self.device)
        self.engine.load_weights(weights, policy_version)

    async def measure_usage(self, request: UsageRequest, is_start: bool) -> Usage:
        """Whether the latents of the current weights are used, after any wave that is running."""
        return await self.waves.run_alone(self.usage.measure, request, is_start)

    async def wake_up(self) -> None:
        self.engine.move_to(self.device)

    async def sleep(self) -> None:
        """Frees the accelerator for training until the next `load_weights` or `wake_up`."""
        if self.device.type != "cpu":
            self.engine.move_to("cpu")
            torch.cuda.empty_cache()

    async def nothing(self, *args, **kwargs) -> None:
        """Answers control calls of verl that have no meaning here.

        No cache outlives a wave, and no wave can be aborted.
        """

    abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = (
        resume_kv_cache
    ) = nothing
    start_profile = stop_profile = nothing
