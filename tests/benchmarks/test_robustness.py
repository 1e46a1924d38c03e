"""The maths of `benchmarks/robustness.py`, and that its recipes compose.

Does not cover: the runs, which take an hour a recipe; that the loop's steps are the plug-in's is
tests/verl_plugin/trainer/test_training.py's.
"""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import one_process  # noqa: E402
import robustness  # noqa: E402


def run(start, final, tracked, perturbation="none"):
    return {
        "seed": 0,
        "perturbation": perturbation,
        "start": start,
        "final": final,
        "tracked": list(enumerate(tracked)),
        "seconds": 1.0,
    }


def test_the_distribution_by_hand():
    runs = [
        run(0.5, 0.8, [0.5, 0.7, 0.8]),
        run(0.5, 0.6, [0.5, 0.2, 0.6]),
        run(0.5, 0.1, [0.5, 0.3, 0.1], "noise 1"),
    ]
    summary = robustness.summarize(runs)
    assert summary["mean"] == pytest.approx(0.5) and summary["min"] == 0.1
    assert summary["sd"] == pytest.approx(0.36056, abs=1e-5)  # of n - 1
    assert summary["below_start"] == pytest.approx(1 / 3)
    assert summary["steps_to_collapse"] == [1, 2] and summary["collapsed"] == 2
    assert summary["lowest_run"] == "seed 0, noise 1" and not summary["holds"]


@pytest.mark.parametrize(
    ("finals", "holds"),
    [((0.7, 0.9), True), ((0.55, 0.9), False), ((0.5, 0.5), False), ((0.4, 0.45), False)],
)
def test_it_holds_if_the_least_gain_is_half_of_the_mean(finals, holds):
    assert robustness.summarize([run(0.5, f, [0.5]) for f in finals])["holds"] == holds


def test_noise_is_relative_and_of_its_seed():
    models = [torch.nn.Linear(50, 50) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (1, 1, 2), strict=True):
        robustness.add_noise(model, 1e-3, seed)
    first, same, other = (model.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    ratio = (first / other).log().std().item()
    assert ratio == pytest.approx(1e-3 * 2**0.5, rel=0.1)


def test_rows_come_in_the_order_of_verls_sampler():
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import create_rl_sampler

    config = OmegaConf.create({"shuffle": True, "seed": 3, "sampler": None})
    rows = list(range(100))
    assert one_process.in_training_order(rows, 3) == [
        rows[i] for i in create_rl_sampler(config, rows)
    ]
    assert one_process.in_training_order(rows, 3, permutation=1) != one_process.in_training_order(
        rows, 3
    )


@pytest.mark.parametrize("name", robustness.RECIPES)
def test_recipes_compose_and_are_what_the_loop_can_run(name):
    recipe = robustness.RECIPES[name]
    config = one_process.compose_config(
        BENCHMARKS.parent / recipe.folder, recipe.config, recipe.overrides
    )
    one_process.check_config(config)
    assert (BENCHMARKS.parent / recipe.script).is_file()
