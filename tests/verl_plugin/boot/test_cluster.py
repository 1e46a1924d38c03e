"""What a cluster is asked before a job, and what a job leaves alone on a cluster that runs.

No Ray is started here.
"""

import pytest
import ray
from omegaconf import OmegaConf
from tiny_run import make_config

import grpo_latent
from grpo_latent.errors import ConfigError, PreflightError
from grpo_latent.train import ray_arguments
from grpo_latent.verl_plugin.boot import cluster
from grpo_latent.verl_plugin.boot.cluster_resources import check_cpus, cpus_needed


def test_a_node_that_can_run_the_job(tmp_path):
    (tmp_path / "train.parquet").touch()
    report = cluster.inspect_node(
        [str(tmp_path / "train.parquet")], str(tmp_path / "new" / "out"), grpo_latent.__version__
    )
    assert report.problems == [] and report.version == grpo_latent.__version__
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_a_node_names_all_that_is_wrong(tmp_path, monkeypatch):
    def broken(process):
        raise ImportError("no verl here")

    monkeypatch.setattr("grpo_latent.verl_plugin.boot.registration.verify", broken)
    (tmp_path / "file").touch()
    report = cluster.inspect_node([str(tmp_path / "gone")], str(tmp_path / "file" / "out"), "9.9")
    assert [problem.split(":")[0] for problem in report.problems] == [
        f"grpo_latent is {grpo_latent.__version__}, the driver's is 9.9",
        "verl plug-in",
        "no such file",
        f"output folder {tmp_path / 'file' / 'out'} is not writable",
    ]
    assert "no verl here" in report.problems[1] and "gone" in report.problems[2]


class FakeTask:
    """`ray.remote` of `inspect_node` on two nodes, of which one lacks a file."""

    def options(self, scheduling_strategy):
        self.node = scheduling_strategy.node_id
        return self

    def remote(self, files, output_dir, version):
        problems = ["no such file: train.parquet"] if self.node == "b" else []
        return cluster.NodeReport(self.node, "3.11", version, problems)


def test_the_problem_of_one_node_stops_the_job(monkeypatch):
    nodes = [{"Alive": True, "NodeID": name * 56} for name in "ac"] + [
        {"Alive": False, "NodeID": "d" * 56}
    ]
    monkeypatch.setattr(
        cluster, "NodeAffinitySchedulingStrategy", lambda node, soft: _Strategy(node[0])
    )
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "remote", lambda **options: lambda function: FakeTask())
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster.ray, "get", lambda pending, timeout: pending)
    assert [report.node for report in cluster.check_cluster(["train.parquet"])] == ["a", "c"]
    nodes.append({"Alive": True, "NodeID": "b" * 56})
    with pytest.raises(
        PreflightError, match="got b: no such file: train.parquet; expected .* on every node"
    ):
        cluster.check_cluster(["train.parquet"])


class _Strategy:
    def __init__(self, node_id):
        self.node_id = node_id


def test_too_few_logical_cpus_are_named(tmp_path, monkeypatch):
    config = make_config(tmp_path, tmp_path)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus_needed(config))})
    check_cpus(config)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus_needed(config) - 1.0})
    with pytest.raises(ConfigError, match="too few CPUs; got 3; expected >= 4"):
        check_cpus(config)


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
