"""Names of the dtypes that weights can have, as configs and command lines write them."""

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
