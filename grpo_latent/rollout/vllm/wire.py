"""Packs tensors as plain bytes, for vLLM's RPC.

Nested in an answer, tensors come back from another process as lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
