"""The checkpoint of the best held-out score: kept, superseded, pinned, read."""

import pytest
from guard_helpers import folders, make_guards, take_step

from grpo_latent.common.best_checkpoint import BEST_FILE, STATE_FILE, Best, read_best, write_best
from grpo_latent.common.manifest import write_manifest
from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.trainer import checkpoint

START = "/models/sft"


def test_the_best_score_is_kept_the_first_of_equal_ones(tmp_path):
    guards = make_guards(tmp_path)
    assert not guards.is_best(float("nan")) and not guards.is_best(None)
    guards.keep(Best(0, 0.5, "m", START))
    guards.name_best()
    assert read_best(tmp_path).model_folder(tmp_path).as_posix() == START
    best = []
    for step, score in enumerate((0.4, None, 0.7, 0.7, float("nan"), 0.6, 0.9), 1):
        take_step(guards, step, score=score)
        best.append(read_best(tmp_path).step)
    assert best == [0, 0, 3, 3, 3, 3, 7]
    assert read_best(tmp_path) == Best(7, 0.9, "val-core/x/acc/mean@1", "global_step_7")
    expected = tmp_path / "global_step_7" / "actor" / "huggingface"
    assert read_best(tmp_path).model_folder(tmp_path) == expected


@pytest.mark.parametrize("settings", [{"keep_best": False}, {"save_freq": -1}, {"val_only": True}])
def test_no_best_where_it_is_not_asked_for(tmp_path, settings):
    guards = make_guards(tmp_path, **settings)
    assert not guards.is_best(0.9)
    write_best(tmp_path, Best(3, 0.5, "m", "global_step_3"))
    guards.begin()
    assert read_best(tmp_path).step == 3, "another run's is left alone"


def test_a_new_run_forgets_the_best_of_an_older_one(tmp_path):
    write_best(tmp_path, Best(3, 0.5, "m", "global_step_3"))
    make_guards(tmp_path).begin()
    assert read_best(tmp_path) is None


def test_a_checkpoint_for_its_score_only_goes_when_a_better_one_comes(tmp_path):
    guards = make_guards(tmp_path)
    for step, score in ((1, 0.5), (2, 0.6), (3, 0.55), (4, 0.7)):
        take_step(guards, step, score=score, is_saved=step == 3)
    assert folders(tmp_path) == [3, 4], "3 was saved by the run's own plan"
    assert guards.extras == [4]
    resumed = make_guards(tmp_path)
    resumed.load(tmp_path / "global_step_4")
    take_step(resumed, 5, score=0.8, is_saved=False)
    assert folders(tmp_path) == [3, 5], "a resumed run knows which it was"


def test_one_that_is_the_last_good_stays_until_there_is_another(tmp_path):
    guards = make_guards(tmp_path, rollback=True, start_steps=1)
    take_step(guards, 1, score=0.5, is_saved=False)
    take_step(guards, 2, reward=0.53, score=0.6, is_saved=False)  # doubtful, and yet the best
    assert folders(tmp_path) == [1, 2] and guards.last_good.name == "global_step_1"
    take_step(guards, 3, score=0.7, is_saved=False)
    assert folders(tmp_path) == [3]


def test_what_is_pinned_outlives_pruning(tmp_path):
    guards = make_guards(tmp_path, rollback=True, start_steps=1)
    for step, (reward, score) in enumerate([(0.6, 0.5), (0.6, 0.9), (0.6, None), (0.5, None)], 1):
        take_step(guards, step, reward, score)
    take_step(guards, 5, 0.5)
    assert guards.pinned == {2, 3}
    checkpoint.prune(tmp_path, 1, guards.pinned)
    assert folders(tmp_path) == [2, 3, 5]
    guards.settings = make_guards(tmp_path).settings
    assert guards.pinned == {2}, "nothing goes back"


def test_a_best_checkpoint_that_is_gone_is_sought_anew(tmp_path):
    guards = make_guards(tmp_path)
    take_step(guards, 1, score=0.9)
    take_step(guards, 2, score=0.5)
    (tmp_path / "global_step_1" / STATE_FILE).unlink()
    (tmp_path / "global_step_1").rmdir()
    resumed = make_guards(tmp_path)
    (note,) = resumed.load(tmp_path / "global_step_2")
    assert "global_step_1, is gone" in note and resumed.best is None
    assert not (tmp_path / BEST_FILE).exists() and resumed.is_best(0.6)


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "of another run"])
def test_the_newest_checkpoint_says_which_is_the_best(tmp_path, is_gone):
    """A kill may have come between its tracker and the file."""
    guards = make_guards(tmp_path)
    take_step(guards, 1, score=0.9)
    take_step(guards, 2, score=0.5)
    if is_gone:
        (tmp_path / BEST_FILE).unlink()
    else:
        write_best(tmp_path, Best(2, 0.95, "m", "global_step_2"))
    assert read_best(tmp_path) == guards.best and guards.best.step == 1
    write_manifest(tmp_path / "global_step_2")
    state = tmp_path / "global_step_2" / STATE_FILE
    state.write_text(state.read_text().replace("0.9", "0.8"))
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}: a part of the checkpoint"):
        read_best(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"step": 3}', '{"step": -1, "score": 0.5, "metric": "m", "folder": "f"}']
)
def test_a_best_file_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / BEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="best_checkpoint.json: no best checkpoint"):
        read_best(tmp_path)
