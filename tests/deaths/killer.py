"""Kills one actor of a run in one of its phases, from inside the run.

Every process of the run imports it (VERL_USE_EXTERNAL_MODULES), in the middle of importing verl and
the plug-in: so it imports neither, and wraps their classes once they are there. Whichever process
comes first to the phase looks the actor up in Ray's table, writes down when, and sends SIGKILL;
then the phase goes on.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

PLUGIN = "grpo_latent.verl_plugin"
AGENT_LOOP = f"{PLUGIN}.rollout.agent_loop:LatentAgentLoopWorker"
SERVER = f"{PLUGIN}.rollout.server:LatentRolloutServer"
TRAINER = f"{PLUGIN}.trainer.trainer:LatentPPOTrainer"
ENGINE = f"{PLUGIN}.worker.engine:LatentFSDPEngine"
CELL, MARK = "GRPO_LATENT_DEATH_CELL", "GRPO_LATENT_DEATH_MARK"


def pid_of(role: str, timeout_s: float) -> int:
    """The process of the actor, once it is alive."""
    from ray._private import state as ray_state

    from grpo_latent.verl_plugin.boot.actor_watch import ROLES, class_of

    deadline = time.monotonic() + timeout_s
    while True:
        for row in ray_state.actors(actor_state_name="ALIVE").values():
            if ROLES.get(class_of(row)) == role:
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


def once_loaded(name: str) -> type:
    """The class `module:name`, when this process has imported it."""
    module, _, attribute = name.partition(":")
    while (owner := getattr(sys.modules.get(module), attribute, None)) is None:
        time.sleep(0.01)
    return owner


def at(name: str, method: str, role: str, applies=lambda *args, **kwargs: True) -> None:
    """Kills the actor when the method is called with arguments that `applies` accepts."""
    owner = once_loaded(name)
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if applies(*args, **kwargs):
            kill(role)
        return original(*args, **kwargs)

    setattr(owner, method, wrapper)


def at_start(role: str) -> None:
    """Kills the actor as soon as it is alive while the trainer builds the run."""
    trainer = once_loaded(TRAINER)
    original = trainer.__init__

    def wrapper(self, *args, **kwargs):
        threading.Thread(target=kill, args=(role, 120.0), daemon=True).start()
        original(self, *args, **kwargs)

    trainer.__init__ = wrapper


def arm(role: str, phase: str) -> None:
    def validates(worker, prompt, sampling_params, trajectory, ticket):
        return bool(trajectory["validate"])

    def updates(engine, data, loss_function, forward_only=False):
        return not forward_only

    def is_of_a_step(server, refs, version):
        return version > 0

    if phase == "start":
        at_start(role)
    elif phase == "rollout":  # the engine runs a wave
        at(SERVER, "_generate", role)
    elif phase == "reward":
        at(AGENT_LOOP, "_score", role)
    elif phase == "update":
        at(ENGINE, "forward_backward_batch", role, updates)
    elif phase == "weights":  # which the training worker is sending
        at(SERVER, "_load_weights", role, is_of_a_step)
    elif phase == "validation":
        at(AGENT_LOOP, "_run_group", role, validates)
    elif phase == "save":
        at(ENGINE, "save_checkpoint", role)
    else:
        raise ValueError(phase)


if os.environ.get(CELL):
    threading.Thread(target=arm, args=os.environ[CELL].split("|"), daemon=True).start()
