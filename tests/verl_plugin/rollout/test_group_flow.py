"""From dispatch to batch without Ray: tickets, failures, and the order of a batch.

A failure ends the wave at once.
"""

import asyncio
import time
from types import SimpleNamespace

import engine_helpers as helpers
import pytest
import ray
from tensordict import NonTensorData, NonTensorStack, TensorDict
from test_agent_loop import ROLLOUT, LocalClient, make_loop, prompt_row
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from grpo_latent.errors import DataError, PluginError, RewardError, RolloutError
from grpo_latent.models.loading import load_latent_model
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.rollout import agent_loop, writes
from grpo_latent.verl_plugin.rollout.agent_loop import (
    TICKET,
    LatentAgentLoopManager,
    LatentAgentLoopWorker,
)
from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient
from grpo_latent.verl_plugin.rollout.server import LatentRolloutServer
from grpo_latent.verl_plugin.rollout.waves import Ticket
from grpo_latent.verl_plugin.rollout.writes import Writer
from grpo_latent.verl_plugin.trainer import replay_buffer
from grpo_latent.verl_plugin.trainer.replay_buffer import LatentReplayBuffer


class FakeQueue:
    """What the worker does with TransferQueue."""

    def __init__(self):
        self.tags, self.rows, self.images = {}, {}, {}

    async def async_kv_put(self, key, partition_id, tag):
        self.tags.setdefault(key, []).append(tag["status"])

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        if fields is not None:
            images = [getattr(each, "data", each) for each in fields["multi_modal_inputs"]]
            self.images |= zip(keys, images, strict=True)
        for key, tag in zip(keys, tags, strict=True):
            if fields is None:
                await self.async_kv_put(key, partition_id, tag)
            else:
                self.rows[key] = tag


def use_queue(monkeypatch, queue):
    for module in (agent_loop, writes):
        monkeypatch.setattr(module, "tq", queue)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"))
    rollout = {**ROLLOUT, "custom": {"latent": {"rollout_timeout_s": 20.0}}}
    return load_latent_model(folder), LatentRolloutServer(folder, rollout, 0, "cpu", "sdpa")


def make_worker(loaded, server, score=lambda index: 1.0):
    """A worker whose rewards come from `score`."""
    worker = LatentAgentLoopWorker.__new__(LatentAgentLoopWorker)
    worker.options, worker.llm_client, worker._failures = LatentOptions(), LocalClient(server), []
    worker._writer = Writer()
    worker.rollout_config = SimpleNamespace(
        n=2, response_length=12, val_kwargs=SimpleNamespace(n=1)
    )
    worker._agent_loop = make_loop(loaded, server)

    async def fake_score(outputs, prompt):
        for output in outputs:
            output.reward_score = score(prompt["index"])

    worker._score, worker.reward_loop_worker_handles = fake_score, ["one"]
    return worker


def run_wave(parts, monkeypatch, rows, validate=False, **kwargs):
    queue = FakeQueue()
    use_queue(monkeypatch, queue)
    monkeypatch.setattr(
        LocalClient, "fail_wave", lambda self, *a: self.servers[0].fail_wave(*a), raising=False
    )

    async def scenario():
        worker = make_worker(*parts, **kwargs)
        indices = tuple(range(len(rows)))
        prompts = [
            {**row, TICKET: Ticket(f"w{time.monotonic()}", i, indices, 0), "global_steps": 1}
            for i, row in enumerate(rows)
        ]
        wave_id = prompts[0][TICKET].wave_id
        for prompt in prompts:
            prompt[TICKET] = Ticket(wave_id, prompt[TICKET].row, indices, 0)
        sampling = {"temperature": 1.0, "top_k": -1, "top_p": 1.0}
        await asyncio.gather(
            *(worker._run_prompt(p, sampling, {"validate": validate, "step": 1}) for p in prompts)
        )
        return worker

    return asyncio.run(scenario()), queue


def test_a_wave_ends_in_finished_groups(parts, monkeypatch):
    worker, queue = run_wave(parts, monkeypatch, [prompt_row(i, parts[0]) for i in range(3)])
    assert worker.failures() == [] and set(map(tuple, queue.tags.values())) == {
        ("running", "finished")
    }
    assert sorted(queue.rows) == [f"uid{i}_{session}_0" for i in range(3) for session in range(2)]
    assert all(
        tag["status"] == "success" and tag["seq_len"] > tag["prompt_len"]
        for tag in queue.rows.values()
    )


@pytest.mark.parametrize("validate", [False, True])
def test_pixels_are_stored_once_a_group(parts, monkeypatch, validate):
    """Nobody trains on validation rows: theirs are not stored at all."""
    rows = [prompt_row(i, parts[0]) for i in range(3)]
    _, queue = run_wave(parts, monkeypatch, rows, validate)
    assert len(queue.images) == (3 if validate else 6)
    with_images = {key for key, inputs in queue.images.items() if inputs}
    assert with_images == (set() if validate else {f"uid{i}_0_0" for i in range(3)})
    for key in with_images:
        assert sorted(queue.images[key]) == ["image_grid_thw", "pixel_values"]


def test_a_bad_prompt_ends_the_whole_wave_at_once(parts, monkeypatch):
    """The others wait at the barrier for the bad one: it has to tell the server."""
    rows = [
        prompt_row(0, parts[0]),
        prompt_row(1, parts[0], "read " * 80),
        prompt_row(2, parts[0]),
    ]
    worker, queue = run_wave(parts, monkeypatch, rows)
    assert [tags[-1] for tags in queue.tags.values()] == ["failure"] * 3 and queue.rows == {}
    assert all(
        isinstance(error, DataError) and "row 1 of test" in str(error)
        for error in worker.failures()
    )


def test_a_failing_reward_fails_its_group(parts, monkeypatch):
    def score(index):
        if index == 1:
            raise RewardError("reward returned nan", kind="nan")
        return 1.0

    worker, queue = run_wave(
        parts, monkeypatch, [prompt_row(i, parts[0]) for i in range(2)], score=score
    )
    assert [queue.tags[uid][-1] for uid in ("uid0", "uid1")] == ["finished", "failure"]
    assert [type(error) for error in worker.failures()] == [RewardError]


def make_manager(num_servers, monkeypatch):
    dispatched = []
    monkeypatch.setattr(
        AgentLoopManagerTQ, "generate_sequences", lambda self, prompts: dispatched.append(prompts)
    )
    manager = LatentAgentLoopManager.__new__(LatentAgentLoopManager)
    manager.llm_client = SimpleNamespace(servers=list(range(num_servers)))
    manager._waves, manager._dispatched, manager.order_of_uid = (
        iter(range(99)),
        iter(range(99)),
        {},
    )
    return manager, dispatched


def prompts_of(uids):
    return TensorDict({"uid": NonTensorStack(*map(NonTensorData, uids))}, batch_size=len(uids))


def test_tickets_spread_whole_groups_over_the_replicas(monkeypatch):
    manager, dispatched = make_manager(2, monkeypatch)
    manager.generate_sequences(prompts_of(["e", "d", "c"]))
    manager.generate_sequences(prompts_of(["b", "a"]))
    tickets = [
        [t.data if hasattr(t, "data") else t for t in batch[TICKET]] for batch in dispatched
    ]
    assert [(t.row, t.rows, t.replica) for t in tickets[0]] == [
        (0, (0, 2), 0),
        (1, (1,), 1),
        (2, (0, 2), 0),
    ]
    assert len({t.wave_id for batch in tickets for t in batch}) == 2
    assert manager.order_of_uid == {"e": 0, "d": 1, "c": 2, "b": 3, "a": 4}


def test_batches_follow_dispatch_and_session_not_arrival(monkeypatch):
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **kwargs: None)
    manager, _ = make_manager(1, monkeypatch)
    manager.generate_sequences(prompts_of(["z", "y", "x"]))
    buffer = LatentReplayBuffer.adopt(ReplayBuffer.__new__(ReplayBuffer))
    buffer.manager = manager
    arrival = ["x_1_0", "z_10_0", "y_0_0", "other_0_0", "z_2_0", "x_0_0"]
    batch = buffer._materialize_batch(
        "train", ["x", "y", "z"], {key: {"key": key} for key in arrival}
    )
    assert (
        batch.keys == ["z_2_0", "z_10_0", "y_0_0", "x_0_0", "x_1_0"] and manager.order_of_uid == {}
    )
    assert [tag["key"] for tag in batch.tags] == batch.keys


def test_other_buffers_are_refused():
    with pytest.raises(PluginError, match="custom_sampler; got|brings its own replay buffer"):
        LatentReplayBuffer.adopt(ReplayBufferAsync.__new__(ReplayBufferAsync))


def workers_that_answer(manager, monkeypatch, answers):
    """The manager's workers: what each says that prompts failed with, or Ray's error of it."""

    def get(answer, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    manager.agent_loop_workers = [
        SimpleNamespace(failures=SimpleNamespace(remote=lambda answer=answer: answer))
        for answer in answers
    ]
    monkeypatch.setattr(agent_loop.ray, "wait", lambda answers, **kwargs: (answers, []))
    monkeypatch.setattr(agent_loop.ray, "get", get)


def test_failures_are_raised_by_type(monkeypatch):
    manager, _ = make_manager(1, monkeypatch)
    error = RewardError("reward returned inf", kind="inf")
    workers_that_answer(manager, monkeypatch, [[error, DataError("later")]])
    for raises in (
        lambda: manager.raise_failure("train", 2, 1.0),
        lambda: manager.check_workers(1),
    ):
        with pytest.raises(RewardError, match="returned inf"):
            raises()
    workers_that_answer(manager, monkeypatch, [[]])
    manager.check_workers(1.0)
    with pytest.raises(RolloutError, match="partition train: rollouts failed; got 2 groups"):
        manager.raise_failure("train", 2, 1.0)


def test_a_dead_worker_hides_no_cause_that_another_knows(monkeypatch):
    manager, _ = make_manager(1, monkeypatch)
    dead = ray.exceptions.ActorDiedError()
    workers_that_answer(manager, monkeypatch, [dead, [DataError("row 7 is bad")]])
    with pytest.raises(DataError, match="row 7"):
        manager.check_workers(1.0)
    workers_that_answer(manager, monkeypatch, [dead, []])
    with pytest.raises(ray.exceptions.ActorDiedError):
        manager.check_workers(1.0)


class Unreachable:
    """A dead peer: what is sent to it raises, or never comes back."""

    def __init__(self, hangs):
        self.hangs = hangs

    async def call(self, *args, **kwargs):
        if self.hangs:
            await asyncio.Event().wait()
        raise ray.exceptions.ActorDiedError()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("dead", ["rollout server", "TransferQueue", "both"])
def test_a_failure_is_kept_whoever_has_died(parts, monkeypatch, dead, hangs):
    """The trainer asks the worker itself, so that no other process need be alive."""
    queue, peer = FakeQueue(), Unreachable(hangs)
    heard = []
    use_queue(monkeypatch, queue)
    monkeypatch.setattr(agent_loop, "TELL_TIMEOUT_S", 0.05)

    async def fail_wave(self, wave_id, error):
        heard.append(error)

    monkeypatch.setattr(LocalClient, "fail_wave", fail_wave, raising=False)

    async def scenario():
        def score(index):
            if dead != "TransferQueue":
                monkeypatch.setattr(LocalClient, "fail_wave", peer.call)
            if dead != "rollout server":
                monkeypatch.setattr(queue, "async_kv_put", peer.call)
            raise ray.exceptions.ActorDiedError()  # the reward worker's, say

        worker = make_worker(*parts, score=score)
        prompt = {**prompt_row(0, parts[0]), TICKET: Ticket(f"{dead} {hangs}", 0, (0,), 0)}
        sampling = {"temperature": 1.0, "top_k": -1, "top_p": 1.0}
        await worker._run_prompt(
            {**prompt, "global_steps": 1}, sampling, {"validate": False, "step": 1}
        )
        return worker

    worker = asyncio.run(asyncio.wait_for(scenario(), 10))
    (failure,) = worker.failures()
    assert type(failure) is RolloutError and "ActorDiedError" in str(failure)
    # whoever lives has heard of it
    assert len(heard) == (dead == "TransferQueue")
    assert (queue.tags["uid0"][-1] == "failure") == (dead == "rollout server")


def test_a_dead_server_keeps_no_other_from_hearing_of_a_failure():
    heard = []

    async def hear(wave_id, error):
        heard.append((wave_id, error))

    dead, alive = (
        SimpleNamespace(fail_wave=SimpleNamespace(remote=call))
        for call in (Unreachable(hangs=False).call, hear)
    )
    client = LatentRolloutClient.__new__(LatentRolloutClient)
    client.servers = [dead, alive]
    error = DataError("bad")
    asyncio.run(client.fail_wave("w", error))
    assert heard == [("w", error)]


@pytest.mark.parametrize("traced", [False, True])
def test_a_worker_takes_what_comes_after_its_start(traced):
    """verl's constructor gives a traced client its tokenizer, and had only a stand-in."""
    worker = LatentAgentLoopWorker.__new__(LatentAgentLoopWorker)
    worker.tokenizer = "tokenizer"
    worker.rollout_config = SimpleNamespace(trace={"token2text": traced})
    client = SimpleNamespace()
    worker.connect(client, None, ["reward worker"])
    assert worker.llm_client is client and worker.reward_loop_worker_handles == ["reward worker"]
    assert vars(client) == ({"tokenizer": "tokenizer"} if traced else {})
