"""What a cluster is asked before a job, and what a job leaves alone on a cluster that runs.

No Ray is started here.
"""

import socket
from types import SimpleNamespace

import pytest
import ray
from omegaconf import OmegaConf
from tiny_run import make_config

import grpo_latent
from grpo_latent.common.node_files import FileRequest, package_digest, print_of
from grpo_latent.common.paths import READ, WRITTEN
from grpo_latent.errors import ConfigError, PluginError, PreflightError
from grpo_latent.train import ray_arguments
from grpo_latent.verl_plugin.boot import cluster, start_queue
from grpo_latent.verl_plugin.boot.cluster_resources import (
    check_resources,
    cpus_needed,
    training_nodes,
)


def request(**changes):
    return FileRequest(**{"package": package_digest(), **changes})


def test_a_node_that_can_run_the_job(tmp_path):
    (tmp_path / "train.parquet").touch()
    seen = {str(tmp_path / "train.parquet"): print_of(tmp_path / "train.parquet")}
    report = cluster.inspect_node(
        request(read=seen, written={str(tmp_path / "new" / "out"): None})
    )
    assert report.problems == [] and report.version == grpo_latent.__version__
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_a_node_names_all_that_is_wrong(tmp_path, monkeypatch):
    def broken(process):
        raise ImportError("no verl here")

    monkeypatch.setattr("grpo_latent.verl_plugin.boot.registration.verify", broken)
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    asked = request(package="other", read={str(tmp_path / "gone"): None}, written={out: None})
    report = cluster.inspect_node(asked)
    assert [problem.split(":")[0].split(" in /")[0] for problem in report.problems] == [
        "verl plug-in",
        "grpo_latent",
        "no such file",
        f"output folder {out} is not writable",
    ]
    assert "no verl here" in report.problems[0] and "gone" in report.problems[2]
    assert f"not the driver's (version {grpo_latent.__version__})" in report.problems[1]


class FakeTask:
    """A task of `ray.remote`, on the node that it is bound to: one lacks a file, one is silent."""

    def __init__(self, function):
        self.function = function

    def options(self, scheduling_strategy):
        self.node = scheduling_strategy
        return self

    def remote(self, asked):
        lacking = ["no such file: train.parquet"] if self.node == "b" else []
        if self.function is cluster.problems_here:
            return self.node, lacking
        return self.node, cluster.NodeReport(self.node, "3.11", "0", lacking)


@pytest.fixture
def nodes(monkeypatch):
    """Ray's list of nodes: `a` and `c` at first."""

    def node(name, address, alive=True):
        resources = {"CPU": 4.0}
        return {
            "Alive": alive,
            "NodeID": name,
            "NodeManagerAddress": address,
            "Resources": resources,
        }

    listed = [node("c", "10.0.0.10"), node("a", "10.0.0.2"), node("d", "10.0.0.4", alive=False)]
    monkeypatch.setattr(cluster, "NodeAffinitySchedulingStrategy", lambda node, soft: node)
    for name, stand_in in {
        "is_initialized": lambda: True,
        "remote": lambda **options: FakeTask,
        "nodes": lambda: listed,
        "wait": lambda pending, num_returns, timeout: ([p for p in pending if p[0] != "e"], []),
        "get": lambda answer: answer[1],
        "get_runtime_context": lambda: SimpleNamespace(get_node_id=lambda: "a"),
    }.items():
        monkeypatch.setattr(ray, name, stand_in)
    return SimpleNamespace(listed=listed, node=node)


def test_the_problem_of_one_node_stops_the_job(nodes, tmp_path):
    reports = cluster.check_cluster(["train.parquet"], str(tmp_path / "out"))
    assert [report.node for report in reports] == ["a", "c"]
    nodes.listed.append(nodes.node("b", "10.0.0.3"))
    error = (
        "^nodes 10.0.0.3: the job cannot run on this cluster; got 10.0.0.3: no such file: "
        "train.parquet; expected .* on every node"
    )
    with pytest.raises(PreflightError, match=error):
        cluster.check_cluster(["train.parquet"])


def test_a_run_asks_each_node_for_its_files_and_names_those_that_are_silent(nodes, tmp_path):
    config = make_config(tmp_path, tmp_path / "out")
    cluster.check_files(config)
    assert list((tmp_path / "out").iterdir()) == []  # the marks have gone
    nodes.listed.append(nodes.node("b", "10.0.0.3"))
    with pytest.raises(PreflightError, match="^nodes 10.0.0.3: .* no such file"):
        cluster.check_files(config)
    nodes.listed[:] = [nodes.node("a", "10.0.0.2"), nodes.node("e", "10.0.0.5")]
    with pytest.raises(PreflightError, match="^nodes 10.0.0.5: nodes did not answer"):
        cluster.check_files(config)
    del nodes.listed[0]  # one node has its files to itself
    cluster.check_files(config)


def test_all_paths_of_a_config_are_asked_for(tmp_path):
    more = ["latent.reward.functions=[{path: reward/digits.py, name: compute_score}]"]
    config = make_config(tmp_path, tmp_path / "out", *more)
    read = {
        str(tmp_path / name) for name in ("model", "train.parquet", "val.parquet", "reward.py")
    }
    read |= {"reward/digits.py", "pkg://grpo_latent.verl_plugin.trainer.dataset"}
    assert set(cluster.paths_of(config, READ)) == read
    written = [str(tmp_path / "out" / name) for name in ("", "rollouts", "checkpoints")]
    assert cluster.paths_of(config, WRITTEN) == [written[0].rstrip("/"), *written[1:]]


def test_too_few_logical_cpus_are_named(nodes, tmp_path, monkeypatch):
    config = make_config(tmp_path, tmp_path)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus_needed(config))})
    check_resources(config)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus_needed(config) - 1.0})
    with pytest.raises(ConfigError, match="too few CPUs; got 3; expected >= 4"):
        check_resources(config)


def test_without_a_gpu_that_is_what_is_said(nodes, tmp_path, monkeypatch):
    config = make_config(tmp_path, tmp_path, "trainer.device=cuda", "trainer.n_gpus_per_node=2")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})  # too few of these as well
    with pytest.raises(ConfigError, match="^trainer.device: no node has a GPU; got cuda"):
        check_resources(config)


def test_training_workers_have_nodes_of_their_own_and_the_driver_has_its_last(nodes):
    nodes.listed.append(nodes.node("b", "10.0.0.3"))
    assert training_nodes(2, 4, "CPU") == ["b", "c"]
    assert training_nodes(3, 1, "CPU") == ["b", "c", "a"]
    assert training_nodes(2, 1, "CPU", taken=["b"]) == ["c", "a"]
    nodes.listed[-1]["Resources"]["CPU"] = 3.0
    error = (
        "^trainer.nnodes: too few nodes with room .* got 3; CPUs: 10.0.0.2 has 4, 10.0.0.3 has 3, "
        "10.0.0.10 has 4; expected 3 nodes with 4"
    )
    with pytest.raises(ConfigError, match=error):
        training_nodes(3, 4, "CPU")
    with pytest.raises(ConfigError, match="GPUs: 10.0.0.2 has 0"):
        training_nodes(1, 1, "GPU")


def test_resources_are_stated_for_a_ray_of_our_own_only(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    config = make_config(tmp_path, tmp_path)
    own = ray_arguments(config)
    assert own["num_cpus"] == 16 and own["_node_ip_address"] == "127.0.0.1"
    assert own["address"] == "local"  # else Ray joins a cluster that happens to run here
    assert own["runtime_env"]["env_vars"]["VERL_PLATFORM"] == "cpu"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert set(ray_arguments(config)) == {"runtime_env", "log_to_driver"}


def test_workers_collect_rarely_while_they_import(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    config = make_config(tmp_path, tmp_path)
    hook = "grpo_latent.common.collector.collect_rarely"
    assert ray_arguments(config)["runtime_env"]["worker_process_setup_hook"] == hook
    # Ray refuses a second one beside the submitted job's
    submitted = '{"runtime_env": {"worker_process_setup_hook": "mine.start"}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", submitted)
    assert "worker_process_setup_hook" not in ray_arguments(config)["runtime_env"]


def test_a_queue_that_does_not_start_is_named(tmp_path, monkeypatch):
    def refuse(config):
        raise ConnectionError(f"no {config.backend.storage_backend} here")

    monkeypatch.setattr(start_queue.tq, "init", refuse)
    started = start_queue.start_transfer_queue(make_config(tmp_path, tmp_path))
    with pytest.raises(PluginError, match="transfer_queue: TransferQueue does not start.*Simple"):
        started.result(timeout=30)


@pytest.mark.parametrize("value", [5, ["num_cpus=16"]])
def test_arguments_of_ray_are_a_section(tmp_path, value):
    config = make_config(tmp_path, tmp_path)
    OmegaConf.update(config, "ray_kwargs.ray_init", value, merge=False)
    with pytest.raises(ConfigError, match="^ray_kwargs.ray_init: not a section; got"):
        ray_arguments(config)


def test_variables_of_the_submitted_job_are_not_set_again(tmp_path, monkeypatch):
    submitted = '{"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2", "WANDB_MODE": "offline"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", submitted)
    arguments = ray_arguments(make_config(tmp_path, tmp_path))
    assert set(arguments) == {"runtime_env", "log_to_driver"}
    env_vars = arguments["runtime_env"]["env_vars"]
    assert (
        "OMP_NUM_THREADS" not in env_vars
        and env_vars["VERL_USE_EXTERNAL_MODULES"] == "grpo_latent.verl_plugin"
    )


def test_a_head_that_does_not_answer_is_named_at_once(monkeypatch):
    """Ray would ask it again and again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(PreflightError, match=f"^RAY_ADDRESS={address}: no Ray cluster answers"):
        cluster.join(address="auto")


def test_no_ray_at_all_is_named(monkeypatch):
    def refuse(**_):
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(PreflightError, match="^Ray: no Ray cluster answers.*running Ray instance"):
        cluster.join(address="auto")
    with pytest.raises(ConnectionError, match="^could not find"):  # what a Ray of our own says
        cluster.join(address="local")
