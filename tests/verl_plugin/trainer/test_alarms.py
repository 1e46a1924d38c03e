"""Each kind of alarm on numbers made by hand: when it sounds, what it says, what it remembers.

Does not cover where the numbers come from: `test_step_metrics.py`, `test_spread.py`.
"""

import copy
import json
import math

import pytest

from grpo_latent.common.settings import build
from grpo_latent.errors import ConfigError
from grpo_latent.eval.usage import Usage
from grpo_latent.verl_plugin.trainer.alarm_settings import FAULTS, AlarmSettings
from grpo_latent.verl_plugin.trainer.alarms import Alarms

FINE = {
    "latent/frac_rollouts": 1.0,
    "critic/score/mean": 0.6,
    "critic/score/min": 0.0,
    "critic/score/max": 1.0,
    "rewards/standard_error": 0.04,
    "rewards/at_top_frac": 0.6,
    "rewards/format/mean": 1.0,
    "frac_reward_zero_std": 0.25,
    "latent/stopped_at_length_frac": 0.0,
    "actor/entropy": 0.4,
    "response_length/mean": 16.0,
    "actor/kl_loss": 0.01,
}


def step_lines(alarms, **changes):
    """Lines of a step that is fine but for `changes`, whose names have _ for /."""
    names = {name.replace("/", "_"): name for name in FINE}
    return alarms.after_step(FINE | {names[name]: value for name, value in changes.items()})


def kinds(lines):
    return [line.kind for line in lines]


# name, what is wrong, what the line has to say of it
BAD_STEPS = [
    ("vanished", {"latent_frac_rollouts": 0.01}, "1.0% of the trajectories have latents"),
    ("reward", {"critic_score_mean": 0.2}, "sampled reward 0.200 is below its start, 0.600"),
    ("silent", {"frac_reward_zero_std": 1.0}, "every group has equal rewards"),
    ("form", {"rewards_format_mean": 0.5}, "reward term format 0.500, of 1.000 at the start"),
    ("form", {"latent_stopped_at_length_frac": 0.5}, "that end by themselves 0.500, of 1.000"),
    ("entropy", {"actor_entropy": 2.0}, "entropy 2.000, after 0.400 in the median"),
    ("length", {"response_length_mean": 40.0}, "mean length 40.000, after 16.000"),
    ("length", {"response_length_mean": 7.0}, "mean length 7.000"),
    ("kl", {"actor_kl_loss": 1.0}, "KL 1.000, after 0.010"),
]


@pytest.mark.parametrize(("kind", "changes", "text"), BAD_STEPS)
def test_a_kind_sounds_once_after_patience_and_again_after_it_got_better(kind, changes, text):
    alarms = Alarms(AlarmSettings(patience=2))
    assert [step_lines(alarms) for _ in range(4)] == [[]] * 4
    pattern = (True, False, True, True, True, False, True, True)
    lines = [step_lines(alarms, **(changes if bad else {})) for bad in pattern]
    sounded = [[kind] if i in (3, 7) else [] for i in range(8)]
    assert [kinds(each) for each in lines] == sounded, "alone, and only at the second in a row"
    line = str(lines[3][0])
    assert line.startswith(f"{kind}: ") and text in line and "What helps: " in line
    assert "latent.alarm.rollback" in line and lines[3][0].is_alarm


@pytest.mark.parametrize(("kind", "changes", "text"), BAD_STEPS)
def test_a_kind_that_is_ignored_is_silent(kind, changes, text):
    alarms = Alarms(AlarmSettings(patience=1, ignored=(kind,)))
    for changed in ({}, {}, {}, changes, changes):
        assert step_lines(alarms, **changed) == []
    assert not alarms.sounds(kind)


def test_alarms_are_logged_while_they_sound():
    alarms, logged = Alarms(AlarmSettings(patience=2)), []
    for share in (1.0, 0.0, 0.0, 0.0, 1.0):
        metrics = FINE | {"latent/frac_rollouts": share}
        alarms.after_step(metrics)
        logged.append(metrics["latent/alarm_vanished"])
    assert logged == [0, 0, 1, 1, 0]
    assert {f"latent/alarm_{kind}" for kind in FAULTS} < metrics.keys()


def test_what_was_not_logged_is_not_judged():
    """Without entropy, KL, form or a finite reward there is no alarm of theirs, and no crash."""
    alarms = Alarms(AlarmSettings(patience=1))
    for _ in range(5):
        nothing = {"critic/score/mean": math.nan, "critic/score/min": math.nan}
        assert alarms.after_step(nothing) == []
    assert alarms.state() == Alarms(AlarmSettings()).state()


def test_reward_falls_by_more_than_noise():
    """Three steps of error 0.04: the start's is 0.04 / sqrt(3), a step's difference has 0.0462."""
    noise = math.hypot(0.04 / math.sqrt(3), 0.04)
    for z, below, sounds in ((3.0, 2.9, False), (3.0, 3.1, True), (2.0, 2.1, True)):
        alarms = Alarms(AlarmSettings(patience=1, z=z))
        for _ in range(3):
            step_lines(alarms)
        lines = step_lines(alarms, critic_score_mean=0.6 - below * noise)
        assert bool(lines) == sounds, (z, below)


def test_a_step_without_spread_is_no_step_without_noise():
    """All groups alike by chance: the error is that of the start, or any fall would sound."""
    alarms = Alarms(AlarmSettings(patience=1))
    for _ in range(3):
        step_lines(alarms)
    assert step_lines(alarms, critic_score_mean=0.52, rewards_standard_error=0.0) == []
    assert kinds(step_lines(alarms, critic_score_mean=0.1, rewards_standard_error=0.0)) == [
        "reward"
    ]


def test_one_group_shows_no_spread_and_is_not_judged():
    alarms = Alarms(AlarmSettings(patience=1))
    for reward in (0.6, 0.6, 0.6, 0.0):
        lines = step_lines(alarms, critic_score_mean=reward, rewards_standard_error=math.nan)
        assert lines == []


def test_held_out_takes_one_validation():
    alarms = Alarms(AlarmSettings(patience=5))
    scores = (0.62, 0.60, 0.30, 0.25, 0.62, 0.2)
    lines = [kinds(alarms.after_validation(score, 0.03)) for score in scores]
    assert lines == [[], [], ["held_out"], [], [], ["held_out"]]
    assert alarms.after_validation(None, math.nan) == [] and alarms.sounds("held_out")
    assert alarms.after_validation(0.9, math.nan) == [] and alarms.sounds("held_out"), "unknown"


def test_unused_latents():
    alarms = Alarms(AlarmSettings(patience=2))
    verdicts = ("used", "not used", "not used", "not used", "undecided at this n", "not used")
    lines = [alarms.after_usage(Usage({}, verdict, f"{verdict}: why")) for verdict in verdicts]
    assert [kinds(each) for each in lines] == [[], [], ["unused"], [], [], []]
    assert str(lines[2][0]).startswith("unused: latents are not used: why. What helps: ")


def test_silent_steps_are_counted_over_the_run():
    alarms, counts = Alarms(AlarmSettings(ignored=("silent",))), []
    for share in (1.0, 0.5, 1.0, 1.0, 0.0):
        metrics = FINE | {"frac_reward_zero_std": share}
        alarms.after_step(metrics)
        counts.append(metrics["actor/silent_steps"])
    assert counts == [1, 1, 2, 3, 3]


SOLVED = {"frac_reward_zero_std": 1.0, "critic_score_min": 1.0, "rewards_at_top_frac": 1.0}


def test_a_run_that_has_solved_its_data_is_told_apart_from_a_silent_one():
    alarms = Alarms(AlarmSettings(patience=2, stop_on=("solved",)))
    lines = [step_lines(alarms, **changes) for changes in ({}, SOLVED, SOLVED)]
    assert [kinds(each) for each in lines] == [[], [], ["solved"]]
    assert not lines[2][0].is_alarm and alarms.sounding(("silent", "solved")) == ["solved"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards_at_top_frac": 0.5},  # silent, but half of them fail
        {"critic_score_max": 0.9},  # alike, below what the run has reached
    ],
)
def test_silent_groups_that_are_not_at_the_top_are_a_fault(changes):
    alarms = Alarms(AlarmSettings(patience=1))
    step_lines(alarms)
    assert kinds(step_lines(alarms, **SOLVED | changes)) == ["silent"]


def test_rewards_that_have_never_differed_are_a_fault():
    """A run whose reward is constant from its first step has solved nothing."""
    alarms = Alarms(AlarmSettings(patience=1))
    assert kinds(step_lines(alarms, **SOLVED)) == ["silent"]


def test_slow_changes_are_learning():
    alarms = Alarms(AlarmSettings(patience=1))
    for step in range(60):
        grown = {"actor_entropy": 0.4 * 1.05**step, "response_length_mean": 16 * 1.03**step}
        assert step_lines(alarms, **grown) == [], step


def test_a_jump_stays_one_while_it_lasts():
    """Bad steps stay out of the median, which would get used to them."""
    alarms = Alarms(AlarmSettings(patience=1, window=4))
    for _ in range(4):
        step_lines(alarms)
    for _ in range(20):
        step_lines(alarms, actor_entropy=2.0)
    assert alarms.sounds("entropy")
    step_lines(alarms)
    assert not alarms.sounds("entropy")


def test_a_small_entropy_may_triple():
    """From 0.05 to 0.2 is no jump: `entropy_rise` is 0.2 nats."""
    alarms = Alarms(AlarmSettings(patience=1))
    values = (0.05, 0.05, 0.05, 0.2)
    assert [step_lines(alarms, actor_entropy=value) for value in values] == [[]] * 4


def test_kl_to_the_old_policy_where_there_is_no_reference():
    alarms = Alarms(AlarmSettings(patience=1))
    lines = []
    for kl in (0.001, 0.001, 0.002, 0.9):
        metrics = {name: value for name, value in FINE.items() if name != "actor/kl_loss"}
        lines += alarms.after_step(metrics | {"actor/ppo_kl": kl})
    assert kinds(lines) == ["kl"]


@pytest.mark.parametrize(
    ("changes", "is_good"),
    [
        ({}, True),
        ({"critic_score_mean": 0.58}, True),
        ({"critic_score_mean": 0.54}, False),  # by more than one error: no alarm, no good sign
        ({"latent_frac_rollouts": 0.0}, False),  # bad for the first time
        ({"actor_entropy": 2.0}, True),  # jumps are not of `rollback_on`
    ],
)
def test_what_a_good_checkpoint_is(changes, is_good):
    alarms = Alarms(AlarmSettings(patience=3))
    for _ in range(3):
        step_lines(alarms)
    assert not alarms.doubts
    step_lines(alarms, **changes)
    assert (not alarms.doubts) == is_good


def test_a_validation_below_the_start_is_no_good_sign():
    alarms = Alarms(AlarmSettings())
    for score, is_good in ((0.62, True), (0.60, True), (0.55, False), (0.63, True)):
        assert alarms.after_validation(score, 0.03) == []
        assert (not alarms.doubts) == is_good, score


def test_a_checkpoint_on_the_way_down_from_the_best_is_no_good_one():
    """Above the start, and yet below the best by more than one error of the difference, 0.042."""
    alarms = Alarms(AlarmSettings())
    scores = ((0.62, True), (0.75, True), (0.72, True), (0.68, False), (0.66, False), (0.74, True))
    for score, is_good in scores:
        assert alarms.after_validation(score, 0.03) == []
        assert (not alarms.doubts) == is_good, score


def a_run():
    """Validations, measurements and steps of a collapse, one tuple a step."""
    collapse = [
        {},
        {"actor_entropy": 0.5},
        {"critic_score_mean": 0.5},
        {"critic_score_mean": 0.3, "rewards_format_mean": 0.5, "actor_entropy": 1.9},
        {"critic_score_mean": 0.1, "rewards_format_mean": 0.1, "latent_frac_rollouts": 0.01},
        {"critic_score_mean": 0.0, "critic_score_max": 0.0, "frac_reward_zero_std": 1.0},
        {"critic_score_mean": 0.0, "critic_score_max": 0.0, "frac_reward_zero_std": 1.0},
        SOLVED,
        SOLVED,
    ]
    scores = (0.6, None, 0.55, None, 0.1, None, 0.0, None, 0.9)
    verdicts = ("used", None, "not used", None, "not used", None, "not used", None, "used")
    return list(zip(collapse, scores, verdicts, strict=True))


def take(alarms, changes, score, verdict):
    lines = alarms.after_validation(score, 0.03)
    if verdict:
        lines += alarms.after_usage(Usage({}, verdict, verdict))
    return [str(line) for line in lines + step_lines(alarms, **changes)]


@pytest.mark.parametrize("cut", range(9))
def test_a_restored_run_alarms_as_an_uninterrupted_one(cut):
    """After any step, through the JSON of a file: the same lines, and the same state at the end."""
    settings = AlarmSettings(patience=2, start_steps=2)
    whole, first = Alarms(settings), Alarms(settings)
    lines = [take(whole, *step) for step in a_run()]
    assert {line.split(":")[0] for each in lines for line in each} >= {
        "reward",
        "held_out",
        "form",
        "silent",
        "solved",
        "unused",
    }
    for step in a_run()[:cut]:
        take(first, *step)
    second, given = Alarms(settings), first.state()
    saved = json.loads(json.dumps(given))
    second.restore(saved)
    assert [take(second, *step) for step in a_run()[cut:]] == lines[cut:]
    assert second.state() == whole.state()
    for step in a_run()[cut:]:
        take(first, *step)
    assert saved == given, "a state that was given away does not change any more"


def damaged(**changes):
    state = copy.deepcopy(Alarms(AlarmSettings()).state())
    for path, value in changes.items():
        *way, last = path.split("__")
        node = state
        for name in way:
            node = node[name]
        node[last] = value
    return state


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        damaged(bad_in_a_row={"vanished": 1}),
        damaged(bad_in_a_row__vanished=-1),
        damaged(bad_in_a_row__vanished=True),
        damaged(memory={}),
        damaged(memory__reward={"start": []}),
        damaged(memory__reward__start=["0.5"]),
        damaged(memory__reward__is_doubtful=0),
        damaged(memory__silent__steps=-3),
        damaged(memory__kl=None),
    ],
)
def test_a_state_that_is_none_is_refused_whole(state):
    alarms = Alarms(AlarmSettings())
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        alarms.restore(state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patience", 0, "latent.alarm.patience: not a count; got 0; expected int >= 1"),
        ("patience", 1.5, "latent.alarm.patience: wrong type"),
        ("start_steps", 0, "latent.alarm.start_steps"),
        ("window", 0, "latent.alarm.window"),
        ("max_rollbacks", 0, "latent.alarm.max_rollbacks"),
        ("min_frac_rollouts", 2, "latent.alarm.min_frac_rollouts: not a share"),
        ("solved_share", -0.1, "latent.alarm.solved_share"),
        ("min_form", 1.01, "latent.alarm.min_form"),
        ("z", 0, "latent.alarm.z: not a bound"),
        ("z", math.inf, "latent.alarm.z"),
        ("entropy_rise", -1, "latent.alarm.entropy_rise"),
        ("kl_rise", 0.0, "latent.alarm.kl_rise"),
        ("entropy_factor", 1.0, "latent.alarm.entropy_factor: not a factor of a jump"),
        ("length_factor", 0.5, "latent.alarm.length_factor"),
        ("kl_factor", math.nan, "latent.alarm.kl_factor"),
        ("rollback_lr_factor", 1.0, "latent.alarm.rollback_lr_factor: not a smaller step"),
        ("rollback_lr_factor", 0.0, "latent.alarm.rollback_lr_factor"),
        ("ignored", ["rewards"], "latent.alarm.ignored: unknown value; got rewards"),
        ("stop_on", ["nothing"], "latent.alarm.stop_on"),
        ("rollback_on", ["solved"], "latent.alarm.rollback_on"),
        ("stop", "yes", "latent.alarm.stop: wrong type"),
        ("patients", 3, "latent.alarm: unknown key"),
    ],
)
def test_unusable_settings_are_named(key, value, message):
    with pytest.raises(ConfigError, match=message):
        build(AlarmSettings, {key: value}, "latent.alarm")
