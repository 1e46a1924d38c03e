"""The tracker never names an incomplete checkpoint, whatever was killed when."""

import pytest

from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.trainer import checkpoint


def make(root, *steps, tracker=None):
    for step in steps:
        (root / f"global_step_{step}" / "actor").mkdir(parents=True)
    if tracker is not None:
        checkpoint.write_tracker(root, tracker)


def test_a_half_written_save_is_ignored_and_then_replaced(tmp_path):
    make(tmp_path, 3, 6, tracker=3)  # killed while 6 was written
    (tmp_path / "global_step_6" / "actor" / "stale").touch()
    assert checkpoint.read_tracker(tmp_path) == 3
    checkpoint.make_room(tmp_path, 6, resumed_from=3)
    assert not (tmp_path / "global_step_6").exists() and checkpoint.read_tracker(tmp_path) == 3


def test_saving_over_the_newest_checkpoint_first_points_back(tmp_path):
    make(tmp_path, 3, 6, tracker=6)  # resumed from 3 by resume_path, trains 4..6 anew
    checkpoint.make_room(tmp_path, 6, resumed_from=3)
    assert checkpoint.read_tracker(tmp_path) == 3 and not (tmp_path / "global_step_6").exists()


def test_saving_over_the_only_checkpoint_leaves_no_tracker(tmp_path):
    make(tmp_path, 3, tracker=3)
    checkpoint.make_room(tmp_path, 3, resumed_from=0)
    assert checkpoint.read_tracker(tmp_path) is None


def test_tracker_is_replaced_whole(tmp_path, monkeypatch):
    """A kill before the rename leaves the old content."""
    make(tmp_path, 3, 6, tracker=3)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_tracker(tmp_path, 6)
    assert checkpoint.read_tracker(tmp_path) == 3


@pytest.mark.parametrize("content, match", [("", "not a step"), ("six", "not a step"), ("9", "checkpoint is gone")])
def test_a_broken_tracker_is_named(tmp_path, content, match):
    make(tmp_path, 3)
    (tmp_path / checkpoint.TRACKER_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.read_tracker(tmp_path)


def test_pruning_keeps_the_newest_and_the_one_in_use(tmp_path):
    make(tmp_path, 2, 4, 6, 8, tracker=6)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == ["global_step_6", "global_step_8"]
    checkpoint.prune(tmp_path, None)
    checkpoint.prune(tmp_path, 1)
    assert (tmp_path / "global_step_6").is_dir()
