"""One cell of the grid, another in each run of the suite. `make test-deaths` runs them all. Slow.

GRPO_LATENT_SEED repeats a run's choice.
"""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import grid  # noqa: E402
import tiny_run  # noqa: E402

pytestmark = pytest.mark.slow


def test_a_death_ends_the_run_in_time_and_typed(tmp_path):
    seed = int(os.environ.get("GRPO_LATENT_SEED", random.randrange(2**32)))
    actor, phase = random.Random(seed).choice(grid.CELLS)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    cell = grid.run_cell(actor, phase, tiny_run.write_inputs(inputs), tmp_path / "cell")
    assert cell.problems() == [], f"GRPO_LATENT_SEED={seed}: {actor} in {phase}: {cell.message}"
