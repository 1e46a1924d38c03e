"""Where rollout servers apart from trainers are placed, and how weights come to them.

No Ray is started here; tests/cluster runs them.
"""

from types import SimpleNamespace

import pytest
from tiny_run import make_config

from grpo_latent.errors import ConfigError
from grpo_latent.verl_plugin.boot import cluster_resources, compat
from grpo_latent.verl_plugin.rollout import apart
from grpo_latent.verl_plugin.trainer.config_check import check_config

APART = ("latent.placement=apart", "actor_rollout_ref.rollout.nnodes=2")


def test_apart_needs_nodes_and_engine_hf(tmp_path):
    check_config(make_config(tmp_path, tmp_path, *APART))
    for change, error in (
        ("actor_rollout_ref.rollout.nnodes=0", "rollout.nnodes: .*=apart .* got 0; expected >= 1"),
        (
            "actor_rollout_ref.rollout.name=vllm_latent",
            "rollout.name: .*got vllm_latent; expected",
        ),
        ("actor_rollout_ref.hybrid_engine=false", "latent.placement=apart separates"),
        ("latent.placement=elsewhere", "latent.placement: .*beside"),
    ):
        with pytest.raises(ConfigError, match=error):
            check_config(make_config(tmp_path, tmp_path, *APART, change))


def test_the_cluster_is_asked_for_nodes_of_both_kinds(tmp_path, monkeypatch):
    more = ("trainer.nnodes=2", "actor_rollout_ref.rollout.n_gpus_per_node=3")
    config = make_config(tmp_path, tmp_path, *APART, *more)
    needed = cluster_resources.cpus_needed(config)
    assert needed == 1 + 1 + 2 + 6 + 1
    asked = []
    monkeypatch.setattr(cluster_resources.ray, "cluster_resources", lambda: {"CPU": needed})

    def find(*of, taken=()):
        asked.append((*of, taken))
        return "their nodes"

    monkeypatch.setattr(cluster_resources, "training_nodes", find)
    cluster_resources.check_resources(config)
    assert asked == [(2, 1, "CPU", ()), (2, 3, "CPU", "their nodes")]


def test_one_server_for_each_place_gets_each_version(tmp_path, monkeypatch):
    config = make_config(tmp_path, tmp_path, *APART, "actor_rollout_ref.rollout.n_gpus_per_node=2")
    started, sent = [], []

    def groups(counts, taken):
        assert (counts, taken) == ([2, 2], ["trainer's node"])
        return ["group of node 1", "group of node 2"]

    async def start(name, where, rollout, model, rank):
        started.append((name, where["scheduling_strategy"], where["num_gpus"]))
        return f"server {rank}"

    monkeypatch.setattr(compat, "placement_groups", groups)
    monkeypatch.setattr(compat, "is_cpu", lambda: True)
    monkeypatch.setattr(apart, "training_nodes", lambda *of: ["trainer's node"])
    monkeypatch.setattr(apart, "start_server", start)
    monkeypatch.setattr(apart.ray, "get", lambda answer: answer)
    monkeypatch.setattr(
        apart,
        "PlacementGroupSchedulingStrategy",
        lambda group, placement_group_bundle_index: (group, placement_group_bundle_index),
    )
    workers = SimpleNamespace(send_weights_to=lambda *what: sent.append(what))
    servers = apart.ApartServers(config, workers)
    assert started == [
        (f"hf_latent_server_{rank}", (f"group of node {1 + rank // 2}", rank % 2), 0)
        for rank in range(4)
    ]
    trainer = SimpleNamespace(llm_server_manager=SimpleNamespace())
    servers.serve(trainer)
    assert trainer.llm_server_manager.server_handles == [f"server {rank}" for rank in range(4)]
    trainer.checkpoint_manager.sleep_replicas()
    trainer.checkpoint_manager.update_weights(7)
    assert sent == [([f"server {rank}" for rank in range(4)], 7)]
