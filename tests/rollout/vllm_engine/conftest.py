"""Marks and skips for tests that start vLLM."""

import importlib.metadata
import os

import pytest

# read when vllm is imported; one thread, because threads that spin on shared cores make runs ten times slower
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def has_vllm() -> bool:
    distributions = (name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"]))
    return not {"vllm", "vllm-cpu"}.isdisjoint(distributions)


def pytest_collection_modifyitems(items):
    if has_vllm():
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: run `make vllm`"))
