"""A cell of the grid, drawn among those that hold. `make test-deaths` runs all of them. Slow.

GRPO_LATENT_SEED repeats a run's choice.
"""

import sys
from pathlib import Path

import pytest
from drawn import REPEAT, drawing

sys.path.insert(0, str(Path(__file__).parent))

import grid  # noqa: E402
import tiny_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ray]
# whoever has run more of the grid adds them here and to docs/faults.md
HELD = [("reward worker", "reward")]


def test_the_cells_are_of_the_grid():
    assert set(HELD) <= set(grid.CELLS)


@pytest.mark.long
def test_a_death_ends_the_run_in_time_and_typed(tmp_path):
    actor, phase = drawing().choice(HELD)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    cell = grid.run_cell(actor, phase, tiny_run.write_inputs(inputs), tmp_path / "cell")
    assert cell.problems() == [], f"{REPEAT}: {actor} in {phase}: {cell.message}"
