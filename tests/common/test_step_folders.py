"""Only `global_step_<n>` is a step's folder, wherever it lies and whatever lies beside it."""

import pytest

from grpo_latent.common.step_folders import TRACKER_FILE, read_tracker, step_folders, step_of
from grpo_latent.errors import CheckpointError


def test_names_that_are_nearly_steps_are_left_out(tmp_path):
    root = tmp_path / "global_step_5" / "checkpoints"
    names = ("20", "5", "10", "20_best", "best", "", "007", "7.5", "-1", "²", "0")
    for name in names:
        (root / f"global_step_{name}").mkdir(parents=True)
    (root / "global_step_30").write_text("a file")
    (root / "my_global_step_40").mkdir()
    found = step_folders(root)
    assert list(found) == [0, 5, 10, 20], "by number"
    assert found[20] == root / "global_step_20"
    assert step_folders(tmp_path / "nothing") == {}


def test_the_folders_own_name_counts_and_no_parents():
    assert step_of("runs/global_step_5/global_step_20/") == 20
    assert step_of("runs/global_step_5/actor") is None
    assert step_of("checkpoint-12", "checkpoint-") == 12


@pytest.mark.parametrize("text", ["²", "6_best", "-6", "06", "\ufffd"])
def test_a_tracker_that_holds_no_step_is_named(tmp_path, text):
    (tmp_path / f"global_step_{text}").mkdir()
    (tmp_path / TRACKER_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="not a step"):
        read_tracker(tmp_path)
