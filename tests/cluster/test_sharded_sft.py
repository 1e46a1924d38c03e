"""SFT in FSDP2 shards of four processes, and what they wrote taken over by two."""

import sys
from pathlib import Path

import pytest

SFT_TESTS = Path(__file__).resolve().parents[1] / "sft"
sys.path.append(str(SFT_TESTS))

import sharded_cases as cases  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what the two processes said."""
    folder = tmp_path_factory.mktemp("sharded")
    cases.write_inputs(folder)
    stopped = cases.run_of("ilvr_stage1", "4to2", 4, **cases.UNTIL_STOPPED)
    cases.launch(folder, 4, [*cases.equal_runs(4), stopped])
    said = cases.launch(folder, 2, [cases.run_of("ilvr_stage1", "4to2", 2, **cases.RESUMED)])
    whole = cases.run_of("ilvr_stage1", "whole", 1, **cases.RESUMED)
    cases.launch(folder, 1, [*cases.equal_runs(1), whole])
    return folder, said


@pytest.mark.parametrize("case", cases.CASES)
def test_four_shards_train_as_one_process_does(runs, case):
    folder, _ = runs
    cases.assert_equal_training(folder / f"{case}-1", folder / f"{case}-4")
    cases.assert_a_tensor_at_a_time(folder / f"{case}-4", ranks=[1, 2, 3])


def test_two_processes_go_on_from_what_four_wrote(runs):
    folder, said = runs
    cases.assert_goes_on(folder / "whole", folder / "4to2")
    assert "resumed by 2 processes what 4 wrote" in said
