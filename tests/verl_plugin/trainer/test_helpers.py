"""Rollout servers that start before their training workers are those that verl's replicas take.

No Ray is started here; test_training.py runs them.
"""

import asyncio
from types import SimpleNamespace

import pytest
from tiny_run import make_config

from grpo_latent.verl_plugin.boot import compat
from grpo_latent.verl_plugin.rollout import replica
from grpo_latent.verl_plugin.rollout.replica import LatentReplica
from grpo_latent.verl_plugin.trainer import helpers

TWO = "trainer.n_gpus_per_node=2"


class Actor:
    """Stands for an actor of Ray's and for its class; keeps what was asked."""

    asked: list[tuple] = []

    def options(self, **options):
        self.chosen = options
        return self

    def remote(self, *arguments):
        self.asked.append((self.chosen, arguments))
        return self

    @property
    def wake_up(self):
        return SimpleNamespace(remote=self._ready)

    async def _ready(self):
        pass


@pytest.fixture
def asked(monkeypatch):
    """The servers that are made, (options, arguments) each, on one node."""
    monkeypatch.setattr(Actor, "asked", [])
    monkeypatch.setattr(replica.ray, "remote", lambda cls: Actor())
    monkeypatch.setattr(replica.ray.actor, "ActorHandle", Actor)
    monkeypatch.setattr(replica, "NodeAffinitySchedulingStrategy", lambda **where: where)
    monkeypatch.setattr(helpers, "alive_nodes", lambda: [{"NodeID": "the node"}])
    monkeypatch.setattr(compat, "is_cpu", lambda: True)
    return Actor.asked


def test_replicas_find_the_servers_that_they_would_have_made(asked, tmp_path):
    config = make_config(tmp_path, tmp_path, TWO)
    assert len(helpers.make_servers(config)) == 2
    early = list(asked)
    asked.clear()

    async def whereabouts(function):
        return "the node", None

    worker = SimpleNamespace(__ray_call__=SimpleNamespace(remote=whereabouts))
    for rank in range(2):
        actor_rollout = config.actor_rollout_ref
        later = LatentReplica(rank, actor_rollout.rollout, actor_rollout.model, gpus_per_node=2)
        later.workers = [worker]
        asyncio.run(later.launch_servers())
    assert early == asked and len(early) == 2
    assert [options["name"] for options, _ in early] == [f"hf_latent_server_{i}" for i in (0, 1)]
    assert all(options["get_if_exists"] for options, _ in early)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": ["latent.placement=apart", "actor_rollout_ref.rollout.nnodes=1"]},
        {"config": ["actor_rollout_ref.rollout.name=vllm_latent"]},
        {"nodes": 2},
        {"is_cpu": False},
    ],
    ids=["apart", "vllm", "two nodes", "GPUs"],
)
def test_where_a_place_is_not_known_servers_wait_for_their_workers(
    asked, tmp_path, monkeypatch, changes
):
    config = make_config(tmp_path, tmp_path, TWO, *changes.get("config", ()))
    nodes = [{"NodeID": str(i)} for i in range(changes.get("nodes", 1))]
    monkeypatch.setattr(helpers, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(compat, "is_cpu", lambda: changes.get("is_cpu", True))
    assert helpers.make_servers(config) == [] == asked
