"""LoRA in the latent engine, on one rank: what trains, what rollouts get, the reference, the export.

Several ranks, and resume: test_reshard.py. Through the trainer: trainer/test_adapter_training.py.
"""

import engine_helpers as helpers
import pytest
import torch
from safetensors.torch import load_file

from grpo_latent.errors import ConfigError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import copy_weights, load_latent_model
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.verl_plugin.worker.adapters import full_tensors

RANK, ALPHA = 4, 16
LORA = dict(lora_rank=RANK, lora_alpha=ALPHA)
BPTT = {"name": "recompute", "recompute": {"gradient": "bptt"}}
HEAD = {"name": "gaussian_head", "gaussian_head": {"sigma": 0.5}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An LVR model with a head, its trajectories and their replays, before verl patches classes."""
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model") / "model", head="mlp")
    return folder, *helpers.roll_out(folder)


def batch_of(recorded):
    _, loaded, trajectories, images, _, positions = recorded
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    return helpers.make_batch(trajectories, images, positions, adapter)


def own_weights(engine):
    return {name: tensor.clone() for name, tensor in full_tensors(engine.module.state_dict())}


def sent_weights(engine):
    return {name: tensor.clone() for name, tensor in engine.get_per_tensor_param()[0]}


@torch.no_grad()
def move_adapters(engine):
    """B is 0 at first, which would merge to nothing."""
    torch.manual_seed(1)
    for name, parameter in engine.module.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))


def train(engine, recorded, num_steps=1):
    """Moves log-probs up; returns the largest |gradient| of each parameter, last step."""

    def loss(model_output, data, dp_group=None):
        return -model_output["log_probs"].values().mean(), {}

    for _ in range(num_steps):
        batch = helpers.lay_out(batch_of(recorded))
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            output = engine.forward_backward_batch(batch, loss)
            gradients = {
                name: parameter.grad.full_tensor().abs().max().item()
                for name, parameter in engine.module.named_parameters()
                if parameter.grad is not None
            }
            engine.optimizer_step()
    return gradients, output


def parts_of(names):
    """What of a model the names belong to."""
    return {
        "adapter" if ".lora_" in name else name.removeprefix("base_model.model.").partition(".")[0]
        for name in names
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_trains": []}, {"adapter"}),
        ({}, {"adapter", "lvr_head"}),
        ({"lora_trains": ["latents", "lm_head"]}, {"adapter", "lvr_head", "lm_head"}),
        ({"lora_trains": [], "treatment": HEAD}, {"adapter", "latent_treatment"}),
    ],
    ids=["adapters alone", "default", "lm_head, too", "a treatment's own"],
)
def test_what_trains_is_chosen(options, expected, recorded, gloo):
    engine = helpers.make_engine(recorded[0], lora=LORA, **options)
    trained = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    assert parts_of(trained) == expected
    adapted = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    assert len(adapted) == 2 * 7, "each linear layer of two decoder layers, none of the tower"
    assert all(".language_model.layers." in name for name in adapted)


def test_a_gradient_reaches_what_trains_and_nothing_else(recorded, gloo):
    """Through recomputed latents, since recorded ones give the head none."""
    engine = helpers.make_engine(recorded[0], lora=LORA, treatment=BPTT, lr=1e-3)
    before = own_weights(engine)
    gradients, _ = train(engine, recorded)
    assert parts_of(gradients) == {"adapter", "lvr_head"}
    assert gradients["base_model.model.lvr_head.mlp.2.weight"] > 1e-4
    after = own_weights(engine)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert parts_of(moved) == {"adapter", "lvr_head"}


def test_the_gradient_at_latents_is_measured_although_embeddings_are_frozen(recorded, gloo):
    gradients, output = train(helpers.make_engine(recorded[0], lora=LORA), recorded)
    assert parts_of(gradients) == {"adapter"}, "recorded latents give the head none"
    assert max(output["metrics"]["latent_grad_norm"]) > 0


@pytest.mark.parametrize(
    ("modules", "last_names"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.layers\.1\..*\.(q_proj|down_proj)", {"q_proj", "down_proj"}),
    ],
    ids=["names", "pattern"],
)
def test_target_modules_are_names_or_a_pattern(modules, last_names, recorded, gloo):
    engine = helpers.make_engine(recorded[0], lora=LORA | {"target_modules": modules})
    names = {n.partition(".lora_")[0] for n, _ in engine.module.named_parameters() if "lora_" in n}
    assert {name.split(".")[-1] for name in names} == last_names


@pytest.mark.parametrize("modules", [["q_proj", "k_porj"], ["qkv"], "visual.*", ["lm_head"]])
def test_layers_that_the_decoder_has_not_are_refused(modules, recorded, gloo):
    with pytest.raises(ConfigError, match="target_modules: no such linear layer"):
        helpers.make_engine(recorded[0], lora=LORA | {"target_modules": modules})


def test_excluded_modules_get_none(recorded, gloo):
    lora = LORA | {"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}
    engine = helpers.make_engine(recorded[0], lora=lora)
    trained = [n for n, p in engine.module.named_parameters() if p.requires_grad and ".lora_" in n]
    assert len(trained) == 2 * 2 * 4 and not any(".mlp." in name for name in trained)


@pytest.mark.parametrize("build", [tiny.tiny_qwen3, tiny.tiny_qwen2_5_vl], ids=["text", "vision"])
def test_rollouts_get_merged_weights_and_the_module_keeps_its_own(build, tmp_path, gloo):
    """W + scaling · B A under the names of the plain model."""
    folder = helpers.make_checkpoint(tmp_path / "in", build, head="mlp")
    engine = helpers.make_engine(folder, lora=LORA)
    move_adapters(engine)
    before = own_weights(engine)
    plain = {n: f"base_model.model.{n}" for n in load_latent_model(folder).model.state_dict()}
    sent = sent_weights(engine)
    assert sent.keys() == plain.keys()
    num_adapted = 0
    for name, tensor in sent.items():
        layer = plain[name].removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in before:
            source = plain[name]
            if source not in before:  # a bias of an adapted layer
                source = source.replace(".bias", ".base_layer.bias")
            assert torch.equal(tensor, before[source]), name
            continue
        a, b = (before[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        merged = before[f"{layer}.base_layer.weight"] + ALPHA / RANK * b @ a
        torch.testing.assert_close(tensor, merged, rtol=1e-5, atol=1e-5)
        num_adapted += 1
    assert num_adapted == 2 * 7
    after = own_weights(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rollout_and_replay_agree_as_without_adapters(recorded, gloo):
    """Merged weights in engine hf, adapters in the trained model: one policy."""
    folder = recorded[0]
    engine = helpers.make_engine(folder, lora=LORA)
    move_adapters(engine)
    loaded = load_latent_model(folder)
    copy_weights(loaded.model, engine.get_per_tensor_param()[0], "the actor")
    rollout = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    requests = helpers.make_requests(loaded, seed=3)
    params = SamplingParams(max_new_tokens=14, temperature=helpers.TEMPERATURE)
    groups = rollout.generate(requests, params)
    trajectories = [t for group in groups for t in group]
    images = [r.images for r, group in zip(requests, groups, strict=True) for _ in group]
    pairs = zip(trajectories, images, strict=True)
    positions = [helpers.row_positions(rollout.adapter, t, image) for t, image in pairs]
    assert any(t.latent_mask.any() for t in trajectories)
    batch = helpers.make_batch(trajectories, images, positions, rollout.adapter)
    sampled = [t.rollout_log_probs for t in trajectories]
    assert helpers.gap(helpers.infer(engine, batch), sampled, trajectories) <= 1e-4
    with engine.disable_adapter():
        start = helpers.infer(engine, batch)
    assert helpers.gap(start, sampled, trajectories) > 1e-2, "the adapters act"


@pytest.mark.parametrize("reshards", [True, False])
def test_the_reference_is_the_model_as_the_run_began(reshards, recorded, gloo):
    """Although lm_head and the latent head have moved, and FSDP may keep what it has gathered."""
    folder, _, trajectories, _, expected, _ = recorded
    options = dict(lora_trains=["latents", "lm_head"], treatment=BPTT)
    engine = helpers.make_engine(folder, lora=LORA, lr=1e-2, reshards=reshards, **options)
    train(engine, recorded, num_steps=2)
    trained = own_weights(engine)
    moved = helpers.infer(engine, batch_of(recorded))
    assert helpers.gap(moved, expected, trajectories) > 1e-2
    with engine.disable_adapter():
        reference = helpers.infer(engine, batch_of(recorded))
    assert helpers.gap(reference, expected, trajectories) <= 1e-5
    again = helpers.infer(engine, batch_of(recorded))
    assert all(torch.equal(a, b) for a, b in zip(again, moved, strict=True))
    after = own_weights(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in trained.items())
    start = load_latent_model(folder).model.state_dict()
    for name in ("lm_head.weight", "lvr_head.mlp.2.weight"):
        assert not torch.equal(after[f"base_model.model.{name}"], start[name])


def test_saved_resumed_exactly_and_exported_plain(recorded, gloo, tmp_path):
    folder = recorded[0]
    options = dict(lora=LORA, treatment=BPTT, lora_trains=["latents", "lm_head"], lr=1e-3)
    engine = helpers.make_engine(folder, **options)
    train(engine, recorded, num_steps=2)
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=2)
    weights, sent = own_weights(engine), sent_weights(engine)

    exported = load_latent_model(tmp_path / "actor" / "huggingface")
    state = exported.model.state_dict()
    assert state.keys() == sent.keys() and exported.mechanism == engine.mechanism
    assert all(torch.equal(state[name], tensor) for name, tensor in sent.items())
    names = load_file(tmp_path / "actor" / "huggingface" / "model.safetensors").keys()
    assert not any("lora" in name or "base_" in name for name in names)

    again = helpers.make_engine(folder, **options | {"seed": 5})
    assert any(not torch.equal(own_weights(again)[name], weights[name]) for name in weights)
    again.load_checkpoint(str(tmp_path / "actor"))
    assert all(torch.equal(own_weights(again)[name], tensor) for name, tensor in weights.items())
    losses = [train(e, recorded)[1]["loss"] for e in (engine, again)]
    assert losses[0] == losses[1]
    after, resumed = own_weights(engine), own_weights(again)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())
    assert any(not torch.equal(after[name], weights[name]) for name in weights)


def test_adapters_begin_from_the_runs_seed_alone(recorded, gloo):
    engines = []
    for draws in (0, 7):
        torch.manual_seed(draws)
        engines.append(helpers.make_engine(recorded[0], lora=LORA, seed=2))
    first, second = (own_weights(engine) for engine in engines)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
