"""Preflight of a Ray cluster, run on the cluster itself before a job that would fail an hour in.

`recipes/*/submit.sh` submits `python -m grpo_latent.check_cluster` first, with the same working
directory as the job. On each node it checks that the package imports, that its version is the
driver's, that the verl plug-in registers, that the files of the job are there, and that the output
folder can be written.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import grpo_latent
from grpo_latent.errors import PreflightError


@dataclass(frozen=True)
class NodeReport:
    """What one node said. `problems` is empty where the job can run."""

    node: str
    python: str
    version: str
    problems: list[str] = field(default_factory=list)


def inspect_node(
    required_files: list[str], output_dir: str | None, driver_version: str
) -> NodeReport:
    """Checks the node that this runs on."""
    problems = []
    if grpo_latent.__version__ != driver_version:
        problems.append(
            f"grpo_latent is {grpo_latent.__version__}, the driver's is {driver_version}"
        )
    try:
        from grpo_latent.verl_plugin.boot.registration import verify

        verify("check_cluster")
    except Exception as error:  # any failure to import or register is the finding
        problems.append(f"verl plug-in: {type(error).__name__}: {error}")
    problems += [
        f"no such file: {path} (cwd {os.getcwd()})"
        for path in required_files
        if not Path(path).exists()
    ]
    if output_dir is not None:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir):
                pass
        except OSError as error:
            problems.append(f"output folder {output_dir} is not writable: {error}")
    return NodeReport(
        os.uname().nodename, sys.version.split()[0], grpo_latent.__version__, problems
    )


def check_cluster(
    required_files: list[str], output_dir: str | None = None, timeout_s: float = 300
) -> list[NodeReport]:
    """Runs `inspect_node` on every node that is alive.

    Args:
        required_files: model folder, data files, reward files of the job, as the job will name
            them.
        output_dir: of the job.

    Raises:
        PreflightError: a node reports a problem, or does not answer in time.
    """
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    task = ray.remote(num_cpus=0)(inspect_node)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(required_files, output_dir, grpo_latent.__version__)
        for node in nodes
    ]
    try:
        reports = ray.get(pending, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise PreflightError(
            "nodes did not answer",
            where="check_cluster",
            got=f"no reply in {timeout_s:.0f} s",
            expected=f"{len(nodes)} replies",
        ) from error
    problems = [f"{report.node}: {problem}" for report in reports for problem in report.problems]
    if problems:
        raise PreflightError(
            "the job cannot run on this cluster",
            where="check_cluster",
            got="; ".join(problems),
            expected="package, plug-in and files on every node",
            fix="Mount data and model at the same path on every node; ship grpo_latent by "
            "--working-dir, pip or image.",
        )
    return reports
