"""Benchmarks by name, or by package.module:NAME."""

from __future__ import annotations

import importlib

from grpo_latent.errors import ConfigError
from grpo_latent.eval.benchmarks.protocol import Benchmark

BENCHMARKS: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Makes a benchmark known by its name, and returns it; idempotent.

    Raises:
        ConfigError: another benchmark has the name.
    """
    # reports look groups up by this name: a second one must not replace the first
    if BENCHMARKS.setdefault(benchmark.name, benchmark) is not benchmark:
        raise ConfigError(
            "two benchmarks of one name",
            where="benchmark",
            got=benchmark.name,
            expected=f"a name other than {sorted(BENCHMARKS)}",
        )
    return benchmark


def find_benchmark(name: str) -> Benchmark:
    """Finds the benchmark of a registered name, or a user's own of package.module:NAME.

    Raises:
        ConfigError: unknown, not importable, or no `Benchmark`.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            "unknown benchmark",
            where="benchmark",
            got=name,
            expected=f"one of {sorted(BENCHMARKS)}, or package.module:NAME",
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "cannot import the benchmark",
            where="benchmark",
            got=f"{name}: {error}",
            expected="package.module:NAME of a Benchmark",
            fix="Put the module's folder on PYTHONPATH.",
        ) from error
    if not isinstance(found, Benchmark):
        raise ConfigError(
            "not a benchmark",
            where="benchmark",
            got=f"{name}: {type(found).__name__}",
            expected="a grpo_latent.eval.benchmarks.Benchmark",
        )
    return register(found)
