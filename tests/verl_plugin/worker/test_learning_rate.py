"""A rate that is scaled on the way, against schedules that had it from the start."""

import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from grpo_latent.verl_plugin.worker.learning_rate import scale_learning_rate


def make(rate):
    """AdamW under a warm-up of four steps that is followed by a decay."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate)
    schedule = LambdaLR(optimizer, lambda step: min(step / 4, 1.0) / (1 + step / 8))
    return optimizer, schedule


def rates(optimizer, schedule, num_steps):
    taken = []
    for _ in range(num_steps):
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        taken += schedule.get_last_lr()
    return taken


@pytest.mark.parametrize("step", [0, 2, 6])
def test_a_scaled_schedule_goes_on_as_one_of_the_smaller_rate(step):
    scaled, smaller = make(0.4), make(0.1)
    rates(*scaled, step)
    rates(*smaller, step)
    scale_learning_rate(*scaled, 0.25)
    for name in ("lr", "initial_lr"):
        assert scaled[0].param_groups[0][name] == smaller[0].param_groups[0][name]
    assert scaled[1].get_last_lr() == smaller[1].get_last_lr()
    assert rates(*scaled, 8) == pytest.approx(rates(*smaller, 8), abs=0.0)


def test_the_factor_survives_saving_and_loading():
    first, second = make(0.4), make(0.4)
    rates(*first, 3)
    scale_learning_rate(*first, 0.5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file), strict=True):
        part.load_state_dict(state)
    assert rates(*second, 6) == rates(*first, 6)
