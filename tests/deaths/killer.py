"""Kills one actor of a run in one of its phases, from inside the run.

Every process of the run imports it (VERL_USE_EXTERNAL_MODULES). Whichever comes first to the phase
looks the actor up in Ray's table, writes down when, and sends SIGKILL; then the phase goes on.
"""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path

from ray._private import state as ray_state

from grpo_latent.verl_plugin.boot.actor_watch import ROLES
from grpo_latent.verl_plugin.rollout.agent_loop import LatentAgentLoopWorker
from grpo_latent.verl_plugin.rollout.server import LatentRolloutServer
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer
from grpo_latent.verl_plugin.worker.engine import LatentFSDPEngine

CELL, MARK = "GRPO_LATENT_DEATH_CELL", "GRPO_LATENT_DEATH_MARK"


def pid_of(role: str, timeout_s: float) -> int:
    """The process of the actor, once it is alive."""
    deadline = time.monotonic() + timeout_s
    while True:
        for row in ray_state.actors(actor_state_name="ALIVE").values():
            if ROLES.get(row["ActorClassName"]) == role:
                return row["Pid"]
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {role} is alive")
        time.sleep(0.01)


def ray_pid(kind: str) -> int:
    """A process of Ray's own, one parent up from its workers or beside it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if command[0].endswith(kind.encode()) and os.environ[MARK].encode() in environment:
            return int(folder.name)
    raise TimeoutError(f"no {kind} runs")


def kill(role: str, timeout_s: float = 5.0) -> None:
    """Kills the actor, the first time that this is called in the run."""
    try:
        mark = os.open(os.environ[MARK], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    kind = role.removeprefix("Ray's ")
    pid = pid_of(role, timeout_s) if kind == role else ray_pid(kind)
    os.write(mark, json.dumps({"pid": pid, "time": time.time()}).encode())
    os.close(mark)
    os.kill(pid, signal.SIGKILL)


def at(owner: type, method: str, role: str, applies=lambda *args, **kwargs: True) -> None:
    """Kills the actor when the method is called with arguments that `applies` accepts."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if applies(*args, **kwargs):
            kill(role)
        return original(*args, **kwargs)

    setattr(owner, method, wrapper)


def kill_at_start(role: str) -> None:
    """Kills the actor as soon as it is alive while the trainer builds the run."""
    original = LatentPPOTrainer.__init__

    def wrapper(self, *args, **kwargs):
        threading.Thread(target=kill, args=(role, 60.0), daemon=True).start()
        original(self, *args, **kwargs)

    LatentPPOTrainer.__init__ = wrapper


def arm(role: str, phase: str) -> None:
    def validates(worker, prompt, sampling_params, trajectory, ticket):
        return bool(trajectory["validate"])

    if phase == "start":
        kill_at_start(role)
    elif phase == "rollout":  # the engine runs a wave
        at(LatentRolloutServer, "_generate", role)
    elif phase == "reward":
        at(LatentAgentLoopWorker, "_score", role)
    elif phase == "update":
        is_update = lambda engine, data, loss, forward_only=False: not forward_only  # noqa: E731
        at(LatentFSDPEngine, "forward_backward_batch", role, is_update)
    elif phase == "weights":  # those of the first step, which the worker is sending
        at(LatentRolloutServer, "_load_weights", role, lambda server, refs, version: version > 0)
    elif phase == "validation":
        at(LatentAgentLoopWorker, "_run_group", role, validates)
    elif phase == "save":
        at(LatentFSDPEngine, "save_checkpoint", role)
    else:
        raise ValueError(phase)


if os.environ.get(CELL):
    arm(*os.environ[CELL].split("|"))
