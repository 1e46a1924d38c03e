"""Seconds that the weights of a training worker take to the engine-hf server beside it.

    python benchmarks/weights.py [--megabytes 693] [--tensors 120] [--repeats 3] [--json out.json]

Two Ray actors on one machine, float32, in turns; CPU-seconds are of both.

    mapped    as training sends them: `send_weights_beside`, through memory that both map
    store     the same tensors as an argument of a Ray call, through its object store

The receiver copies each tensor to a place of its own either way; each is compared with what was sent.
Not covered: CUDA, and gathering the shards of several ranks.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from result_file import write_result
from torch import Tensor

from grpo_latent.verl_plugin.rollout.replica import send_weights_beside
from grpo_latent.verl_plugin.rollout.weights import Bucket, WeightInbox

BUCKET_MEGABYTES = 2048  # verl's default
TIMEOUT_S = 120.0


def digests(model: dict[str, Tensor]) -> dict[str, str]:
    """Of each tensor's bytes: a sum would be rounded, and may be so differently in each process."""
    return {name: sha256(tensor.numpy().data).hexdigest() for name, tensor in model.items()}


class Receiver:
    """A server's methods, with a model of plain tensors."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.inbox = WeightInbox(torch.device("cpu"), TIMEOUT_S)
        self.model: dict[str, Tensor] = {}

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in self.model:
                self.model[name] = torch.empty_like(tensor)
            self.model[name].copy_(tensor)

    async def load_weights_beside(self, policy_version: int) -> None:
        await asyncio.to_thread(self._load, self.inbox.read())

    async def take_bucket(self, bucket: Bucket) -> None:
        await self.inbox.take(bucket)

    async def load(self, weights: dict[str, Tensor]) -> None:
        await asyncio.to_thread(self._load, iter(weights.items()))

    async def digests(self) -> dict[str, str]:
        return digests(self.model)

    async def cpu_s(self) -> float:
        return time.process_time()


class Sender:
    """A training worker's part."""

    def __init__(self, server: Any, megabytes: int, num_tensors: int):
        torch.set_num_threads(1)
        self.server = server
        size = megabytes * 1_000_000 // 4 // num_tensors
        generator = torch.Generator().manual_seed(0)
        self.model = {
            f"layer{i}": torch.randn(size, generator=generator) for i in range(num_tensors)
        }
        self.config = SimpleNamespace(
            dtype="float32",
            checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=BUCKET_MEGABYTES),
        )

    async def mapped(self) -> None:
        weights = ((name, tensor) for name, tensor in self.model.items())
        await send_weights_beside(self.server, weights, self.config, 1)

    async def store(self) -> None:
        await self.server.load.remote(self.model)

    async def send(self, way: str) -> tuple[float, float]:
        """Other weights than before, this way; seconds, and CPU-seconds of both actors."""
        for tensor in self.model.values():
            tensor.add_(1e-3)
        before = time.process_time() + await self.server.cpu_s.remote()
        started = time.perf_counter()
        await getattr(self, way)()
        seconds = time.perf_counter() - started
        spent = time.process_time() + await self.server.cpu_s.remote() - before
        if await self.server.digests.remote() != digests(self.model):
            raise RuntimeError(f"{way}: what arrived is not what was sent")
        return seconds, spent


WAYS = ("mapped", "store")  # methods of `Sender`


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=693, help="0.17 B parameters in float32")
    parser.add_argument("--tensors", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    server: Any = ray.remote(Receiver).remote()
    sender: Any = ray.remote(Sender).remote(server, options.megabytes, options.tensors)
    turns: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in range(options.repeats + 1):  # the first one of each is to warm up
        for way in WAYS:
            taken = ray.get(sender.send.remote(way))
            if turn:
                turns[way].append(taken)
    medians = {}
    for way, values in turns.items():
        seconds, cpu_s = (statistics.median(column) for column in zip(*values, strict=True))
        medians[way] = {"seconds": seconds, "cpu_seconds": cpu_s}
        print(f"{way}: {seconds:.2f} s, {cpu_s:.2f} CPU-seconds")
    ray.shutdown()
    found = {"megabytes": options.megabytes, "medians": medians, "turns": turns}
    write_result(options.json, found, seed=0)


if __name__ == "__main__":
    main()
