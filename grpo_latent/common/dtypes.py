"""Names of the dtypes and devices of weights, as configs and command lines write them."""

from __future__ import annotations

import torch

from grpo_latent.errors import ConfigError

# verl's short names beside torch's
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(name: str, where: str = "dtype") -> torch.dtype:
    """The dtype of that name.

    >>> parse_dtype("bf16")
    torch.bfloat16

    Raises:
        ConfigError: a name that `DTYPES` lacks; `where` says which setting it came from.
    """
    if name not in DTYPES:
        raise ConfigError(
            "unknown dtype", where=where, got=name, expected=f"one of {tuple(DTYPES)}"
        )
    return DTYPES[name]


def parse_device(name: str | torch.device, where: str = "device") -> torch.device:
    """The device of that name, where this process has it.

    Raises:
        ConfigError: no device's name, or one of a device that is not here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of torch without CUDA: an AssertionError
        raise ConfigError(
            "no such device here",
            where=where,
            got=f"{name}: {str(error).splitlines()[0]}",
            expected="cpu, cuda or cuda:<n>",
        ) from error
    return device
