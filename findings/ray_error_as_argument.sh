#!/usr/bin/env bash
# Ray 2.60.0, seen on 2026-11-28.
#
# Guess: an exception object is an argument like any other. A process that handles a failed call tells another one what happened by
#        board.note.remote(error).
# Seen:  that holds for Python's own exceptions. One of Ray's (ActorDiedError, TaskCancelledError, RayTaskError) is taken for the
#        failed result of an earlier call: the method is never entered, and its call fails with that error. Within a list it arrives.
#
# Means: whoever waits for the note waits for ever, since the handler's own call fails where nobody looks. It made a run hang after its
#        reward worker had died. Failures travel here as typed errors or text (verl_plugin/boot/remote_errors.py,
#        verl_plugin/rollout; tests/verl_plugin/boot/test_remote_errors.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError

# a Ray of its own, whatever else runs here
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)


@ray.remote
class Board:
    def __init__(self):
        self.notes = []

    def note(self, what):
        self.notes.append(type(what).__name__)

    def read(self):
        return self.notes


board = Board.remote()
errors = [ValueError("no"), ActorDiedError(), TaskCancelledError(), RayTaskError("f", "traceback", KeyError("k"))]
arrived = []
for error in errors:
    for argument in (error, [error]):
        try:
            ray.get(board.note.remote(argument), timeout=60)
            outcome = "arrives"
        except Exception as raised:
            outcome = f"the call fails: {type(raised).__name__}"
        arrived.append(outcome == "arrives")
        print(f"{type(error).__name__:20} {'in a list' if argument is not error else 'as it is':10} {outcome}")
notes = ray.get(board.read.remote())
print("the board has seen", notes)
ray.shutdown()
expected = [is_listed or not isinstance(error, RayError) for error in errors for is_listed in (False, True)]
sys.exit(0 if arrived == expected and len(notes) == sum(expected) else "changed: see above")
PYTHON
