"""Benchmarks by name; `common.registry` says how all registries work."""

from __future__ import annotations

from grpo_latent.common.registry import Registry, instance_of
from grpo_latent.eval.benchmarks.protocol import Benchmark

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark", instance_of(Benchmark), lambda benchmark: (benchmark.name,)
)
register = BENCHMARKS.register


def find_benchmark(name: str) -> Benchmark:
    """Finds the benchmark of a registered name, or a user's own of package.module:NAME.

    Raises:
        ConfigError: unknown, not importable, or no `Benchmark`.
    """
    # registered, as reports look groups up by a benchmark's name
    return register(BENCHMARKS.find(name, "data.benchmark.name"))
