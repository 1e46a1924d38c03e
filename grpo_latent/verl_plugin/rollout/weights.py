"""Weights of a training worker to the engine-hf server beside it, through memory that both map.

    worker   weights ──▶ buffer: a file without a name, or memory of the device that both use
             ──take_bucket(names, places)──▶ server: copies out of the buffer, and answers
    server   load_weights_beside: one call of the engine, which reads the buckets as they come

No weight passes Ray's object store. The file is in memory and goes with the processes that have it
open, however they end; nor does it take room of /dev/shm, of which a container has 64 MB. CUDA's
half (`DeviceBuffer`) has not run on a card.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_latent.errors import RolloutError

_ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def of(self, buffer: Tensor) -> Tensor:
        num_bytes = self.dtype.itemsize * torch.Size(self.shape).numel()
        flat = buffer[self.offset : self.offset + num_bytes]
        return flat.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Weights that lie in a buffer.

    Attributes:
        handle: how the server finds the buffer; None: it is the last bucket's.
        places: none behind the last weight.
    """

    handle: Any
    places: list[Place] = field(default_factory=list)


class FileBuffer:
    """Bytes of a file in memory that another process of this machine maps, too."""

    def __init__(self, num_bytes: int):
        self._descriptor = os.memfd_create("grpo_latent_weights", os.MFD_CLOEXEC)
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.handle = (path, num_bytes)
        self.bytes = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Takes the memory that is used next; a page that cannot be had would kill the process.

        Raises:
            RolloutError: no room.
        """
        try:
            os.posix_fallocate(self._descriptor, offset, num_bytes)
        except OSError as error:
            raise RolloutError(
                "no room for weights",
                where="training worker",
                got=str(error),
                expected=f"{offset + num_bytes} bytes of memory free",
                fix="Lower actor_rollout_ref.rollout.checkpoint_engine."
                "update_weights_bucket_megabytes, or give the machine more memory.",
            ) from error

    def close(self) -> None:
        os.close(self._descriptor)


class DeviceBuffer:
    """Bytes of a CUDA device that another process maps, too (CUDA IPC)."""

    def __init__(self, num_bytes: int, device: torch.device):
        from torch.multiprocessing.reductions import reduce_tensor

        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.handle = reduce_tensor(self.bytes)

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Nothing: the device's memory is there."""

    def close(self) -> None:
        """Nothing: it goes with the last tensor."""


def map_buffer(handle: Any, device: torch.device) -> Tensor:
    """uint8, the bytes of a `FileBuffer` or a `DeviceBuffer` of another process.

    Raises:
        RolloutError: the file cannot be opened from here.
    """
    first, second = handle
    if isinstance(first, str):
        try:
            return torch.from_file(first, shared=True, size=second, dtype=torch.uint8)
        except RuntimeError as error:
            raise RolloutError(
                "the training worker's weights cannot be read",
                where="rollout server",
                got=str(error).partition("\n")[0],
                expected=f"{first}, a file of a process of the same user and process namespace",
                fix="Run both in one container.",
            ) from error
    arguments = list(second)
    # the same device may have another number here: each process sees devices of its own
    arguments[6] = device.index or 0
    return first(*arguments)


class WeightSender:
    """Packs weights into one buffer, again and again.

    Args:
        take: hands a bucket to the server; comes back when the buffer may be written to again.
        limit: bytes of a bucket; a larger weight gets a buffer of its own size.
        dtype: of floating-point weights on the server.

    Attributes:
        num_bytes: sent so far.
    """

    def __init__(self, take: Callable[[Bucket], Awaitable[None]], limit: int, dtype: torch.dtype):
        self._take = take
        self._limit = limit
        self._dtype = dtype
        self._buffer: FileBuffer | DeviceBuffer | None = None
        self._size = 0
        self._is_known = False
        self._places: list[Place] = []
        self._used = 0
        self.num_bytes = 0

    async def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends all; reading `weights` is a collective over all ranks."""
        try:
            for name, tensor in weights:
                await self._add(name, tensor.detach())
            await self._flush()
            await self._take(Bucket(None))
        finally:
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = None

    async def _add(self, name: str, tensor: Tensor) -> None:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        num_bytes = dtype.itemsize * tensor.numel()
        offset = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._buffer is None or offset + num_bytes > self._size:
            await self._flush()
            offset = 0
        if self._buffer is None or num_bytes > self._size:
            self._make_buffer(max(self._limit, num_bytes), tensor.device)
        assert self._buffer is not None
        self._buffer.reserve(offset, max(1, num_bytes))
        place = Place(name, tuple(tensor.shape), dtype, offset)
        # at once: the generator may hand out live parameters, or what it takes back after this
        place.of(self._buffer.bytes).copy_(tensor)
        self._places.append(place)
        self._used = offset + num_bytes
        self.num_bytes += num_bytes

    def _make_buffer(self, size: int, device: torch.device) -> None:
        if self._buffer is not None:
            self._buffer.close()
        self._size, self._is_known = size, False
        self._buffer = DeviceBuffer(size, device) if device.type == "cuda" else FileBuffer(size)

    async def _flush(self) -> None:
        if not self._places or self._buffer is None:
            return
        if self._buffer.bytes.device.type == "cuda":
            torch.cuda.synchronize()  # the other process reads what this one's stream has written
        handle = None if self._is_known else self._buffer.handle
        await self._take(Bucket(handle, self._places))
        self._is_known = True
        self._places, self._used = [], 0


class WeightInbox:
    """The server's end: buckets that come by calls, read by one call of the engine.

    Args:
        timeout_s: a sender that is silent for so long has died.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        self._device = device
        self._timeout_s = timeout_s
        self._buckets: queue.SimpleQueue[tuple[Bucket, Future]] = queue.SimpleQueue()

    async def take(self, bucket: Bucket) -> None:
        """Comes back when the engine has read the bucket."""
        taken: Future = Future()
        self._buckets.put((bucket, taken))
        await asyncio.wrap_future(taken)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of all buckets up to the last; each is to be copied before the next.

        Raises:
            RolloutError: no bucket came.
        """
        buffer = None
        while True:
            try:
                bucket, taken = self._buckets.get(timeout=self._timeout_s)
            except queue.Empty:
                raise RolloutError(
                    "the weights did not come to their end",
                    where="rollout server",
                    got=f"nothing for {self._timeout_s:g} s",
                    expected="the next bucket",
                    fix="See the log of the training worker.",
                ) from None
            try:
                if not bucket.places:
                    return
                if bucket.handle is not None:
                    buffer = map_buffer(bucket.handle, self._device)
                assert buffer is not None, "a sender's first bucket has a handle"
                for place in bucket.places:
                    yield place.name, place.of(buffer)
            finally:
                if not taken.done():  # a caller that was cut off waits for nothing
                    taken.set_result(None)
