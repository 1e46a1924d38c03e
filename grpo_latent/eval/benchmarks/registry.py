"""Benchmarks by name, or by package.module:NAME."""

from __future__ import annotations

import importlib
from typing import TypeVar

from grpo_latent.errors import ConfigError
from grpo_latent.eval.benchmarks.protocol import Benchmark

BENCHMARKS: dict[str, Benchmark] = {}
Found = TypeVar("Found")
_MADE: dict[
    str, object
] = {}  # import path -> what its class made: one object, however often asked


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
    if ":" not in name:
        raise ConfigError(
            "unknown benchmark",
            where="benchmark",
            got=name,
            expected=f"one of {sorted(BENCHMARKS)}, or package.module:NAME",
        )
    return register(imported(name, Benchmark, "benchmark"))


def imported(path: str, kind: type[Found], where: str) -> Found:
    """Imports what package.module:NAME names: a `kind`, or a class of it without arguments.

    Raises:
        ConfigError: it cannot be imported or made, or is something else.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        if isinstance(found, type) and issubclass(found, kind):
            found = _MADE.setdefault(path, found())
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot import the {where}",
            where=where,
            got=f"{path}: {error}",
            expected=f"package.module:NAME of a {kind.__name__}",
            fix="Put the module's folder on PYTHONPATH.",
        ) from error
    if not isinstance(found, kind):
        raise ConfigError(
            f"not a {where}",
            where=where,
            got=f"{path}: {type(found).__name__}",
            expected=f"a grpo_latent.eval.benchmarks.{kind.__name__}",
        )
    return found
