"""Deaths that end a run, and ends that are none: by Ray's own records, and of real actors."""

import inspect
import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

from grpo_latent.errors import ActorDeathError, ConfigError
from grpo_latent.verl_plugin.boot import actor_watch, node_watch
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch

CRASH = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer"
)


def row(actor_id, end_ms, reason, text="", name="RewardLoopWorker"):
    """A line of Ray's table of a dead actor."""
    context = ActorDiedErrorContext(reason=reason, error_message=text)
    return {
        "ActorID": actor_id,
        "ActorClassName": name,
        "Name": "",
        "Pid": 100 + int(actor_id),
        "Address": {"IPAddress": "10.0.0.7"},
        "EndTime": end_ms,
        "DeathCause": ActorDeathCause(actor_died_error_context=context),
    }


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Ray's table of dead actors, a list; time stands still at `clock[0]`."""
    rows, clock = [], [1000.0]
    context = SimpleNamespace(get_job_id=lambda: "01000000", get_node_id=lambda: "here")
    monkeypatch.setattr(actor_watch.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(
        actor_watch.ray_state, "actors", lambda **kwargs: {row["ActorID"]: row for row in rows}
    )
    node = SimpleNamespace(is_head=lambda: False, get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(actor_watch.ray_worker, "_global_node", node)
    monkeypatch.setattr(actor_watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(node_watch, "alive_nodes", lambda: [{"NodeID": "here"}])
    return rows, clock


def test_roles_are_of_classes_that_there_are():
    from transfer_queue.controller import TransferQueueController
    from transfer_queue.storage.simple_storage import SimpleStorageUnit
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.single_controller.ray.base import create_colocated_worker_cls
    from verl.trainer.main_ppo import TaskRunnerV1

    from grpo_latent.verl_plugin.rollout.agent_loop import LatentAgentLoopWorker
    from grpo_latent.verl_plugin.rollout.server import LatentRolloutServer
    from grpo_latent.verl_plugin.trainer import reports

    decorated = (TaskRunnerV1, TransferQueueController, SimpleStorageUnit)
    classes = [decorator.__ray_actor_class__ for decorator in decorated]
    classes += [RewardLoopWorker, LatentAgentLoopWorker, LatentRolloutServer]
    names = {found.__name__ for found in classes}
    # made where they are used, or only importable beside vLLM
    assert "class WorkerDict(" in inspect.getsource(create_colocated_worker_cls)
    assert "class ReportQueue:" in inspect.getsource(reports.start_report_queue)
    assert names | {"WorkerDict", "ReportQueue", "LatentVllmServer"} == set(actor_watch.ROLES)


def test_the_first_crash_is_named_after_its_grace(table, tmp_path):
    rows, clock = table
    (tmp_path / "worker-abc-01000000-102.err").touch()
    watch = ActorWatch()
    rows += [
        row("1", 20, ActorDiedErrorContext.WORKER_DIED, CRASH, "SimpleStorageUnit"),
        row("2", 10, ActorDiedErrorContext.WORKER_DIED, CRASH),
        row("3", 5, ActorDiedErrorContext.OWNER_DIED, "follows"),
    ]
    watch.position = "last step 3/9"
    watch.check()  # a run may end by itself
    clock[0] += actor_watch.GRACE_S
    with pytest.raises(ActorDeathError) as raised:
        watch.check()
    log = tmp_path / "worker-abc-01000000-102.err"
    assert str(raised.value) == (
        "reward worker, pid 102, node 10.0.0.7, last step 3/9: an actor of the run has died; got "
        "RewardLoopWorker: Worker unexpectedly exits with a connection error code 2. End of file.; "
        "expected every actor alive until the run ends. "
        f"Its log is {log}. The same command again goes on from the last checkpoint."
    )


def test_whoever_ends_as_meant_is_no_death(table):
    rows, clock = table
    watch = ActorWatch()
    left = (
        "Worker exit type: INTENDED_USER_EXIT Worker exit detail: Worker exits by an user request"
    )
    rows += [
        row("1", 1, ActorDiedErrorContext.OUT_OF_SCOPE),
        row("2", 2, ActorDiedErrorContext.REF_DELETED),
        row("3", 3, ActorDiedErrorContext.WORKER_DIED, left),
        row("4", 4, ActorDiedErrorContext.OWNER_DIED),
    ]
    for _ in range(20):
        watch.check()
        clock[0] += 10
    assert watch.first_death() is None


def test_what_was_killed_by_ray_has_the_time_in_which_verl_closes(table):
    rows, clock = table
    watch = ActorWatch()
    rows.append(row("1", 1, ActorDiedErrorContext.RAY_KILL))
    watch.check()
    clock[0] += actor_watch.KILLED_GRACE_S - 1
    watch.check()
    assert watch.first_death(with_killed=False) is None
    clock[0] += actor_watch.POLL_S
    with pytest.raises(ActorDeathError, match="reward worker"):
        watch.check()


def test_deaths_before_the_watch_began_are_not_its_own(table):
    rows, _ = table
    rows.append(row("1", 1, ActorDiedErrorContext.WORKER_DIED, CRASH))
    assert ActorWatch().first_death() is None


def test_a_fallen_ray_is_named_without_asking_it(table, monkeypatch, tmp_path):
    dead = [("log_monitor", SimpleNamespace(pid=6, returncode=-9))]
    node = SimpleNamespace(
        is_head=lambda: True,
        node_ip_address="127.0.0.1",
        get_logs_dir_path=lambda: str(tmp_path),
        dead_processes=lambda: dead,
    )
    watch = ActorWatch(grace_s=60.0)  # which it does not get
    monkeypatch.setattr(actor_watch.ray_worker, "_global_node", node)
    assert watch.first_death() is None  # of no consequence to a run
    dead.append(("gcs_server", SimpleNamespace(pid=7, returncode=-9)))
    monkeypatch.setattr(watch, "_rows", lambda: pytest.fail("the table is gone"))
    with pytest.raises(ActorDeathError, match="^Ray's gcs_server, pid 7, node 127.0.0.1, before"):
        watch.check()


@pytest.mark.slow
@pytest.mark.ray
def test_real_deaths(local_ray):
    """Each way to end an actor, and what the watch says of it."""

    # in here, so that workers get it by value: they do not know this module
    class Actor:
        def __init__(self, error=None):
            if error is not None:
                raise error

        def pid(self):
            return os.getpid()

        def leave(self):
            ray.actor.exit_actor()

        def exit(self):
            raise SystemExit(0)

    make = ray.remote(num_cpus=0)(Actor)

    def death_of(end, *arguments):
        actor, watch = make.options(name="it").remote(*arguments), ActorWatch(0.0, 0.0)
        pid = 0 if arguments else ray.get(actor.pid.remote())
        if end is None:  # else kept, as verl keeps its own: Ray might name this as the reason
            del actor
        else:
            end(actor, pid)
        deadline = time.monotonic() + 20
        while not watch._rows() or len(watch._rows()) == len(watch._old):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return pid, watch

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        pid, watch = death_of(lambda actor, pid, number=number: os.kill(pid, number))
        with pytest.raises(
            ActorDeathError, match=f"^actor it, pid {pid}, node [0-9.]+, "
        ) as error:
            watch.check()
        log = str(error.value).split("Its log is ")[1].split(". ")[0]
        assert log.endswith(f"-{pid}.err") and os.path.exists(log)
    for end in (lambda a, pid: a.leave.remote(), lambda a, pid: a.exit.remote(), None):
        assert death_of(end)[1].first_death() is None
    killed = death_of(lambda actor, pid: ray.kill(actor))[1]
    assert killed.first_death(with_killed=False) is None
    assert killed.first_death() is not None
    # what a constructor of ours raises is the error itself; of others, its last line
    with pytest.raises(ConfigError, match="key: wrong; got 3"):
        death_of(lambda a, pid: 0, ConfigError("wrong", where="key", got=3))[1].check()
    with pytest.raises(ActorDeathError, match="KeyError: 'gone'"):
        death_of(lambda a, pid: 0, KeyError("gone"))[1].check()
