"""A sample of `benchmarks/file_kills.py`: SIGKILL before a file operation of verl's loop, and resume.

In processes of its own, since it replaces what trains. All operations: `make test-kill`.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "file_kills.py"


@pytest.mark.slow
def test_a_run_killed_before_a_file_operation_leaves_the_same_files():
    seed = random.randrange(10**6)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--num", "4", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (seed, done.stdout, done.stderr[-2000:])
    assert "4 of 4 kills before a file operation" in done.stdout
