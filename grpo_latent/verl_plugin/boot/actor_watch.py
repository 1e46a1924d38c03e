"""Which actors of a run have died, from Ray's own table of them.

    Ray's actor table ──one call each POLL_S──▶ DeadActor ──▶ ActorDeathError
    nodes             ──one knock each────────▶ LostNode  ──▶ NodeLostError   (`node_watch`)

A call on an actor that has died fails at once, but much of a run does not wait on such a call:
TransferQueue's clients wait on sockets, ranks on each other, a prompt on the rest of its wave. So
whoever waits for a run asks the table meanwhile: the driver all the time, the trainer while it
waits for rollouts (for runs under verl's own driver).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray.core.generated import common_pb2

from grpo_latent.errors import ActorDeathError, GrpoLatentError
from grpo_latent.verl_plugin.boot.node_watch import LostNode, NodeWatch
from grpo_latent.verl_plugin.boot.remote_errors import unwrapped

POLL_S = 2.0
GRACE_S = 5.0  # for a run to end by itself at an actor's death, so that its log says how it saw it
KILLED_GRACE_S = 20.0  # verl kills TransferQueue's actors when a run is over, and closes then
# processes of a Ray of our own without which it does nothing
RAY_PROCESSES = ("gcs_server", "raylet")
ROLES = {
    "TaskRunnerV1": "trainer",
    "WorkerDict": "training worker",  # verl's class around those that share a process
    "LatentRolloutServer": "rollout server",
    "LatentVllmServer": "rollout server",
    "LatentAgentLoopWorker": "agent loop worker",
    "RewardLoopWorker": "reward worker",
    "TransferQueueController": "TransferQueue controller",
    "SimpleStorageUnit": "TransferQueue storage",
    "ReportQueue": "progress board",
}
_REASON: Any = common_pb2.ActorDiedErrorContext  # type: ignore[attr-defined]  # generated
_NO_DEATHS = (
    _REASON.OUT_OF_SCOPE,
    _REASON.REF_DELETED,
    _REASON.OWNER_DIED,  # which follows from the death of another
)


@dataclass(frozen=True)
class DeadActor:
    """An actor that has died before its time.

    Attributes:
        role: what it is in a run, in words.
        name: its class.
        node: the address of its node.
        detail: what Ray says of its end.
        log: of its process; a pattern where it lies on another node.
        cause: what its constructor raised, where that is an error of this package.
    """

    role: str
    name: str
    pid: int
    node: str
    detail: str
    log: str
    cause: GrpoLatentError | None = None

    def error(self, position: str) -> GrpoLatentError:
        """The error to raise; `position` says how far the run has come, in words."""
        return self.cause or ActorDeathError(
            "an actor of the run has died",
            where=f"{self.role}, pid {self.pid}, node {self.node}, {position}",
            got=f"{self.name}: {self.detail}",
            expected="every actor alive until the run ends",
            fix=f"Its log is {self.log}. The same command again goes on from the last checkpoint.",
        )


class ActorWatch:
    """The deaths of a job's actors, and the losses of nodes, since the watch began.

    Args:
        grace_s: how long `check` lets a run go on after a death.
        killed_grace_s: the same, where `ray.kill` ended the actor.

    Attributes:
        position: how far the run has come, in words, for the message; whoever knows sets it.
    """

    def __init__(self, grace_s: float = GRACE_S, killed_grace_s: float = KILLED_GRACE_S):
        self.position = "before the first step"
        self._grace_s, self._killed_grace_s = grace_s, killed_grace_s
        self._job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
        self._old = {row["ActorID"] for row in self._rows()}
        self._nodes = NodeWatch()
        self._next_poll = 0.0
        self._noticed: float | None = None

    def _rows(self) -> list[dict[str, Any]]:
        """Of Ray's table: actors that are dead."""
        return list(ray_state.actors(job_id=self._job, actor_state_name="DEAD").values())

    def first_death(
        self, with_killed: bool = True, has_failed: bool = False
    ) -> DeadActor | LostNode | None:
        """The actor, node or process of our own Ray that died first, if one did.

        Args:
            with_killed: count actors that `ray.kill` ended.
            has_failed: as of `NodeWatch.first_lost`.
        """
        fallen = _fallen_ray()
        if fallen is not None:  # whoever then asks for the table waits for a minute, and is ended
            return fallen
        lost = self._nodes.first_lost(has_failed)
        if lost is not None:  # its actors' deaths follow from it, and of other nodes' that waited
            return LostNode(*lost, held=self._held_by(lost[0]))
        rows = [row for row in self._rows() if row["ActorID"] not in self._old]
        died = [row for row in rows if _is_death(row["DeathCause"], with_killed)]
        first = min(died, key=lambda row: row["EndTime"], default=None)
        return None if first is None else _of_row(first)

    def _held_by(self, address: str) -> tuple[str, ...]:
        """Roles of the actors that were last on a node."""
        rows = ray_state.actors(job_id=self._job).values()
        names = {class_of(row) for row in rows if row["Address"]["IPAddress"] == address}
        return tuple(sorted(ROLES.get(name, name) for name in names))

    def check(self) -> None:
        """Asks table and nodes if it is time to.

        Raises:
            ActorDeathError, NodeLostError: an actor has died, or a node is lost, and the run has
                had its time to end by itself.
        """
        now = time.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + POLL_S
        fallen = _fallen_ray()
        if fallen is not None:  # no grace: a short run would end meanwhile as if all were well
            raise fallen.error(self.position)
        dead = self.first_death()
        if dead is None:
            return
        if self._noticed is None:
            self._noticed = now
        crashed = self.first_death(with_killed=False) is not None
        if now - self._noticed >= (self._grace_s if crashed else self._killed_grace_s):
            raise dead.error(self.position)


def class_of(row: dict[str, Any]) -> str:
    """An actor's class, without where it was defined: verl makes some within a function."""
    return row["ActorClassName"].rpartition(".")[2]


def _is_death(cause: Any, with_killed: bool) -> bool:
    """Whether the actor neither left by itself nor became superfluous."""
    if cause.WhichOneof("context") != "actor_died_error_context":
        return True  # it could not start, or the node had no memory left
    died = cause.actor_died_error_context
    if died.reason == _REASON.RAY_KILL:
        return with_killed
    # `exit_actor` and `sys.exit(0)` have the reason of a crash
    return died.reason not in _NO_DEATHS and "INTENDED_USER_EXIT" not in died.error_message


def _of_row(row: dict[str, Any]) -> DeadActor:
    name, cause = class_of(row), row["DeathCause"]
    return DeadActor(
        role=ROLES.get(name, f"actor {row['Name'] or name}"),
        name=name,
        pid=row["Pid"],
        node=row["Address"]["IPAddress"] or "none yet",
        detail=_detail(cause),
        log=_log_of(row["Pid"]),
        cause=_raised_at_start(cause),
    )


def _detail(cause: Any) -> str:
    """The part of Ray's text that is about this death."""
    context = cause.WhichOneof("context")
    if context is None:
        return "Ray does not say why"
    if context == "creation_task_failure_context":
        lines = cause.creation_task_failure_context.formatted_exception_string.splitlines()
        return next((line for line in reversed(lines) if line.strip()), "its start failed")
    text = getattr(getattr(cause, context), "error_message", "") or context
    detail = text.rpartition("Worker exit detail: ")[2]
    return re.split(r" Some common causes| There are some potential", detail)[0].strip()


def _raised_at_start(cause: Any) -> GrpoLatentError | None:
    if cause.WhichOneof("context") != "creation_task_failure_context":
        return None
    error = ray.exceptions.RayError.from_ray_exception(cause.creation_task_failure_context)
    # ActorDiedError around RayTaskError around what was raised
    task_error = error.args[0] if error.args else None
    raised = None if task_error is None else unwrapped(task_error)
    return raised if isinstance(raised, GrpoLatentError) else None


def _log_of(pid: int) -> str:
    node = ray_worker._global_node
    assert node is not None, "a watch is made where Ray is connected"
    folder = Path(node.get_logs_dir_path())
    pattern = f"worker-*-{pid}.err"
    return str(next(folder.glob(pattern), folder / pattern))


def _fallen_ray() -> DeadActor | None:
    """A process of a Ray that this process has started; None on a cluster, which is not ours."""
    node = ray_worker._global_node
    if node is None or not node.is_head():
        return None
    for kind, process in node.dead_processes():
        if kind in RAY_PROCESSES:
            log = Path(node.get_logs_dir_path()) / f"{kind}.out"
            detail = f"ended with {process.returncode}"
            return DeadActor(
                f"Ray's {kind}", kind, process.pid, node.node_ip_address, detail, str(log)
            )
    return None
