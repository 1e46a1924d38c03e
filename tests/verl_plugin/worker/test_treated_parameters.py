"""A treatment with parameters of its own, through verl's engine in one process.

Where they start, what reaches them, where they go. (Two ranks: test_two_ranks.py. The density
itself: tests/latent/test_gaussian_head.py.)
"""

import shutil
from dataclasses import dataclass
from functools import partial

import engine_helpers as helpers
import pytest
import torch
from folder_cases import without_manifest
from safetensors.torch import load_file, save_file
from torch import nn
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.treatments import Mask, Treatment, parse_treatment
from grpo_latent.latent.treatments.loss_components import Component
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.models.sources import latent_log_densities
from grpo_latent.models.treatment_parameters import attach_treatment, initialisation_notes
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss

HEAD = {"name": "gaussian_head", "gaussian_head": {"sigma": 0.5, "sigma_range": 20.0}}
TREATMENT, TERMS = parse_treatment(HEAD)
NAMES = {"latent_treatment.linear.weight", "latent_treatment.linear.bias"}
# model, packed, what the checkpoint's latents are
CASES = {
    "padded": (tiny.tiny_qwen2_5_vl, False, dict(max_spans=3, head="mlp")),
    "packed": (tiny.tiny_qwen3, True, dict(max_spans=3)),
}


@dataclass(frozen=True)
class Probe(Treatment):
    """A user's, no action: a linear probe of h that learns a target beside the text."""

    target: float = 1.0
    weight: float = 0.5

    def build(self, text_config):
        return nn.Linear(text_config.hidden_size, 1)

    def features(self, model, hidden_MH):
        return model.latent_treatment(hidden_MH)

    def statistics(self, source):
        return source.features_MF

    def reads_statistics(self, terms):
        return True

    def components(self, view, terms):
        return [Component("probe", self.weight, (view.statistics_MS[:, 0] - self.target).square())]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Makes rollouts, replays and gradients of plain models before verl patches transformers."""
    cases = {}
    for name, (build, _, changes) in CASES.items():
        folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build, **changes)
        rolled = helpers.roll_out(folder, treatment=TREATMENT)
        cases[name] = (folder, *rolled, density_gradients(*rolled[:3]))
    return cases


def density_gradients(loaded, trajectories, images) -> dict[str, torch.Tensor]:
    """Of the sum of all log-densities, by the package's replay."""
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    batch = collate(trajectories, images, adapter, "full", "both")
    _, hidden_BTH = replay(adapter, batch, temperature=helpers.TEMPERATURE)
    latent_log_densities(
        adapter, batch, hidden_BTH, TREATMENT, helpers.TEMPERATURE
    ).sum().backward()
    return {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}


def batch_of(case, packed):
    _, loaded, trajectories, images, expected, positions, _ = case
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    settings = dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=2, use_fused_kernels=False)
    tu.assign_non_tensor(
        batch, use_remove_padding=packed, global_batch_size=len(trajectories), **settings
    )
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    batch["old_log_probs"] = nested(list(expected))
    batch["advantages"] = nested(
        [(1.0 - 0.4 * i) * t.response_mask().float() for i, t in enumerate(trajectories)]
    )
    return batch


def train(engine, batch, loss, steps=False):
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss)
        grads = {
            n: p.grad.full_tensor().clone()
            for n, p in engine.module.named_parameters()
            if p.grad is not None
        }
        if steps:
            engine.optimizer_step()
    return grads


def no_text(model_output, data, dp_group=None):
    return model_output["log_probs"].values().sum() * 0, {}


def density_sum(model_output, data, dp_group=None):
    kinds = torch.cat(data["position_kinds"].unbind())
    return model_output["log_probs"].values()[(kinds == K.LATENT).nonzero()[:, 0] - 1].sum(), {}


@pytest.mark.parametrize("name", CASES)
def test_rollout_and_engine_have_one_density_and_its_gradients(name, recorded, gloo):
    _, packed, _ = CASES[name]
    folder, _, trajectories, _, expected, _, references = recorded[name]
    engine = helpers.make_engine(folder, packed, treatment=HEAD)
    rows = helpers.infer(engine, batch_of(recorded[name], packed), packed)
    for row, plain, trajectory in zip(rows, expected, trajectories, strict=True):
        acted = trajectory.response_mask() | trajectory.latent_mask
        assert (row - plain)[acted].abs().max() <= 1e-4
        assert (row - trajectory.rollout_log_probs)[acted].abs().max() <= 1e-4
    other = helpers.make_engine(
        folder, packed, treatment=HEAD, seed=1
    )  # negative control: a head of another start
    rows = helpers.infer(other, batch_of(recorded[name], packed), packed)
    pairs = zip(rows, trajectories, strict=True)
    assert (
        max(
            (row - t.rollout_log_probs)[t.latent_mask].abs().max()
            for row, t in pairs
            if len(t.latents)
        )
        > 1e-2
    )
    grads = train(engine, batch_of(recorded[name], packed), density_sum)
    assert NAMES <= grads.keys() and min(grads[name].abs().max() for name in NAMES) > 1e-1
    for parameter, reference in references.items():
        torch.testing.assert_close(
            grads[parameter], reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max())
        )


def test_they_are_trained_sent_saved_and_loaded(recorded, gloo, tmp_path):
    folder, _, trajectories, *_ = recorded["padded"]
    engine = helpers.make_engine(folder, treatment=HEAD)
    before = {name: tensor.clone() for name, tensor in engine.get_per_tensor_param()[0]}
    acts = frozenset({int(K.LATENT)})
    loss = LatentLoss(no_text, TERMS, acts, "token-mean", treatment=TREATMENT)
    grads = train(engine, batch_of(recorded["padded"], False), loss, steps=True)
    assert min(grads[name].abs().max() for name in NAMES) > 1e-4
    sent = {name: tensor.clone() for name, tensor in engine.get_per_tensor_param()[0]}
    assert NAMES <= sent.keys() and all(
        (sent[name] - before[name]).abs().max() > 1e-4 for name in NAMES
    )

    rollout = load_latent_model(folder, treatment=TREATMENT)
    hf = HFRolloutEngine(rollout.model, rollout.mechanism, rollout.eos_ids, treatment=TREATMENT)
    hf.load_weights(sent.items(), policy_version=1)
    torch.testing.assert_close(
        rollout.model.latent_treatment.linear.weight, sent["latent_treatment.linear.weight"]
    )

    engine.save_checkpoint(f"{tmp_path}/step", global_step=1)
    again = helpers.make_engine(folder, treatment=HEAD, seed=7)
    again.load_checkpoint(f"{tmp_path}/step")
    resumed = dict(again.get_per_tensor_param()[0])
    exported = load_latent_model(
        f"{tmp_path}/step/huggingface", treatment=TREATMENT, seed=7
    ).model.state_dict()
    for name in NAMES:
        assert torch.equal(resumed[name], sent[name]) and torch.equal(exported[name], sent[name])
    assert initialisation_notes(TREATMENT, f"{tmp_path}/step/huggingface", 7) == []
    # another treatment, evaluation and SFT read the same folder
    assert not hasattr(load_latent_model(f"{tmp_path}/step/huggingface").model, "latent_treatment")


def test_a_users_own_by_its_import_path(recorded, gloo):
    """Loss and gradient of its parameters are those of a plain model's hidden states."""
    values = {"name": f"{__name__}:Probe", "options": {"target": 2.0, "weight": 0.25}}
    folder, loaded, trajectories, images, *_ = recorded["padded"]
    treatment, terms = parse_treatment(values)
    engine = helpers.make_engine(folder, treatment=values)
    named = dict(engine.get_per_tensor_param()[0])
    weight_1H, bias_1 = named["latent_treatment.weight"], named["latent_treatment.bias"]
    loss = LatentLoss(no_text, terms, frozenset(), "token-mean", treatment=treatment)
    grads = train(engine, batch_of(recorded["padded"], False), loss)

    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    sequences = collate(trajectories, images, adapter, "full", "both")
    with torch.no_grad():
        _, hidden_BTH = replay(adapter, sequences, temperature=helpers.TEMPERATURE)
    rows, columns = sequences.sources(adapter.mechanism)
    is_live_M = torch.tensor([bool(t.response_mask().any()) for t in trajectories])[rows]
    hidden_MH = hidden_BTH[rows, columns][is_live_M]
    errors_M = hidden_MH @ weight_1H[0] + bias_1 - 2.0
    expected_H = 0.25 * 2 * (errors_M[:, None] * hidden_MH).mean(0)
    torch.testing.assert_close(
        grads["latent_treatment.weight"][0], expected_H, rtol=1e-3, atol=1e-4
    )
    assert expected_H.abs().max() > 1e-2 and len(hidden_MH) >= 3


def test_a_checkpoint_without_them_starts_them_from_the_seed_and_says_so(recorded):
    folder = recorded["padded"][0]
    weights = [
        load_latent_model(
            folder, treatment=TREATMENT, seed=seed
        ).model.latent_treatment.linear.weight.detach()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    model, state = load_latent_model(folder).model, torch.get_rng_state()
    attach_treatment(model, TREATMENT, folder, 3)
    assert torch.equal(torch.get_rng_state(), state), (
        "a run's own randomness does not depend on the treatment"
    )
    assert torch.equal(model.latent_treatment.linear.weight, weights[0])
    (note,) = initialisation_notes(TREATMENT, folder, 3)
    assert "start fresh, from seed 3" in note and initialisation_notes(Mask(), folder, 3) == []


def test_the_engine_says_so_too(recorded, gloo):
    with pytest.warns(
        UserWarning, match="GaussianHead.*no parameters of it; they start fresh, from seed 0"
    ):
        helpers.make_engine(recorded["packed"][0], True, treatment=HEAD)


def test_what_is_refused(recorded, gloo, tmp_path):
    folder = recorded["packed"][0]
    with pytest.raises(CheckpointError, match="a treatment without its parameters"):
        loaded = load_latent_model(folder)
        HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids, treatment=TREATMENT)
    shutil.copytree(folder, tmp_path / "partial")
    path = without_manifest(tmp_path / "partial") / "model.safetensors"
    save_file(
        load_file(path) | {"latent_treatment.linear.bias": torch.zeros(1)},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="treatment is another.*linear.bias"):
        load_latent_model(tmp_path / "partial", treatment=TREATMENT)
