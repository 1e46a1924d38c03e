"""What each node of a Ray cluster is asked before a job that would fail an hour in.

`grpo_latent.train` asks, before any worker starts, whether package and files are the driver's and
whether outputs come together in one place. `recipes/*/submit.sh` submits
`python -m grpo_latent.check_cluster` before that, with the job's working directory: it also lets
each node import the plug-in and find it registered.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import grpo_latent
from grpo_latent.common.node_files import FileRequest, marked, problems_here
from grpo_latent.common.paths import READ, WRITTEN
from grpo_latent.errors import PreflightError
from grpo_latent.verl_plugin.boot.cluster_resources import alive_nodes

TIMEOUT_S = 300.0
CONNECT_S = 10.0
FIX = (
    "Mount data, model and outputs at the same path on every node; ship grpo_latent and reward "
    "files by --working-dir, pip or image."
)


@dataclass(frozen=True)
class NodeReport:
    """What one node said. `problems` is empty where the job can run."""

    node: str
    python: str
    version: str
    problems: list[str] = field(default_factory=list)


def inspect_node(request: FileRequest) -> NodeReport:
    """Checks the node that this runs on."""
    problems = []
    try:
        from grpo_latent.verl_plugin.boot.registration import verify

        verify("check_cluster")
    except Exception as error:  # any failure to import or register is the finding
        problems.append(f"verl plug-in: {type(error).__name__}: {error}")
    problems += problems_here(request)
    return NodeReport(
        os.uname().nodename, sys.version.split()[0], grpo_latent.__version__, problems
    )


def join(**arguments: Any) -> None:
    """`ray.init`, but for a head that does not answer, which Ray itself asks for minutes.

    Raises:
        PreflightError: nothing answers at RAY_ADDRESS, or no Ray is found.
    """
    host, _, port = _address().removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            raise _no_answer(error) from error
    try:
        ray.init(**arguments)
    except ConnectionError as error:
        if arguments.get("address") == "local":  # no cluster was asked for
            raise
        raise _no_answer(error) from error


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "")


def _no_answer(error: OSError) -> PreflightError:
    return PreflightError(
        "no Ray cluster answers",
        where=f"RAY_ADDRESS={_address()}" if _address() else "Ray",
        got=f"{type(error).__name__}: {error}",
        expected="a head that runs, at an address that is reached from here",
        fix="Start it (`bash recipes/cluster/start.sh`), or unset RAY_ADDRESS for a Ray of the "
        "run's own.",
    )


def check_cluster(
    required_files: list[str], output_dir: str | None = None, timeout_s: float = TIMEOUT_S
) -> list[NodeReport]:
    """Runs `inspect_node` on every node that is alive.

    Args:
        required_files: model folder, data files, reward files of the job, as the job will name
            them.
        output_dir: of the job.

    Raises:
        PreflightError: no cluster answers; a node reports a problem, or does not answer in time.
    """
    if not ray.is_initialized():
        join(address="auto", log_to_driver=False)
    written = [] if output_dir is None else [output_dir]
    with marked(required_files, written, shared=len(alive_nodes()) > 1) as request:
        reports = ask_nodes(inspect_node, request, timeout_s)
    _raise_problems({address: report.problems for address, report in reports.items()})
    return list(reports.values())


def check_files(config: DictConfig) -> None:
    """Asks each node, where there are several, for the files of a run.

    Raises:
        PreflightError: a node lacks a file, has another one than the driver, or would keep its
            outputs to itself; or it does not answer in time.
    """
    if len(alive_nodes()) < 2:
        return
    written = outermost(paths_of(config, WRITTEN))
    with marked(paths_of(config, READ), written, shared=True) as request:
        _raise_problems(ask_nodes(problems_here, request, TIMEOUT_S))


def paths_of(config: DictConfig, keys: tuple[str, ...]) -> list[str]:
    """The paths that a config names under `keys`, each once."""
    found: list[str] = []
    for key in keys:
        value = OmegaConf.select(config, key)
        for item in value if OmegaConf.is_list(value) else [value]:
            path = item.get("path") if OmegaConf.is_dict(item) else item
            if isinstance(path, str) and path:
                found.append(path)
    return list(dict.fromkeys(found))


def outermost(folders: list[str]) -> list[str]:
    """The folders that lie in none of the others.

    >>> outermost(["/out", "/out/checkpoints", "/outside"])
    ['/out', '/outside']
    """
    return [f for f in folders if not any(f != g and Path(f).is_relative_to(g) for g in folders)]


def ask_nodes(
    function: Callable[[FileRequest], Any], request: FileRequest, timeout_s: float
) -> dict[str, Any]:
    """What `function` returns on each node that is alive, by the node's address.

    Raises:
        PreflightError: a node does not answer in time.
    """
    # a node whose CPUs are all taken answers, too
    task = ray.remote(num_cpus=0)(function)
    pending = {}
    for node in alive_nodes():
        # not soft: another node would answer in its place
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        address = node["NodeManagerAddress"]
        pending[address] = task.options(scheduling_strategy=there).remote(request)
    done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=timeout_s)
    silent = [address for address, answer in pending.items() if answer not in done]
    if silent:
        raise PreflightError(
            "nodes did not answer",
            where=f"nodes {', '.join(silent)}",
            got=f"no reply in {timeout_s:.0f} s",
            expected=f"{len(pending)} replies",
        )
    return {address: ray.get(answer) for address, answer in pending.items()}


def _raise_problems(problems_of: dict[str, list[str]]) -> None:
    """Raises `PreflightError` where a node has a problem."""
    found = [
        f"{address}: {problem}"
        for address, problems in problems_of.items()
        for problem in problems
    ]
    if found:
        nodes = [address for address, problems in problems_of.items() if problems]
        raise PreflightError(
            "the job cannot run on this cluster",
            where=f"nodes {', '.join(nodes)}",
            got="; ".join(found),
            expected="package, plug-in and files of the driver on every node",
            fix=FIX,
        )
