"""Weights through shared memory: what arrives is what was sent, and nothing stays behind.

Not covered: CUDA IPC; Ray's calls (test_ray_jobs.py and the training tests go through them).
"""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_latent.errors import CheckpointError, RolloutError
from grpo_latent.models import tiny
from grpo_latent.models.loading import copy_weights
from grpo_latent.verl_plugin.rollout import replica, weights
from grpo_latent.verl_plugin.rollout.weights import FileBuffer, WeightInbox, WeightSender

CPU = torch.device("cpu")


def left_open():
    """Buffers that this process has not closed."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(descriptor))
        except FileNotFoundError:  # the listing's own
            continue
    return [link for link in links if "grpo_latent_weights" in link]


def named(generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    sizes = {"a": (3, 5), "scalar": (), "large": (300, 7), "empty": (0, 4), "b": (11,)}
    found = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return found | {"ids": torch.arange(5), "is": torch.tensor([True, False, True])}


class Calls:
    """A server's methods as Ray gives them: calls that come back as awaitables, in threads of its own."""

    def __init__(self, load, timeout_s=30.0):
        self.inbox = WeightInbox(CPU, timeout_s)
        self.versions, self.buckets = [], []
        self.load_weights_beside = SimpleNamespace(remote=self._load_beside)
        self.take_bucket = SimpleNamespace(remote=self._take)
        self._load = load

    async def _load_beside(self, version):
        self.versions.append(version)
        await asyncio.to_thread(self._load, self.inbox.read())

    async def _take(self, bucket):
        self.buckets.append(bucket)
        await self.inbox.take(bucket)


def send(server, sent, megabytes=1, dtype="float32"):
    config = SimpleNamespace(
        dtype=dtype, checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=megabytes)
    )
    asyncio.run(replica.send_weights_beside(server, sent, config, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [64, 700, 1 << 20])
def test_what_arrives_is_what_was_sent(limit, dtype):
    """In one bucket or many, of which one is larger than the limit."""
    got, sent = {}, named()
    inbox = WeightInbox(CPU, 30.0)
    buckets = []

    async def take(bucket):
        buckets.append(bucket)
        await inbox.take(bucket)

    def read():
        got.update({name: tensor.clone() for name, tensor in inbox.read()})

    reader = threading.Thread(target=read)
    reader.start()
    sender = WeightSender(take, limit, dtype)
    asyncio.run(sender.send(sent.items()))
    reader.join()
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert got[name].dtype == expected.dtype and torch.equal(got[name], expected)
    assert sender.num_bytes == sum(t.numel() * t.element_size() for t in got.values())
    assert (len(buckets) > 3) == (limit < 1 << 20)
    assert not left_open()


def test_a_generator_may_take_back_what_it_gave():
    """Merged LoRA weights are the module's own, and are unmerged behind the last one."""
    got, live = {}, torch.ones(4)

    def merged():
        yield "a", live
        live.zero_()
        yield "b", live + 5

    def load(found):
        got.update({name: tensor.clone() for name, tensor in found})

    server = Calls(load)
    send(server, merged())
    assert got["a"].tolist() == [1.0] * 4 and got["b"].tolist() == [5.0] * 4
    assert server.versions == [7]
    assert [len(bucket.places) for bucket in server.buckets] == [2, 0]


def test_a_model_is_loaded_whole_or_not_at_all():
    ours, other = (tiny.tiny_qwen3(("read",), seed=seed).model for seed in (0, 1))
    send(Calls(lambda found: copy_weights(ours, found, "here")), other.state_dict().items())
    assert all(
        torch.equal(p, q) for p, q in zip(ours.parameters(), other.parameters(), strict=True)
    )
    missing = dict(other.state_dict())
    missing.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        send(Calls(lambda found: copy_weights(ours, found, "here")), missing.items())


@pytest.mark.parametrize("megabytes", [1, 64])
def test_an_error_of_the_server_reaches_the_sender(megabytes):
    """At the first weight, whatever of it is still to come."""

    def load(found):
        next(iter(found))
        raise CheckpointError("no", where="here")

    sent = {str(i): torch.zeros(1 << 18) for i in range(4)}
    with pytest.raises(CheckpointError, match="no"):
        send(Calls(load), sent.items(), megabytes)
    assert not left_open()


def test_a_sender_that_dies_leaves_no_server_waiting():
    with pytest.raises(RolloutError, match="did not come to their end"):
        list(WeightInbox(CPU, 0.05).read())


def test_no_room_is_said(monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "posix_fallocate", refuse)
    buffer = FileBuffer(1000)
    with pytest.raises(RolloutError, match="update_weights_bucket_megabytes"):
        buffer.reserve(0, 10)
    buffer.close()


def test_a_sender_out_of_reach_is_named():
    with pytest.raises(RolloutError, match="same user and process namespace"):
        weights.map_buffer(("/proc/1/fd/999999", 8), CPU)


def test_a_buffer_has_no_name_that_could_stay_behind():
    """Killed between making it and sending it, a worker left a file in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    buffer = FileBuffer(1000)
    buffer.reserve(0, 1000)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "grpo_latent" in name]
    assert len(left_open()) == 1 and "deleted" in left_open()[0]
    buffer.close()
    assert not left_open()


def test_another_process_maps_the_same_bytes():
    buffer = FileBuffer(1 << 16)
    buffer.reserve(0, 1 << 16)
    buffer.bytes.copy_(torch.arange(1 << 16) % 251)
    path, size = buffer.handle
    code = (
        f"import torch; b = torch.from_file({path!r}, shared=True, size={size}, dtype=torch.uint8);"
        "print(int(b.long().sum())); b[5] = 77"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == int((torch.arange(1 << 16) % 251).sum())
    assert buffer.bytes[5] == 77
    buffer.close()
