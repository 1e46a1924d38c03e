"""Waves of more rows than Ray lets an actor work on at a time by itself."""

import asyncio

import pytest
import ray
from omegaconf import OmegaConf

from grpo_latent.verl_plugin.rollout import replica
from grpo_latent.verl_plugin.rollout.waves import MAX_CALLS, Ticket, Waves

NUM_ROWS = 1200


@pytest.mark.slow
@pytest.mark.ray
def test_a_wave_beyond_rays_own_limit_becomes_complete(local_ray):
    class Server:  # in here: Ray sends it by value, for a worker cannot import this file
        """What a rollout server does at its barrier."""

        def __init__(self):
            self.waves = Waves(lambda payloads: payloads, timeout_s=120, where="server 0")

        async def join(self, ticket, payload):
            return await self.waves.join(ticket, payload)

    server = ray.remote(Server).options(num_cpus=0, max_concurrency=MAX_CALLS).remote()
    rows = tuple(range(NUM_ROWS))
    results = ray.get([server.join.remote(Ticket("w", row, rows, 0), row) for row in rows])
    assert results == list(rows)


def test_servers_are_launched_with_that_room(monkeypatch):
    """Up to the actor's options: what they are made with."""
    asked = {}

    class Refused(Exception):
        pass

    class Actor:
        def options(self, **options):
            asked.update(options)
            raise Refused

    class Call:
        async def remote(self, function):
            return "node", None

    class Worker:
        __ray_call__ = Call()

    class Affinity:
        def __init__(self, **kwargs):
            pass

    monkeypatch.setattr(replica.ray, "remote", lambda cls: Actor())
    monkeypatch.setattr(replica, "NodeAffinitySchedulingStrategy", Affinity)
    config = OmegaConf.create({"max_num_seqs": 256})
    with pytest.raises(Refused):
        asyncio.run(replica.launch_server("server", Worker(), config, {"path": "model"}))
    assert asked["max_concurrency"] == MAX_CALLS > 100 * NUM_ROWS
