"""SIGKILL of the trainer in a real run, at one point of `benchmarks/kills.py`, another each time. Slow.

All points: `make test-kill`.
"""

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kill_points  # noqa: E402
import kills  # noqa: E402


def test_every_point_is_one_that_can_be_reached():
    names = {f"{name}_{side}" for name in kill_points.CALLS for side in ("before", "after")}
    points = [*kills.START, *kills.STEP, *kills.END]
    assert len(points) >= 40 and set(points) <= names | set(kill_points.FILES)
    for owner, name in kill_points.CALLS.values():
        assert callable(getattr(owner, name)), name


def test_a_plan_lets_each_continuation_commit():
    planned, num_steps = kills.plan([*kills.START, *kills.STEP, *kills.END])
    steps = [kill.step for kill in planned if kill.step is not None]
    assert steps == list(range(2, 2 * len(kills.STEP) + 1, 2)) and num_steps == steps[-1] + 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.long
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    seed = random.randrange(10**6)
    found = kills.grid(tmp_path / "kills", kills.choose(1, seed))
    for kill in found:
        assert kill.is_verified and not kill.differences, (seed, kill)
