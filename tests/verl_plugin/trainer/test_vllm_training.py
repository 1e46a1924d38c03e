"""Rollout backend `vllm_latent` under the real trainer, with Ray, verl and vLLM. Slow.

The model is the tiniest.

Covers, on CPU: the launch of verl's server, groups and waves, images, the transfer of weights over
shared memory and their reload, records of latents that replay, rollout correction, exact resume.
Not covered: CUDA IPC, sleep, tensor parallelism.
"""

import shutil
from functools import partial

import pytest
import tiny_run

from grpo_latent.eval.dumps import read_dump
from grpo_latent.models import tiny
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.trainer import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.vllm]

SIZES = tiny.TinySizes(hidden=64)  # vLLM's CPU attention wants heads of 32
OPTIONS = (
    "actor_rollout_ref.rollout.name=vllm_latent",
    "algorithm.rollout_correction.rollout_is=token",
    "trainer.val_before_train=false",
    "trainer.total_training_steps=3",
    "trainer.save_freq=2",
    "actor_rollout_ref.actor.optim.lr=3e-4",  # the greedy rows that measure use still open spans after three steps
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    build = partial(tiny.tiny_qwen2_5_vl, sizes=SIZES)
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"), build=build, head="mlp")


def test_three_steps_and_the_third_again(inputs, local_ray, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_run.train_here(tiny_run.make_config(inputs, first, *OPTIONS), monkeypatch)
    metrics = tiny_run.metrics_of(first)
    assert sorted(metrics) == [1, 2, 3] and "val-core/tiny/acc/mean@1" in str(metrics[3])
    for step in (1, 2, 3):
        of_step = metrics[step]
        assert of_step["latent/replay_logp_gap_max"] <= 1e-4 and of_step["latent/steps_mean"] > 0.2
        assert (
            0 < of_step["latent/replay_state_err"] <= 1e-4
            and of_step["latent/replay_state_err_rel"] <= 1e-4
        )
        assert of_step["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
    assert {"latent/usage_gap/shuffle", "latent/drift_cosine"} <= set(
        metrics[3]
    )  # by engine hf, with step 3's weights
    assert metrics[1]["actor/kl_loss"] < 1e-8 and metrics[3]["actor/kl_loss"] > 1e-6
    assert metrics[3]["latent/drift_relative"] > 0

    dumped = read_dump(first / "rollouts")
    assert not dumped.problems and len(dumped.trajectories) == 3 * 16
    assert any((item.trajectory.kinds == K.LATENT).any() for item in dumped.trajectories)
    # step 3 sampled from weights that two updates had moved: those of the start, the reference,
    # are elsewhere
    moved = [
        (item.log_probs["ref"] - item.log_probs["rollout"])[item.response_mask].abs().max()
        for item in dumped.trajectories
        if item.step == 3
    ]
    assert max(moved) > 1e-2

    tiny_run.snapshot(first, second)
    shutil.rmtree(second / "checkpoints" / "global_step_3")
    for path in (second / "rollouts").glob("step_3.*"):
        path.unlink()
    checkpoint.write_tracker(second / "checkpoints", 2)
    assert (
        tiny_run.train_here(
            tiny_run.make_config(inputs, second, *OPTIONS), monkeypatch
        ).resumed_from
        == 2
    )
    tiny_run.assert_equal_runs(first, second, [3], checkpoint=3)


def test_drawn_latents_act_and_replay(inputs, local_ray, tmp_path, monkeypatch):
    """One step: what vLLM draws and scores is what the trainer scores."""
    drawn = ("latent.treatment.name=gaussian", "latent.treatment.gaussian.sigma=0.3")
    config = tiny_run.make_config(
        inputs, tmp_path, *OPTIONS, *drawn, "trainer.total_training_steps=1"
    )
    tiny_run.train_here(config, monkeypatch)
    (metrics,) = tiny_run.metrics_of(tmp_path).values()
    assert metrics["latent/steps_mean"] > 0.2 and metrics["latent/replay_logp_gap_max"] <= 1e-4
    # a sum over the dimensions, of hundreds of nats
    assert 0 < metrics["latent/replay_density_gap_max"] <= 1e-3
