"""Nodes that are lost, by Ray's list of them and by real sockets that answer or do not.

No Ray is started here.
"""

import pickle
import socket
from types import SimpleNamespace

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

from grpo_latent.errors import GrpoLatentError, NodeLostError
from grpo_latent.verl_plugin.boot import actor_watch, node_watch
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch


def node(name, address, port):
    return {"NodeID": name, "NodeManagerAddress": address, "NodeManagerPort": port}


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """A cluster of this node and another, whose raylet is a socket; clock and actor table."""
    clock, rows = [1000.0], []
    raylet = socket.create_server(("127.0.0.1", 0))
    listed = [node("here", "127.0.0.1", 1), node("b", "127.0.0.1", raylet.getsockname()[1])]
    context = SimpleNamespace(get_job_id=lambda: "01000000", get_node_id=lambda: "here")
    for module in (actor_watch, node_watch):
        monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(node_watch, "alive_nodes", lambda: list(listed))

    def actors(job_id, actor_state_name=None):
        found = [row for row in rows if actor_state_name in (None, row["State"])]
        return {row["ActorID"]: row for row in found}

    monkeypatch.setattr(actor_watch.ray_state, "actors", actors)
    worker_node = SimpleNamespace(is_head=lambda: False, get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(actor_watch.ray_worker, "_global_node", worker_node)
    yield SimpleNamespace(listed=listed, raylet=raylet, clock=clock, rows=rows)
    raylet.close()


def actor(actor_id, name, address, state="ALIVE"):
    died = ActorDiedErrorContext(reason=ActorDiedErrorContext.WORKER_DIED, error_message="gone")
    return {
        "ActorID": actor_id,
        "ActorClassName": name,
        "Name": "",
        "Pid": 7,
        "State": state,
        "Address": {"IPAddress": address},
        "EndTime": 1,
        "DeathCause": ActorDeathCause(actor_died_error_context=died),
    }


def test_a_node_that_ray_gave_up_is_named_with_what_it_held(nodes):
    watch = ActorWatch()
    watch.position = "last step 4/6"
    watch.check()
    nodes.rows += [
        actor("1", "LatentRolloutServer", "127.0.0.1"),
        # its death follows from the node's, as that of a rank elsewhere that waited for it
        actor("2", "make_class.<locals>.WorkerDict", "127.0.0.1", "DEAD"),
        actor("3", "RewardLoopWorker", "10.0.0.9", "DEAD"),
    ]
    del nodes.listed[1]
    nodes.clock[0] += actor_watch.POLL_S
    watch.check()  # a run may end by itself
    nodes.clock[0] += actor_watch.GRACE_S
    with pytest.raises(NodeLostError) as raised:
        watch.check()
    assert str(raised.value) == (
        "node 127.0.0.1, last step 4/6: a node of the run is lost; got Ray has declared it dead, "
        "which held: rollout server, training worker; expected every node reachable until the run "
        "ends. The same command again goes on from the last checkpoint, on the nodes that are "
        "left: choose trainer.nnodes and trainer.n_gpus_per_node for them."
    )
    error = raised.value
    assert isinstance(error, GrpoLatentError) and str(pickle.loads(pickle.dumps(error))) == str(
        error
    )


def test_a_silent_node_has_its_time_unless_the_run_has_failed(nodes):
    watch = ActorWatch(grace_s=0.0)
    nodes.raylet.close()
    assert watch.first_death() is None
    nodes.clock[0] += node_watch.SILENT_S - 1
    assert watch.first_death() is None
    lost = watch.first_death(has_failed=True)
    assert lost.address == "127.0.0.1" and "refused" in lost.detail
    nodes.clock[0] += 1
    with pytest.raises(NodeLostError, match="its raylet does not answer .*refused"):
        watch.check()


def test_a_node_that_answers_again_is_not_lost(nodes):
    watch = ActorWatch(grace_s=0.0)
    port = nodes.raylet.getsockname()[1]
    nodes.raylet.close()
    assert watch.first_death() is None
    with socket.create_server(("127.0.0.1", port)):
        nodes.clock[0] += node_watch.SILENT_S
        assert watch.first_death() is None
    nodes.clock[0] += node_watch.SILENT_S
    assert watch.first_death() is None  # its silence begins anew


def test_this_node_and_one_that_joined_later_are_not_watched(nodes):
    watch = ActorWatch(grace_s=0.0)
    nodes.listed.append(node("later", "127.0.0.1", 1))
    nodes.clock[0] += node_watch.SILENT_S
    assert watch.first_death(has_failed=True) is None
