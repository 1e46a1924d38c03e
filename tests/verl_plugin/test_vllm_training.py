"""Rollout backend `vllm_latent` under the real trainer: real Ray, verl and vLLM, the tiniest model. Slow.

Covers, on CPU: the launch of verl's server, groups and waves, images, the transfer of weights over shared memory and their
reload, records of latents that replay, rollout correction. Not covered: CUDA IPC, sleep, tensor parallelism.
"""

from functools import partial

import pytest
import tiny_run

from grpo_latent.eval.dumps import read_dump
from grpo_latent.models import tiny
from grpo_latent.trajectory import PositionKind as K

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SIZES = tiny.TinySizes(hidden=64)  # vLLM's CPU attention wants heads of 32
OPTIONS = (
    "actor_rollout_ref.rollout.name=vllm_latent",
    "latent.usage.num_prompts=0",
    "algorithm.rollout_correction.rollout_is=token",
    "trainer.val_before_train=false",
    "trainer.total_training_steps=3",
    "trainer.save_freq=-1",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    build = partial(tiny.tiny_qwen2_5_vl, sizes=SIZES)
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"), build=build, head="mlp")


def test_three_steps(inputs, local_ray, tmp_path, monkeypatch):
    tiny_run.train_here(tiny_run.make_config(inputs, tmp_path, *OPTIONS), monkeypatch)
    metrics = tiny_run.metrics_of(tmp_path)
    assert sorted(metrics) == [1, 2, 3] and "val-core/tiny/acc/mean@1" in str(metrics[3])
    for step in (1, 2, 3):
        of_step = metrics[step]
        assert of_step["latent/replay_logp_gap_max"] <= 1e-4 and of_step["latent/steps_mean"] > 0.2
        assert 0 < of_step["latent/replay_state_err"] <= 1e-4 and of_step["latent/replay_state_err_rel"] <= 1e-4
        assert of_step["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics[1]["actor/kl_loss"] < 1e-8 and metrics[3]["actor/kl_loss"] > 1e-6

    dumped = read_dump(tmp_path / "rollouts")
    assert not dumped.problems and len(dumped.trajectories) == 3 * 16
    assert any((item.trajectory.kinds == K.LATENT).any() for item in dumped.trajectories)
    # step 3 sampled from weights that two updates had moved: those of the start, the reference, are elsewhere
    moved = [
        (item.log_probs["ref"] - item.log_probs["rollout"])[item.response_mask].abs().max()
        for item in dumped.trajectories
        if item.step == 3
    ]
    assert max(moved) > 1e-2
