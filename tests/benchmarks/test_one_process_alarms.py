"""The loop's steps under the alarms' names, and when the alarms are asked.

Does not cover the steps themselves, which are `OneProcess`'s.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import one_process_alarms  # noqa: E402
from one_process import OneProcess, StepLog  # noqa: E402

from grpo_latent.verl_plugin.trainer.alarm_settings import AlarmSettings  # noqa: E402
from grpo_latent.verl_plugin.trainer.alarms import Alarms  # noqa: E402
from grpo_latent.verl_plugin.trainer.spread import standard_error  # noqa: E402


def make_batch(rewards):
    """Groups of two; the first trajectory has no latent, the last one is cut."""
    num = len(rewards)
    trajectories = [
        SimpleNamespace(latents=torch.zeros(min(i, 1), 3), stop_reason="eos") for i in range(num)
    ]
    trajectories[-1].stop_reason = "length"
    return SimpleNamespace(
        rewards_B=torch.tensor(rewards),
        group_ids=[str(i // 2) for i in range(num)],
        trajectories=trajectories,
    )


def make_log(step, reward):
    return StepLog(step, reward, reward, 0.0, 1.0, entropy=0.4, length=9.0, kl=0.01)


def test_a_step_under_the_alarms_names():
    metrics = one_process_alarms.alarm_metrics(make_log(1, 0.5), make_batch([1.0, 0.0, 1.0, 0.0]))
    expected = {"critic/score/min": 0.0, "critic/score/max": 1.0, "critic/score/mean": 0.5}
    expected |= {"frac_reward_zero_std": 0.0, "rewards/standard_error": 0.0}
    expected |= {"latent/frac_rollouts": 0.75, "latent/stopped_at_length_frac": 0.25}
    assert {name: metrics[name] for name in expected} == expected
    judged = Alarms(AlarmSettings(ignored=()))
    judged.after_step(metrics)
    memory = judged.state()["memory"]
    assert memory["kl"] == {"recent": [0.01]} and memory["length"] == {"recent": [9.0]}


def test_the_error_of_a_share_is_that_of_its_zeros_and_ones():
    values = [1.0] * 3 + [0.0] * 5
    assert one_process_alarms.error_of_share(3 / 8, 8) == pytest.approx(standard_error(values))


def test_the_alarms_are_asked_after_each_step_and_validation(monkeypatch):
    rewards = {1: [1.0, 0.0, 1.0, 1.0], 2: [0.0, 0.0, 0.0, 0.0]}
    scores = iter((0.7, 0.1))

    def step(self, step, rows, scorer):
        self._sample(step, rows, scorer)
        return make_log(step, sum(rewards[step]) / 4)

    monkeypatch.setattr(OneProcess, "__init__", lambda self: None)
    monkeypatch.setattr(OneProcess, "_sample", lambda self, step, *_: make_batch(rewards[step]))
    monkeypatch.setattr(OneProcess, "step", step)
    monkeypatch.setattr(OneProcess, "validate", lambda self, *_: next(scores))
    loop = one_process_alarms.AlarmedProcess(Alarms(AlarmSettings(patience=1)))
    loop.validate([None] * 100, None)
    for number in (1, 2):
        loop.step(number, None, None)
    loop.validate([None] * 100, None)
    assert [(at, line.kind) for at, line in loop.lines] == [(2, "silent"), (2, "held_out")]


SCORES = {0: 0.60, 2: 0.70, 4: 0.10, 6: 0.72, 8: 0.66}


@pytest.fixture
def guarded(monkeypatch):
    """A loop whose step adds 1 to its only weight and whose validations are `SCORES`."""

    def init(self):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        self.loaded = SimpleNamespace(model=model)
        self.config = SimpleNamespace(trainer=SimpleNamespace(save_freq=2))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.rates = []

    def step(self, step, rows, scorer):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self._sample(step, rows, scorer)
        with torch.no_grad():
            self.loaded.model.weight += 1
        self.optimizer.step()
        self.schedule.step()
        return make_log(step, 0.5)

    monkeypatch.setattr(OneProcess, "__init__", init)
    monkeypatch.setattr(OneProcess, "_sample", lambda *_: make_batch([1.0, 0.0, 1.0, 0.0] * 2))
    monkeypatch.setattr(OneProcess, "step", step)
    monkeypatch.setattr(OneProcess, "validate", lambda self, *_: SCORES[len(self.rates)])
    return one_process_alarms.GuardedProcess(Alarms(AlarmSettings(rollback=True, max_rollbacks=3)))


def test_a_guarded_run_goes_back_as_the_trainer_does(guarded):
    """At 4 held-out is below its start; the end, at 8, is below the best without an alarm."""
    record = guarded.run([None], [None] * 500, None, num_steps=8, validate_every=2)
    assert guarded.rollbacks == [(4, 2), (8, 6)] and guarded.first_bad_step == 4
    assert guarded.rates == [0.4] * 4 + [0.2] * 4
    assert guarded.loaded.model.weight.item() == 2 + 2, "steps 3, 4, 7 and 8 are undone"
    assert guarded.schedule.base_lrs == [0.1] and guarded.optimizer.param_groups[0]["lr"] == 0.1
    assert [score for _, score in record.held_out] == [0.60, 0.70, 0.10, 0.72, 0.66]
