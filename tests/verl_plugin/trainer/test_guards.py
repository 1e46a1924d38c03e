"""Rollbacks and their state on folders without weights.

Does not cover that weights, optimizer and rates are really loaded: `test_rollback_training.py`.
"""

import json

import pytest
from guard_helpers import commit, go_back, make_guards, take_step
from omegaconf import OmegaConf
from test_alarms import FINE

from grpo_latent.common.best_checkpoint import STATE_FILE, Best, read_best, write_best
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.eval.usage import Usage
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.guards import check_guards

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
    assert not guards.reasons_to_go_back(), "bad once, of two"
    take_step(guards, 7, 0.1)
    assert guards.reasons_to_go_back()


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
    assert guards.reasons_to_go_back() and go_back(guards, 4) == ("global_step_3", 0.5)
    assert not guards.reasons_to_go_back() and not guards.should_stop, "the state of step 3"
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
    assert guards.reasons_to_go_back() and guards.last_good is None and not guards.should_stop
    line = guards.give_up()
    assert guards.should_stop and "no good checkpoint" in str(line) and "What helps" in str(line)


@pytest.mark.parametrize("alarm", [{}, {"stop": True}, {"rollback": True}])
def test_who_asks_for_what_at_an_alarm(tmp_path, alarm):
    guards = make_guards(tmp_path, patience=1, **alarm)
    for step in (1, 2, 3, 4):
        take_step(guards, step, 0.6 if step < 4 else 0.0)
    assert guards.alarms.sounds("reward")
    assert guards.should_stop == ("stop" in alarm)
    assert guards.reasons_to_go_back() == (["reward"] if "rollback" in alarm else [])


def test_a_run_does_not_end_on_the_way_down(tmp_path):
    """No alarm sounds yet, but it would not go back to where it ends: it has been at a better place."""
    guards = make_guards(tmp_path, rollback=True)
    for step, score in ((1, 0.60), (2, 0.70), (3, 0.67)):
        take_step(guards, step, score=score)
    assert not guards.alarms.sounding(guards.settings.rollback_on)
    assert guards.reasons_to_go_back(is_last=False) == []
    assert guards.reasons_to_go_back(is_last=True) == ["held_out"]
    assert go_back(guards, 3) == ("global_step_2", 0.5)
    assert guards.reasons_to_go_back(is_last=True) == [], "a run that is resumed there ends there"


def test_a_run_without_a_good_checkpoint_ends_where_it_is(tmp_path):
    guards = make_guards(tmp_path, rollback=True, keep_best=False)
    for step, score in ((1, 0.70), (2, 0.67)):
        take_step(guards, step, score=score, is_saved=False)
    assert guards.alarms.doubts == ["held_out"]
    assert guards.reasons_to_go_back(is_last=True) == []
    assert make_guards(tmp_path / "other").reasons_to_go_back(is_last=True) == []


def a_run(guards, steps, first=1):
    """Steps as (reward, score); goes back where it has to. Returns what happened."""
    seen = []
    for step, (reward, score) in enumerate(steps, first):
        if guards.reasons_to_go_back():
            pytest.fail("not gone back")
        folder = guards.root / f"global_step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        guards.alarms.after_validation(score, 0.01)
        lines = [str(line) for line in guards.after_step(FINE | {"critic/score/mean": reward})]
        if guards.reasons_to_go_back():
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
