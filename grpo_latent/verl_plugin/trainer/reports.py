"""Step reports from the trainer, in some Ray worker, to the driver, which owns the console."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo_latent.errors import GrpoLatentError
from grpo_latent.verl_plugin.boot import remote_errors
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch
from grpo_latent.verl_plugin.trainer.alarms import Line
from grpo_latent.verl_plugin.trainer.console_line import Report, short_line

QUEUE_NAME = "grpo_latent_progress"
TAKE_TIMEOUT_S = 10.0


def start_report_queue():
    """A Ray actor on the driver's node that keeps reports until they are read."""

    # defined in here, and fed with tuples, so that its process imports neither this package nor
    # verl
    class ReportQueue:
        def __init__(self):
            self.reports = []

        def put(self, report: tuple) -> None:
            self.reports.append(report)

        def take(self) -> list[tuple]:
            reports, self.reports = self.reports, []
            return reports

    return (
        ray.remote(ReportQueue)
        .options(name=QUEUE_NAME, num_cpus=0, scheduling_strategy=on_this_node())
        .remote()
    )


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where this process runs, if there is room."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


class Reporter:
    """The trainer's end. Without a queue (stock `verl.trainer.main_ppo`) reports go nowhere."""

    def __init__(self):
        self._queue: ray.actor.ActorHandle | None
        try:
            self._queue = ray.get_actor(QUEUE_NAME)
        except ValueError:
            self._queue = None

    def report(self, kind: str, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        if self._queue is not None:
            self._queue.put.remote((kind, step, total_steps, metrics))

    def say(self, lines: list[Line], step: int, total_steps: int) -> None:
        """Lines that must be seen."""
        for line in lines:
            kind = "alarm" if line.is_alarm else "event"
            # for the log, and for runs without a queue
            print(short_line(Report(kind, step, total_steps, text=str(line))), flush=True)
            if self._queue is not None:
                self._queue.put.remote((kind, step, total_steps, {}, str(line)))


def follow(
    queue,
    run_ref,
    on_report,
    watch: ActorWatch,
    log: object,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Hands reports to `on_report` until the job behind `run_ref` has ended, well or not.

    Args:
        log: where a traceback can be read, for the message.
        on_wait: as in `drain`.

    Raises:
        ActorDeathError, NodeLostError: an actor has died, or a node is lost, whatever the job
            made of it.
        GrpoLatentError, RuntimeError: as `remote_errors.get`.
    """
    try:
        drain(queue, run_ref, on_report, watch, on_wait=on_wait)
        remote_errors.get(run_ref, "training", log)
    except Exception as error:
        # at an error of ours verl has closed TransferQueue
        dead = watch.first_death(
            with_killed=not isinstance(error, GrpoLatentError), has_failed=True
        )
        if dead is None:
            raise
        raise dead.error(watch.position) from None  # what the run ended with, follows from it


def drain(
    queue,
    run_ref,
    on_report,
    watch: ActorWatch,
    interval_s: float = 0.5,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Hands reports to `on_report` until the job behind `run_ref` has ended, then the last ones.

    Args:
        run_ref: object reference that is ready when the job has ended, well or not.
        watch: asked all the while.
        on_wait: called with the seconds so far until the first report comes.

    Raises:
        ActorDeathError, NodeLostError: an actor has died, or a node is lost, and the job goes on
            as if it waited for it; or the board has died, which nobody else notices.
    """
    done, has_reported, began = False, False, time.monotonic()
    taking = None  # what a slow board has not answered yet: asked once, so that nothing is lost
    while not done:
        started = time.monotonic()
        done = bool(ray.wait([run_ref], timeout=interval_s)[0])
        taking = taking or queue.take.remote()
        taken = _taken(taking, watch)
        if taken is not None:
            taking = None
        for values in taken or ():
            has_reported = True
            report = Report(*values)
            on_report(report)
            watch.position = f"last step {report.step}/{report.total_steps}"
        if not done:
            watch.check()
        if not has_reported and not done:
            on_wait(time.monotonic() - began)
        time.sleep(max(0.0, 0.05 - (time.monotonic() - started)))


def _taken(taking, watch: ActorWatch) -> list[tuple] | None:
    """The reports of one call of the board's `take`; None where it has not answered in time."""
    try:
        return ray.get(taking, timeout=TAKE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError:
        # a short run would end well meanwhile, with its last reports lost
        dead = watch.first_death(with_killed=False)
        if dead is not None:
            raise dead.error(watch.position) from None
        return []  # the table is a moment behind
