"""verl's agent loop worker and its manager, for groups: tickets, rewards, TransferQueue, failures.

    manager ──ticketed prompt row──▶ worker ──▶ `prompt_to_group` (server, wave barrier) ──▶ G rows
       ──▶ rewards ──▶ TransferQueue

verl's own worker runs one coroutine a trajectory and lets failures pass as the status of a group.
This one keeps the group together, so that its image is processed, its prompt prefilled and its
rewards requested once, and keeps each exception for the trainer to raise.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
import zlib
from types import SimpleNamespace
from typing import cast

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tensordict import NonTensorStack, TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.profiler import simple_timer

from grpo_latent import recorded_fields
from grpo_latent.errors import GrpoLatentError, RolloutError
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import verify
from grpo_latent.verl_plugin.boot.remote_errors import portable
from grpo_latent.verl_plugin.boot.row_keys import trajectory_key
from grpo_latent.verl_plugin.rollout.group_rows import (
    check_finite,
    parts_of,
    reward_input,
    row_index,
)
from grpo_latent.verl_plugin.rollout.prompt_to_group import (
    LatentAgentLoop,
    LatentAgentLoopOutput,
)
from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient
from grpo_latent.verl_plugin.rollout.waves import Ticket
from grpo_latent.verl_plugin.rollout.writes import Writer

TICKET = "latent_ticket"
IMAGES = recorded_fields.field("multi_modal_inputs").column
TELL_TIMEOUT_S = 10.0
# columns of the data row that verl, the dumps or the metrics read after the rollout; each costs
# time for every trajectory
STORED = ("uid", "data_source", "reward_model", "extra_info")


# ray.remote, which decorates verl's class, hides the class itself from type checkers
class LatentAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[name-defined]
    """verl's worker with one request, one reward call and one write a group."""

    def __init__(self, *args, **kwargs):
        verify("agent loop worker")
        super().__init__(*args, **kwargs)
        self.options = LatentOptions.from_rollout(self.rollout_config)
        if compat.is_cpu():
            torch.set_num_threads(self.options.cpu_threads)
        self._agent_loop: LatentAgentLoop | None = None
        self._writer = Writer()
        self._failures: list[GrpoLatentError] = []

    def connect(self, llm_client: LatentRolloutClient, teacher_client, reward_workers) -> None:
        """Takes what was not there yet when the worker started."""
        if self.rollout_config.trace.get("token2text", False):
            # as in verl's constructor
            llm_client.tokenizer = self.tokenizer  # type: ignore[attr-defined]
        self.llm_client, self.teacher_client = llm_client, teacher_client
        self.reward_loop_worker_handles = reward_workers

    def failures(self) -> list[GrpoLatentError]:
        """What prompts of this worker failed with, the cause first."""
        return self._failures

    async def _run_prompt(
        self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False
    ) -> None:
        uid = prompt["uid"]
        partition_id = "val" if trajectory["validate"] else "train"
        ticket: Ticket = prompt.pop(TICKET)
        try:
            await self._mark(uid, partition_id, "running")
            outputs, pixels = await self._run_group(prompt, sampling_params, trajectory, ticket)
            await self._score(outputs, prompt)
            # nobody trains on validation
            await self._store(
                outputs, {} if trajectory["validate"] else pixels, prompt, partition_id
            )
            await self._mark(uid, partition_id, "finished")
        except BaseException as error:  # a SystemExit would end the loop of all other prompts
            traceback.print_exc()
            # first, and by itself enough: the trainer asks for it while it waits
            self._failures.append(portable(error))
            await self._tell(portable(error), uid, partition_id, ticket.wave_id)

    async def _mark(self, uid: str, partition_id: str, status: str) -> None:
        await self._writer.put([uid], partition_id, [{"status": status}])

    async def _tell(
        self, error: GrpoLatentError, uid: str, partition_id: str, wave_id: str
    ) -> None:
        """Ends the wave and marks the group as failed, as far as those who hear it are alive."""
        told = (
            # the wave will never be complete: without this its other rows would wait for the
            # timeout
            self.llm_client.fail_wave(wave_id, error),
            tq.async_kv_put(key=uid, partition_id=partition_id, tag={"status": "failure"}),
        )
        await asyncio.wait([asyncio.ensure_future(call) for call in told], timeout=TELL_TIMEOUT_S)

    async def _run_group(
        self, prompt: dict, sampling_params: dict, trajectory: dict, ticket: Ticket
    ):
        validate = trajectory["validate"]
        n = self.rollout_config.val_kwargs.n if validate else self.rollout_config.n
        if self._agent_loop is None:
            self._agent_loop = self._make_agent_loop()
        row_id = row_index(prompt)
        # validation draws its own numbers, so that it can be switched on and off without changing
        # the training
        step = f"val{trajectory['step']}" if validate else trajectory["step"]
        seeds = [trajectory_seed(self.options.seed, step, row_id, i) for i in range(n)]
        sampling = SamplingParams(
            max_new_tokens=self.rollout_config.response_length,
            temperature=sampling_params["temperature"],
            top_k=sampling_params["top_k"],
            top_p=sampling_params["top_p"],
        )
        return await self._agent_loop.run_group(sampling, ticket, seeds, prompt)

    def _make_agent_loop(self) -> LatentAgentLoop:
        from verl.experimental.agent_loop.agent_loop import DictConfigWrap

        return LatentAgentLoop(
            trainer_config=DictConfigWrap(config=self.config),
            server_manager=self.llm_client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
            mechanism=self.options.mechanism(self.model_config.local_path, self.tokenizer),
        )

    async def _score(self, outputs: list[LatentAgentLoopOutput], prompt: dict) -> None:
        """Rewards of a group, in one call of a reward worker that the row's index chooses."""
        workers = self.reward_loop_worker_handles
        if workers is None:  # a colocated reward model scores the whole batch later
            return
        timing: dict[str, float] = {}
        with simple_timer("compute_score", timing):
            # not `hash`, which Python salts anew in each process: a resumed run asks the same
            # worker
            worker = workers[zlib.crc32(row_index(prompt).encode()) % len(workers)]
            results = await worker.compute_score_batch.remote(reward_input(outputs, prompt))
        for output, result in zip(outputs, results, strict=True):
            output.reward_score = result["reward_score"]
            output.extra_fields["reward_extra_info"] = result.get("reward_extra_info", {})
            output.metrics.compute_score = timing["compute_score"]

    async def _store(self, outputs, pixels: dict, prompt: dict, partition_id: str) -> None:
        row = {name: prompt[name] for name in STORED if name in prompt}
        if self.reward_loop_worker_handles is None:  # read by a colocated reward model only
            row["raw_prompt"] = [
                {**m, "content": parts_of(m["content"])} for m in prompt["raw_prompt"]
            ]
        fields, tags, keys = [], [], []
        for session_id, output in enumerate(outputs):
            field = {
                **output.as_dict(),
                **row,
                "session_id": session_id,
                IMAGES: pixels if session_id == 0 else {},  # of the whole group: `group_images`
            }
            key = trajectory_key(prompt["uid"], session_id)
            check_finite(output.recorded, output.reward_score, key, prompt["global_steps"])
            fields.append(field)
            keys.append(key)
            tags.append(
                {
                    "status": "success",
                    "prompt_len": len(output.prompt_ids),
                    "response_len": len(output.response_ids),
                    "seq_len": len(output.prompt_ids) + len(output.response_ids),
                    "global_steps": prompt["global_steps"],
                    "min_global_steps": output.extra_fields["min_global_steps"],
                    "max_global_steps": output.extra_fields["max_global_steps"],
                }
            )
        await self._writer.put(keys, partition_id, tags, fields)


def start_agent_loop_workers(config: DictConfig) -> list[ray.actor.ActorHandle]:
    """Workers of a run, over its nodes in turn; those that there are already, where there are.

    They can do nothing before `connect`.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    started = [
        ray.remote(LatentAgentLoopWorker)
        .options(
            name=f"agent_loop_worker_{i}",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                node_id=nodes[i % len(nodes)]["NodeID"], soft=True
            ),
        )
        .remote(config, llm_client=SimpleNamespace())  # verl may give it a tokenizer
        for i in range(config.actor_rollout_ref.rollout.agent.num_workers)
    ]
    # ray's annotation adds the class itself, for editors
    return cast("list[ray.actor.ActorHandle]", started)


class LatentAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager; gives each prompt its ticket and remembers the order of dispatch."""

    llm_client: LatentRolloutClient

    def __init__(self, *args, **kwargs):
        verify("agent loop manager")
        super().__init__(*args, **kwargs)
        self._waves = itertools.count()
        self._dispatched = itertools.count()
        self.order_of_uid: dict[str, int] = {}

    async def _init_agent_loop_workers(self) -> None:
        self.agent_loop_workers = start_agent_loop_workers(self.config)  # type: ignore[assignment]
        given = (self.llm_client, self.teacher_client, self.reward_loop_worker_handles)
        await asyncio.gather(*[worker.connect.remote(*given) for worker in self._workers])

    def generate_sequences(self, prompts: TensorDict) -> None:
        wave_id = f"wave-{next(self._waves)}"
        num_rows = len(prompts)
        num_replicas = max(1, len(self.llm_client.servers))
        for uid in prompts["uid"]:
            self.order_of_uid[str(uid)] = next(self._dispatched)
        rows_of = [
            tuple(range(replica, num_rows, num_replicas)) for replica in range(num_replicas)
        ]
        tickets = [
            Ticket(wave_id, row, rows_of[row % num_replicas], row % num_replicas)
            for row in range(num_rows)
        ]
        prompts[TICKET] = NonTensorStack(*tickets)
        super().generate_sequences(prompts)

    def forget(self, uids: set[str]) -> None:
        """Drops uids whose groups have been taken."""
        for uid in uids:
            self.order_of_uid.pop(uid, None)

    @property
    def _workers(self) -> list[ray.actor.ActorHandle]:
        # ray's annotation adds the class itself, for editors
        return cast("list[ray.actor.ActorHandle]", self.agent_loop_workers)

    def check_workers(self, timeout_s: float) -> None:
        """Raises what the first failed prompt failed with, or Ray's error of a dead worker."""
        answers: list[ray.ObjectRef] = [worker.failures.remote() for worker in self._workers]
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        silent: ray.exceptions.RayError | None = None
        for answer in answers:
            try:
                failures: list[GrpoLatentError] = ray.get(answer, timeout=0)
            except ray.exceptions.RayError as error:  # what a living one reports says more
                silent = error
                continue
            # when one prompt fails, the others of its wave get the same error: the first is the
            # cause
            if failures:
                raise failures[0]
        if silent is not None:
            raise silent

    def raise_failure(self, partition_id: str, num_failed: int, timeout_s: float) -> None:
        """Raises what the first failed prompt failed with."""
        self.check_workers(timeout_s)
        raise RolloutError(
            "rollouts failed",
            where=f"partition {partition_id}",
            got=f"{num_failed} groups",
            expected="none",
        )
