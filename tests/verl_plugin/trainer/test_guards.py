"""Rollbacks, the best checkpoint and their state on folders without weights.

Does not cover that weights, optimizer and rates are really loaded: `test_rollback_training.py`.
"""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from test_alarms import FINE

from grpo_latent.common.best_checkpoint import BEST_FILE, STATE_FILE, Best, read_best, write_best
from grpo_latent.common.manifest import write_manifest
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.eval.usage import Usage
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer.guards import Guards, check_guards

START = "/models/sft"


def make_guards(root, save_freq=1, keep_best=True, val_only=False, **alarm):
    options = LatentOptions(alarm=alarm, keep_best=keep_best)
    trainer = SimpleNamespace(default_local_dir=str(root), save_freq=save_freq, val_only=val_only)
    return Guards(options, trainer)


def take_step(guards, step, reward=0.6, score=None, is_saved=True):
    """What the trainer does in a step that does not go back: save, validate, judge, keep, commit."""
    folder = guards.root / f"global_step_{step}"
    if is_saved:
        folder.mkdir(parents=True, exist_ok=True)
    guards.alarms.after_validation(score, 0.01)
    lines = guards.after_step(FINE | {"critic/score/mean": reward})
    if not guards.wants_rollback and guards.is_best(score):
        folder.mkdir(parents=True, exist_ok=True)
        guards.keep(Best.of_step(step, score, "val-core/x/acc/mean@1"), is_extra=not is_saved)
    if folder.is_dir():
        commit(guards, step)
    return lines


def commit(guards, step):
    guards.save(guards.root / f"global_step_{step}")
    checkpoint.write_tracker(guards.root, step)
    guards.name_best()
    guards.remove_superseded(step)


def go_back(guards, step):
    """What the trainer does at the end of a step whose alarm sounds."""
    folder = guards.last_good
    factor = guards.go_back(folder)
    (guards.root / f"global_step_{step}").mkdir(exist_ok=True)
    commit(guards, step)
    return folder.name, factor


def folders(root):
    return sorted(int(path.name.removeprefix("global_step_")) for path in root.glob("global_*"))


# ---- the way back -------------------------------------------------------------------------------


def test_the_last_good_checkpoint_is_the_newest_at_which_nothing_was_bad(tmp_path):
    guards = make_guards(tmp_path, rollback=True, patience=2)
    assert guards.last_good is None
    rewards = (0.6, 0.6, 0.6, 0.62, 0.54, 0.1)
    named = []
    for step, reward in enumerate(rewards, 1):
        take_step(guards, step, reward)
        named.append(guards.last_good.name)
    assert named == [f"global_step_{step}" for step in (1, 2, 3, 4, 4, 4)]
    assert not guards.wants_rollback, "bad once, of two"
    take_step(guards, 7, 0.1)
    assert guards.wants_rollback


def test_a_checkpoint_that_is_gone_is_passed_over(tmp_path):
    guards = make_guards(tmp_path, rollback=True)
    for step in (1, 2, 3):
        take_step(guards, step)
    (tmp_path / "global_step_3" / STATE_FILE).unlink()
    (tmp_path / "global_step_3").rmdir()
    assert guards.last_good.name == "global_step_2"


def test_each_rollback_makes_the_rate_smaller_and_counts_go_on(tmp_path):
    """The factor is of the configured rate; what is loaded may have a part of it already."""
    guards = make_guards(tmp_path, rollback=True, patience=1, max_rollbacks=2)
    for step in (1, 2, 3):
        take_step(guards, step)
    guards.alarms.silent.memory["steps"] = 5
    take_step(guards, 4, 0.0)
    assert guards.wants_rollback and go_back(guards, 4) == ("global_step_3", 0.5)
    assert not guards.wants_rollback and not guards.should_stop, "the state of step 3"
    assert guards.alarms.silent.memory["steps"] == 5, "of the run, not of the checkpoint"

    take_step(guards, 5, 0.0)
    assert go_back(guards, 5) == ("global_step_4", 0.5), "which has half the rate already"
    assert not guards.should_stop, "as many as allowed"
    for step in (4, 5):
        (tmp_path / f"global_step_{step}" / STATE_FILE).unlink()
        (tmp_path / f"global_step_{step}").rmdir()
    take_step(guards, 6, 0.0)
    assert go_back(guards, 6) == ("global_step_3", 0.125), "which has the whole one"
    assert (guards.rollbacks, guards.lr_factor, guards.good_steps) == (3, 0.125, [1, 2, 3, 6])
    assert guards.should_stop, "one more than max_rollbacks, and it ends on good weights"
    line = str(guards.rollback_line(3, ["reward"]))
    assert "back to step 3 after reward; learning rate x 0.125 of" in line
    assert "rollback 3 of 2" in line and "training ends here" in line


def test_what_is_logged_of_rollbacks(tmp_path):
    metrics = dict(FINE)
    make_guards(tmp_path).after_step(metrics)
    assert "latent/rollbacks" not in metrics
    make_guards(tmp_path, rollback=True).after_step(metrics)
    assert (metrics["latent/rollbacks"], metrics["latent/lr_factor"]) == (0.0, 1.0)


def test_nothing_to_go_back_to_ends_training(tmp_path):
    guards = make_guards(tmp_path, rollback=True, patience=1)
    for step in (1, 2, 3, 4):
        take_step(guards, step, 0.6 if step < 4 else 0.0, is_saved=False)
    assert guards.wants_rollback and guards.last_good is None and not guards.should_stop
    line = guards.give_up()
    assert guards.should_stop and "no good checkpoint" in str(line) and "What helps" in str(line)


@pytest.mark.parametrize("alarm", [{}, {"stop": True}, {"rollback": True}])
def test_who_asks_for_what_at_an_alarm(tmp_path, alarm):
    guards = make_guards(tmp_path, patience=1, **alarm)
    for step in (1, 2, 3, 4):
        take_step(guards, step, 0.6 if step < 4 else 0.0)
    assert guards.alarms.sounds("reward")
    assert guards.should_stop == ("stop" in alarm)
    assert guards.wants_rollback == ("rollback" in alarm)


def a_run(guards, steps, first=1):
    """Steps as (reward, score); goes back where it has to. Returns what happened."""
    seen = []
    for step, (reward, score) in enumerate(steps, first):
        if guards.wants_rollback:
            pytest.fail("not gone back")
        folder = guards.root / f"global_step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        guards.alarms.after_validation(score, 0.01)
        lines = [str(line) for line in guards.after_step(FINE | {"critic/score/mean": reward})]
        if guards.wants_rollback:
            lines += go_back(guards, step)
        elif guards.is_best(score):
            guards.keep(Best.of_step(step, score, "m"))
        commit(guards, step)
        seen.append((lines, guards.best, guards.lr_factor))
    return seen


STEPS = [(0.6, 0.60), (0.6, None), (0.62, 0.65), (0.1, None), (0.0, None), (0.6, 0.63), (0.7, 0.7)]


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_resumed_run_is_guarded_as_an_uninterrupted_one(tmp_path, cut):
    """After any step: the same lines, rollbacks and best; the same state at the end."""
    settings = {"rollback": True, "patience": 2, "start_steps": 2}
    whole, first = (make_guards(tmp_path / name, **settings) for name in ("whole", "parts"))
    expected = a_run(whole, STEPS)
    assert expected[4][0][-2:] == ["global_step_3", 0.5] and whole.best.score == 0.7
    a_run(first, STEPS[:cut])
    second = make_guards(tmp_path / "parts", **settings)
    write_best(second.root, None)  # the state decides
    assert second.load(second.root / f"global_step_{cut}") == []
    assert read_best(second.root) == first.best
    assert a_run(second, STEPS[cut:], cut + 1) == expected[cut:]
    ends = [
        json.loads((g.root / "global_step_7" / STATE_FILE).read_text()) for g in (whole, second)
    ]
    assert ends[0] == ends[1]


def test_a_branch_that_was_left_is_nothing_to_go_back_to(tmp_path):
    guards = make_guards(tmp_path, rollback=True)
    for step in range(1, 7):
        take_step(guards, step)
    resumed = make_guards(tmp_path, rollback=True)
    resumed.load(tmp_path / "global_step_2")
    assert resumed.last_good.name == "global_step_2" and (tmp_path / "global_step_6").is_dir()


def test_a_run_may_go_back_to_what_it_resumed_from_elsewhere(tmp_path):
    first = make_guards(tmp_path / "first", rollback=True)
    for step in (1, 2, 3):
        take_step(first, step)
    second = make_guards(tmp_path / "second", rollback=True)
    second.load(first.root / "global_step_3")
    assert second.last_good == first.root / "global_step_3"
    assert second.best is None


def test_a_run_that_resumes_at_its_start_begins_anew(tmp_path):
    """Step 0 is validated and measured again, which must not count twice."""
    guards = make_guards(tmp_path, rollback=True)
    unused = Usage({}, "not used", "not used")

    def begin(guards):
        guards.alarms.after_validation(0.6, 0.01)
        guards.alarms.after_usage(unused)

    begin(guards)
    (tmp_path / "global_step_0").mkdir()
    guards.save(tmp_path / "global_step_0")
    resumed = make_guards(tmp_path, rollback=True)
    assert resumed.load(tmp_path / "global_step_0") == []
    assert resumed.last_good.name == "global_step_0"
    begin(resumed)
    assert resumed.alarms.state() == guards.alarms.state()


def test_what_a_resumed_run_says(tmp_path):
    guards = make_guards(tmp_path, stop=True, patience=1)
    for step in (1, 2, 3, 4):
        take_step(guards, step, 0.6 if step < 4 else 0.0)
    (note,) = make_guards(tmp_path, stop=True, patience=1).load(tmp_path / "global_step_4")
    assert "still sounds" in note and "latent.alarm.stop=false" in note
    (tmp_path / "global_step_9").mkdir()
    older = make_guards(tmp_path, rollback=True)
    (note,) = older.load(tmp_path / "global_step_9")
    assert "the alarms count from zero" in note and older.last_good.name == "global_step_9"


def test_an_exhausted_run_says_what_lets_it_go_on(tmp_path):
    guards = make_guards(tmp_path, rollback=True, patience=1, max_rollbacks=1)
    for step in (1, 2, 3):
        take_step(guards, step)
    for step in (4, 5):
        take_step(guards, step, 0.0)
        go_back(guards, step)
    resumed = make_guards(tmp_path, rollback=True, patience=1, max_rollbacks=1)
    (note,) = resumed.load(tmp_path / "global_step_5")
    assert "latent.alarm.max_rollbacks=<more>" in note and resumed.should_stop
    assert not make_guards(tmp_path, rollback=True).load(tmp_path / "global_step_5")


def state_with(**changes):
    state = {
        "alarms": make_guards(".").alarms.state(),
        "rollbacks": 0,
        "lr_factor": 1.0,
        "best": None,
        "good_steps": [1],
        "extras": [],
    }
    return state | changes


@pytest.mark.parametrize(
    "state",
    [
        "{",
        [],
        {},
        state_with(alarms={}),
        state_with(alarms=None),
        state_with(rollbacks=-1),
        state_with(lr_factor=0.0),
        state_with(lr_factor=1),
        state_with(good_steps=["1"]),
        state_with(best={"step": 1}),
        state_with(best={"step": 1, "score": "0.5", "metric": "m", "folder": "global_step_1"}),
        state_with(more=1),
    ],
)
def test_a_state_that_cannot_be_read_is_named(tmp_path, state):
    folder = tmp_path / "global_step_1"
    folder.mkdir()
    text = state if isinstance(state, str) else json.dumps(state)
    (folder / STATE_FILE).write_text(text)
    with pytest.raises(
        CheckpointError, match=f"{STATE_FILE}: not the guards' state; got .*Delete"
    ):
        make_guards(tmp_path).load(folder)


@pytest.mark.parametrize("of_before", [{}, {"is_step_counted": True}], ids=["now", "before"])
def test_the_state_of_that_test_is_readable_without_damage(tmp_path, of_before):
    folder = tmp_path / "global_step_1"
    folder.mkdir()
    (folder / STATE_FILE).write_text(json.dumps(state_with(**of_before)))
    assert make_guards(tmp_path).load(folder) == []


# ---- the best checkpoint ------------------------------------------------------------------------


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


# ---- settings -----------------------------------------------------------------------------------


def config_with(save_freq=10, **checkpoint_contents):
    actor = {
        "checkpoint": {"save_contents": ["model", "optimizer", "extra"], **checkpoint_contents}
    }
    return OmegaConf.create(
        {"trainer": {"save_freq": save_freq}, "actor_rollout_ref": {"actor": actor}}
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_with(save_freq=-1), "trainer.save_freq: there are no checkpoints to go back to"),
        (
            config_with(save_contents=["model", "hf_model"]),
            "save_contents: .*Add optimizer, extra",
        ),
        (config_with(load_contents=["model", "extra"]), "load_contents: .*Add optimizer"),
    ],
)
def test_a_rollback_needs_whole_checkpoints(config, message):
    check_guards(config, LatentOptions())
    with pytest.raises(ConfigError, match=message):
        check_guards(config, LatentOptions(alarm={"rollback": True}))


def test_a_rollback_that_can_be_made_is_accepted():
    check_guards(config_with(), LatentOptions(alarm={"rollback": True}))
    with pytest.raises(ConfigError, match="latent.alarm.z"):
        check_guards(config_with(), LatentOptions(alarm={"z": 0}))
