"""A rollback and the best checkpoint in real training on Ray, with the tiniest model. Slow.

    A  steps 1-6 of one run: the best validation at 2, an alarm at 4, back to 3; the end, at 6, on the
       way down, back to 4; what a kill leaves inside the first rollback, and in step 5
    B  the latter resumed: from the checkpoint that the rollback has saved
    C  the former resumed: from the good one, so it goes back once more

B and C equal A to the bit. What is judged is made up by step; everything else is real.
"""

import json

import pytest
import tiny_run

from grpo_latent.common.best_checkpoint import STATE_FILE, read_best
from grpo_latent.verl_plugin.trainer import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]
SCORES = {0: 0.5, 2: 0.7, 4: 0.69, 6: 0.45}
RATE = 1e-3
ALARM = (
    "latent.alarm.rollback=true",
    "latent.alarm.rollback_on=[reward,held_out]",
    "latent.alarm.patience=1",
    "latent.alarm.start_steps=1",
)


def make_up(trainer):
    """Sampled rewards and held-out scores as the guards see them."""
    judge, measure = trainer.guards.after_step, trainer._val_metrics_update

    def judging(metrics):
        real = metrics["critic/score/mean"]
        metrics["critic/score/mean"] = -1e3 if trainer.global_steps == 4 else 0.5
        lines = judge(metrics)
        metrics["critic/score/mean"] = real
        return lines

    def measuring(*columns, **counts):
        metrics = measure(*columns, **counts)
        (name,) = (name for name in metrics if name.startswith("val-core/") and "/mean@" in name)
        return metrics | {name: SCORES[trainer.global_steps], "val-aux/standard_error": 0.01}

    trainer.guards.after_step, trainer._val_metrics_update = judging, measuring


def test_a_rollback_and_the_best_checkpoint(local_ray, tmp_path, monkeypatch):
    inputs = tiny_run.write_inputs(tmp_path)
    outputs = {name: tmp_path / name for name in ("a", "in_step_5", "in_rollback")}
    changes = ("trainer.test_freq=2", "trainer.max_actor_ckpt_to_keep=1", "latent.alarm.z=50")

    def train(name, before_fit):
        config = tiny_run.make_config(inputs, outputs[name], *ALARM, *changes)
        return tiny_run.train_here(config, monkeypatch, before_fit)

    def with_snapshots(trainer):
        make_up(trainer)
        load, log = trainer.actor_rollout_wg.load_checkpoint, trainer._compute_metrics

        def loading(**kwargs):
            if trainer.global_steps == 4:
                tiny_run.snapshot(outputs["a"], outputs["in_rollback"])
            return load(**kwargs)

        def logging(batch, metrics, *args, **kwargs):
            if trainer.global_steps == 5:
                tiny_run.snapshot(outputs["a"], outputs["in_step_5"])
            return log(batch, metrics, *args, **kwargs)

        trainer.actor_rollout_wg.load_checkpoint = loading
        trainer._compute_metrics = logging

    train("a", with_snapshots)
    check_rollback(outputs)
    for name, resumed_from in (("in_step_5", 4), ("in_rollback", 3)):
        trainer = train(name, make_up)
        assert trainer.resumed_from == resumed_from
        tiny_run.assert_equal_runs(outputs["a"], outputs[name], range(1, 7), checkpoint=6)
        states = [
            json.loads((outputs[run] / "checkpoints" / "global_step_6" / STATE_FILE).read_text())
            for run in ("a", name)
        ]
        assert states[0] == states[1]
        assert read_best(outputs[name] / "checkpoints").step == 2


def check_rollback(outputs):
    """What run A has logged and left, and what its checkpoints hold before and after it."""
    metrics = tiny_run.metrics_of(outputs["a"])
    rolled_back_to = {
        step: metrics[step]["latent/rolled_back_to"]
        for step in metrics
        if "latent/rolled_back_to" in metrics[step]
    }
    assert rolled_back_to == {4: 3, 6: 4}
    alarms = [metrics[step]["latent/alarm_reward"] for step in range(1, 7)]
    assert alarms == [0, 0, 0, 1, 0, 0]
    factors = [metrics[step]["latent/lr_factor"] for step in range(1, 7)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25]
    rates = [metrics[step]["actor/lr"] for step in range(1, 7)]
    assert rates == pytest.approx([RATE] * 4 + [RATE / 2] * 2)

    roots = {name: folder / "checkpoints" for name, folder in outputs.items()}
    assert checkpoint.read_tracker(roots["in_rollback"]) == 3
    assert checkpoint.read_tracker(roots["in_step_5"]) == 4
    before = tiny_run.states_of(outputs["in_rollback"], 3)
    after = tiny_run.states_of(outputs["in_step_5"], 4)
    differing = tiny_run.differences(before, after)
    assert differing, "of the rates"
    assert all("lr" in where for where in differing), differing

    best = read_best(roots["a"])
    assert (best.step, best.score, best.folder) == (2, SCORES[2], "global_step_2")
    assert (best.model_folder(roots["a"]) / "config.json").is_file()
    assert sorted(path.name for path in roots["a"].glob("global_step_*")) == [
        "global_step_2",
        "global_step_6",
    ], "the newest, and the best one pinned"
