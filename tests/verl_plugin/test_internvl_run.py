"""InternVL through verl: log-probs of the engine are the rollout's, and GRPO steps train.

verl has no code of its own for this family, so that Hugging Face's forward runs. Not covered:
several ranks, the packed layout.
"""

import dataclasses

import engine_helpers as helpers
import pytest
import tiny_run
import torch
from internvl_case import tiny_internvl

from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return helpers.make_checkpoint(tmp_path_factory.mktemp("model"), tiny_internvl)


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_log_probs_are_those_of_rollout_and_replay(folder, visibility, gloo):
    loaded, trajectories, images, expected, positions = helpers.roll_out(folder, visibility)
    assert sum(len(t.latents) for t in trajectories) >= 3 and positions[0].ndim == 1
    engine = helpers.make_engine(folder, freeze_vision=True, visibility=visibility)
    assert not any(
        p.requires_grad
        for n, p in engine.module.named_parameters()
        if "vision_tower" in n or "multi_" in n
    )
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    rows = helpers.infer(engine, helpers.make_batch(trajectories, images, positions, adapter))
    assert helpers.gap(rows, expected, trajectories) <= 1e-5
    assert helpers.gap(rows, [t.rollout_log_probs for t in trajectories], trajectories) <= 1e-4
    zeroed = [dataclasses.replace(t, latents=torch.zeros_like(t.latents)) for t in trajectories]
    rows = helpers.infer(engine, helpers.make_batch(zeroed, images, positions, adapter))
    assert helpers.gap(rows, expected, trajectories) > 1e-2, "or the comparison could not fail"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.long
def test_grpo_steps_train(local_ray, tmp_path, monkeypatch):
    """Two steps on verl's trainer; in the first, policy and reference do not differ yet."""
    inputs, output = tiny_run.write_inputs(tmp_path, build=tiny_internvl), tmp_path / "out"
    sizes = ("trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.test_freq=-1")
    config = tiny_run.make_config(inputs, output, "trainer.val_before_train=false", *sizes)
    tiny_run.train_here(config, monkeypatch)
    metrics = tiny_run.metrics_of(output)
    assert all(metrics[step]["latent/replay_logp_gap_max"] < 1e-4 for step in (1, 2))
    assert metrics[1]["actor/kl_loss"] == 0.0 < metrics[2]["actor/kl_loss"]
    assert metrics[1]["latent/grad_norm_latent"] > 0
    trained = load_latent_model(output / "checkpoints" / "global_step_2" / "actor" / "huggingface")
    start = load_latent_model(inputs / "model")
    assert trained.mechanism == start.mechanism
    assert not torch.equal(*(m.model.get_output_embeddings().weight for m in (trained, start)))
    assert torch.equal(
        *(m.model.model.multi_modal_projector.linear_1.weight for m in (trained, start))
    )
