"""Packs tensors as plain bytes, for vLLM's RPC.

Nested in an answer, tensors come back from another process as lists.

    rank 0    {key: {name: packed}} ──┐
    rank 1 …  {key: digest} ──────────┴─agreed──▶ {key: {name: packed}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError

Packed = list  # [dtype name, shape, bytes]


def pack(tensor: Tensor) -> Packed:
    """[dtype name, shape, bytes] of a CPU tensor.

    >>> unpack(pack(torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)))
    tensor([[1.],
            [2.]], dtype=torch.bfloat16)
    >>> unpack(pack(torch.arange(8)[3:4].as_strided((1,), (6,))))
    tensor([3])
    """
    # `contiguous` would leave one element at the stride that it has, which no view as bytes takes
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return [
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        flat.view(torch.uint8).numpy().tobytes(),
    ]


def unpack(packed: Packed) -> Tensor:
    """The tensor that `pack` was given."""
    name, shape, data = packed
    dtype = getattr(torch, name)
    if not data:  # which `frombuffer` refuses
        return torch.zeros(shape, dtype=dtype)
    # a copy that may be written to; of bytes, torch would warn
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def digest(record: dict[str, Packed]) -> str:
    """Of a packed record's values, to the bit.

    >>> digest({"a": pack(torch.zeros(1))}) == digest({"a": pack(-torch.zeros(1))})
    False
    """
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(record):
        dtype, shape, data = record[name]
        hashed.update(f"{name} {dtype} {shape}".encode())
        hashed.update(data)
    return hashed.hexdigest()


def agreed(answers: Sequence[dict]) -> dict[str, dict[str, Packed]]:
    """The records of rank 0 by key, where all ranks of tensor parallelism have the same.

    Each rank feeds its own records back, and none of the others.

    Args:
        answers: of rank 0 records by key, of the others digests by key.

    Raises:
        LatentMismatchError: a rank has other tokens, latents or log-probs, or no record.
    """
    records, *others = answers
    for rank, digests in enumerate(others, start=1):
        for key, record in records.items():
            if digests.get(key) != digest(record):
                raise LatentMismatchError(
                    "ranks of tensor parallelism have decoded different latents",
                    where=f"record {key}, rank {rank}",
                    got=digests.get(key, "no record"),
                    expected=f"{digest(record)}, the digest of rank 0",
                    fix="Run engine vllm on one device (tensor_parallel_size=1).",
                )
    return records
