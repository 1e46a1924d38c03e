"""HRPO's gate, which RL alone trains, through verl: a plain model gets it.

The engine's log-probs are the rollout's, its gradients are what finite differences say, and GRPO
steps move it.

Several ranks: test_two_ranks.py. Not covered: the packed layout of a model with images.
"""

import dataclasses
import shutil

import engine_helpers as helpers
import pytest
import tiny_run
import torch
from verl.utils import tensordict_utils as tu

from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.worker.treated_forward import STATE_ERRORS

CASES = {"padded": (tiny.tiny_qwen2_5_vl, False), "packed": (tiny.tiny_qwen3, True)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Made before verl patches transformers' classes. The gate lets in much, so that it shows."""
    cases = {}
    for name, (build, _) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        folder = helpers.make_gate_checkpoint(folder, build, initial_min=0.2, initial_max=0.6)
        cases[name] = (folder, *helpers.roll_out(folder))
    return cases


def batch_of(case, packed, trajectories=None):
    _, loaded, own, images, _, positions = case
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    batch = helpers.make_batch(trajectories or own, images, positions, adapter)
    settings = dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=len(own))
    tu.assign_non_tensor(batch, use_remove_padding=packed, use_fused_kernels=False, **settings)
    return batch


def inferred(engine, batch):
    with engine.eval_mode(disable_auto_offload=True):
        return engine.infer_batch(batch)["model_output"]


@pytest.mark.parametrize("name", CASES)
def test_old_log_probs_are_the_rollouts(name, recorded, gloo):
    packed = CASES[name][1]
    folder, _, trajectories, _, expected, _ = recorded[name]
    kinds = torch.cat([t.kinds for t in trajectories])
    assert {PositionKind.MIXED, PositionKind.TEXT} == set(kinds.tolist()), "some stop thinking"
    engine = helpers.make_engine(folder, packed)
    rows = helpers.infer(engine, batch_of(recorded[name], packed), packed)
    assert helpers.gap(rows, expected, trajectories) <= 1e-4
    assert helpers.gap(rows, [t.rollout_log_probs for t in trajectories], trajectories) <= 1e-4
    errors_NE = inferred(engine, batch_of(recorded[name], packed))[STATE_ERRORS].values()
    assert len(errors_NE) == (kinds == PositionKind.MIXED).sum()
    assert float(errors_NE[:, 1].max()) < 1e-3, "r, made within FSDP's forward"
    zeroed = [dataclasses.replace(t, latents=torch.zeros_like(t.latents)) for t in trajectories]
    rows = helpers.infer(engine, batch_of(recorded[name], packed, zeroed), packed)
    assert helpers.gap(rows, expected, trajectories) > 1e-2, "or the comparison could not fail"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences_and_an_update_moves_the_gate(
    name, recorded, gloo, tmp_path
):
    packed = CASES[name][1]
    engine = helpers.make_engine(recorded[name][0], packed, lr=1e-3)
    gate = {n: p for n, p in engine.module.named_parameters() if n.startswith("hybrid_gate.")}
    assert len(gate) == 5

    def loss(model_output, data, dp_group=None):
        return -model_output["log_probs"].values().mean(), {}

    def value() -> float:
        output = inferred(engine, batch_of(recorded[name], packed))
        return -float(output["log_probs"].values().double().mean())

    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch_of(recorded[name], packed), loss)
        gradients = {n: p.grad.full_tensor().clone() for n, p in gate.items()}
    for n, parameter in gate.items():
        size = float(gradients[n].norm())
        step = 0.05 * max(float(parameter.full_tensor().norm()), 0.5)
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.to_local().add_(gradients[n], alpha=sign * step / size)
            values.append(value())
        assert size > 1e-4
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(size, rel=0.03), n
    before = {n: p.full_tensor().clone() for n, p in gate.items()}
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch_of(recorded[name], packed), loss)
        engine.optimizer_step()
    assert all(not torch.equal(before[n], p.full_tensor()) for n, p in gate.items())
    engine.save_checkpoint(str(tmp_path), global_step=1)
    saved = load_latent_model(tmp_path / "huggingface")
    sent = dict(engine.get_per_tensor_param()[0])
    for n, parameter in gate.items():
        assert torch.equal(saved.model.get_parameter(n), parameter.full_tensor())
        assert torch.equal(sent[n], parameter.full_tensor())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.long
def test_grpo_steps_train_the_gate(local_ray, tmp_path, monkeypatch):
    """Two steps on verl's trainer, from a plain model without any SFT."""
    inputs, output = tiny_run.write_inputs(tmp_path), tmp_path / "out"
    shutil.rmtree(inputs / "model")
    helpers.make_gate_checkpoint(inputs, tiny.tiny_qwen2_5_vl)
    sizes = ("trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.test_freq=2")
    config = tiny_run.make_config(inputs, output, *sizes)
    tiny_run.train_here(config, monkeypatch)
    metrics = tiny_run.metrics_of(output)
    assert all(metrics[step]["latent/replay_logp_gap_max"] < 1e-4 for step in (1, 2))
    assert all(metrics[step]["latent/frac_rollouts"] == 1.0 for step in (1, 2))
    assert metrics[1]["latent/grad_norm_latent"] > 0
    trained = load_latent_model(output / "checkpoints" / "global_step_2" / "actor" / "huggingface")
    start = load_latent_model(inputs / "model")
    assert trained.mechanism == start.mechanism
    for n, parameter in start.model.named_parameters():
        if n.startswith("hybrid_gate."):
            assert not torch.equal(parameter, trained.model.get_parameter(n)), n
