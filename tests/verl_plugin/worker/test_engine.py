"""The latent engine against plain Hugging Face replays, in one process.

Does not cover: several ranks (test_two_ranks.py), GPUs, flash-attn, LoRA (test_adapters.py).
"""

import engine_helpers as helpers
import pytest
import torch
from PIL import Image
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.trajectory import PositionKind

COCONUT = helpers.SLOTS | dict(mechanism="coconut", top_k_image=0)
CASES = {
    "qwen2.5-vl padded": (tiny.tiny_qwen2_5_vl, False, "full", {}),
    "qwen2.5-vl latents_only": (tiny.tiny_qwen2_5_vl, False, "latents_only", {}),
    "qwen2-vl latents_only": (tiny.tiny_qwen2_vl, False, "latents_only", {}),
    "qwen3-vl padded": (tiny.tiny_qwen3_vl, False, "full", {}),
    "qwen3-vl latents_only": (tiny.tiny_qwen3_vl, False, "latents_only", {}),
    "qwen3 padded": (tiny.tiny_qwen3, False, "full", {}),
    "qwen3 packed": (tiny.tiny_qwen3, True, "full", {}),
    "qwen2-vl slots": (tiny.tiny_qwen2_vl, False, "full", helpers.SLOTS),
    "qwen3 slots packed": (tiny.tiny_qwen3, True, "full", COCONUT),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Makes trajectories and their replays of each case, before verl patches transformers."""
    cases = {}
    for name, (build, _, visibility, changes) in CASES.items():
        folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build, **changes)
        cases[name] = (folder, *helpers.roll_out(folder, visibility))
    return cases


@pytest.mark.parametrize("name", CASES)
def test_log_probs_equal_a_plain_replay(name, recorded, gloo):
    _, packed, visibility, _ = CASES[name]
    folder, loaded, trajectories, images, expected, positions = recorded[name]
    assert (
        sum(len(t.latents) for t in trajectories) >= 3 and len({len(p.T) for p in positions}) > 1
    )
    engine = helpers.make_engine(folder, packed, freeze_vision=True, visibility=visibility)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert helpers.gap(helpers.infer(engine, batch, packed), expected, trajectories) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2.5-vl padded", "qwen3 packed", "qwen2-vl slots"])
def test_without_the_latents_the_log_probs_differ(name, recorded, gloo):
    """Negative control: the comparison above can fail."""
    _, packed, visibility, _ = CASES[name]
    folder, loaded, trajectories, images, expected, positions = recorded[name]
    engine = helpers.make_engine(folder, packed, freeze_vision=True, visibility=visibility)
    zeroed = [replace_latents(t, torch.zeros_like(t.latents)) for t in trajectories]
    batch = helpers.make_batch(
        zeroed, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert helpers.gap(helpers.infer(engine, batch, packed), expected, trajectories) > 1e-2


def test_slots_with_another_numbering_differ(recorded, gloo):
    folder, loaded, trajectories, images, expected, positions = recorded["qwen2-vl slots"]
    assert all(torch.equal(p[0], p[1]) for p in positions), "1-D"
    text_style = [
        helpers.row_positions(ModelAdapter(loaded.model), t, i)
        for t, i in zip(trajectories, images, strict=True)
    ]
    batch = helpers.make_batch(
        trajectories, images, text_style, ModelAdapter(loaded.model, loaded.mechanism)
    )
    engine = helpers.make_engine(folder, freeze_vision=True)
    assert helpers.gap(helpers.infer(engine, batch), expected, trajectories) > 1e-3


def test_visibility_reaches_the_decoder(recorded, gloo):
    """Swapping the images under the recorded latents moves nothing after a span, exactly.

    With one latent a span.
    """
    folder, loaded, _, _, _, _ = recorded["qwen2.5-vl latents_only"]
    _, trajectories, images, _, positions = helpers.roll_out(
        folder, "latents_only", num_prompts=1, group_size=6
    )
    trajectories = [t for t in trajectories if len(t.latents)]
    images, positions = images[: len(trajectories)], positions[: len(trajectories)]
    assert trajectories
    single = [first_latent_only(t) for t in trajectories]
    positions = [
        p[:, : len(t.prompt_ids) + len(t.token_ids)]
        for p, t in zip(positions, single, strict=True)
    ]
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    swapped = [type(i)(torch.randn_like(i.pixel_values), i.image_grid_thw) for i in images]
    for in_head in (True, False):
        engine = helpers.make_engine(folder, visibility="latents_only", score_in_head=in_head)
        own, other = (
            helpers.infer(engine, helpers.make_batch(single, i, positions, adapter), micro=1)
            for i in (images, swapped)
        )
        for trajectory, a, b in zip(single, own, other, strict=True):
            after = int((trajectory.kinds == PositionKind.FORCED).nonzero()[0]) + 1
            acted = trajectory.response_mask()
            assert torch.equal(a[after:][acted[after:]], b[after:][acted[after:]])
            # what predicts the latent's placeholder is all that reads the image, and only verl's
            # way scores a placeholder
            assert in_head or not torch.equal(a[:after], b[:after])


def test_placeholder_ids_change_nothing(recorded, gloo):
    """Any id at latent positions leaves every log-prob as it was.

    Image placeholders, EOS and the start token are tried.
    """
    folder, loaded, trajectories, images, _, positions = recorded["qwen2.5-vl padded"]
    engine, adapter = helpers.make_engine(folder), ModelAdapter(loaded.model, loaded.mechanism)
    before = helpers.infer(engine, helpers.make_batch(trajectories, images, positions, adapter))
    for token_id in (adapter.image_token_id, loaded.eos_ids[0], loaded.mechanism.start_id):
        changed = [replace_placeholders(t, token_id) for t in trajectories]
        after = helpers.infer(engine, helpers.make_batch(changed, images, positions, adapter))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_equal_lengths_and_text_only_rows(recorded, gloo):
    """Two bugs of verl 0.9.1: rows of equal length, and no images for a vision model."""
    folder, loaded, trajectories, images, expected, positions = recorded["qwen2.5-vl padded"]
    engine, adapter = helpers.make_engine(folder), ModelAdapter(loaded.model, loaded.mechanism)
    batch = helpers.make_batch(trajectories[:1] * 2, images[:1] * 2, positions[:1] * 2, adapter)
    rows = torch.stack([positions[0], positions[0]])
    batch["position_ids"] = torch.nested.as_nested_tensor(
        list(rows), layout=torch.jagged
    )  # as it comes out of TransferQueue
    assert (
        helpers.gap(helpers.infer(engine, batch), expected[:1] * 2, trajectories[:1] * 2) <= 1e-5
    )

    _, text_only, _, _, _ = helpers.roll_out(folder, num_prompts=1)
    prompt = loaded.tokenizer("<|im_start|>read red ?<|im_end|>", return_tensors="pt").input_ids[0]
    text_only = [replace_prompt(t, prompt) for t in text_only]
    positions = [torch.arange(len(prompt) + len(t.token_ids)) for t in text_only]
    log_probs = helpers.infer(
        engine, helpers.make_batch(text_only, [None] * 2, positions, adapter)
    )
    assert all(torch.isfinite(row).all() for row in log_probs)


def test_mismatches_raise(recorded, gloo):
    folder, loaded, trajectories, images, _, positions = recorded["qwen2.5-vl padded"]
    engine, adapter = helpers.make_engine(folder), ModelAdapter(loaded.model, loaded.mechanism)
    batch = helpers.make_batch(trajectories, images, positions, adapter)
    rows = [t.latents[:-1] if len(t.latents) else t.latents for t in trajectories]
    batch["latent_embeds"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(LatentMismatchError, match="row 0 .* 3 latents, 2 vectors"):
        helpers.infer(engine, batch)
    batch = helpers.make_batch(trajectories, images, positions, adapter)
    del batch["position_kinds"]
    with pytest.raises(LatentMismatchError, match="without recorded latents"):
        helpers.infer(engine, batch)


def test_layouts_that_cannot_work_are_refused(recorded, gloo):
    with pytest.raises(ConfigError, match="latents_only needs the padded layout"):
        helpers.make_engine(recorded["qwen3 packed"][0], packed=True, visibility="latents_only")
    with pytest.raises(ConfigError, match="needs flash-attn"):
        helpers.make_engine(recorded["qwen2.5-vl padded"][0], packed=True)


def test_reference_engine_builds_on_cpu(recorded, gloo):
    folder, loaded, trajectories, images, expected, positions = recorded["qwen2.5-vl padded"]
    engine = helpers.make_engine(folder, forward_only=True)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert helpers.gap(helpers.infer(engine, batch), expected, trajectories) <= 1e-5


def test_bf16_is_close(recorded, gloo):
    folder, loaded, trajectories, images, expected, positions = recorded["qwen2.5-vl latents_only"]
    engine = helpers.make_engine(folder, visibility="latents_only", dtype="bf16")
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert 0 < helpers.gap(helpers.infer(engine, batch), expected, trajectories) < 0.5


def gradients(engine, batch, micro):
    tu.assign_non_tensor(
        batch,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro,
        use_fused_kernels=False,
    )

    def loss(model_output, data, dp_group=None):
        return -model_output["log_probs"].values().mean(), {}

    with engine.train_mode(disable_auto_offload=True):
        engine.forward_backward_batch(batch, loss)
        return {
            n: p.grad.full_tensor().clone()
            for n, p in engine.module.named_parameters()
            if p.grad is not None
        }


def test_sharing_images_changes_no_gradient(recorded, gloo):
    """A group of four shares its image: encoded once, with the gradient of four encodings."""
    folder, loaded, *_ = recorded["qwen2.5-vl padded"]
    _, trajectories, images, _, positions = helpers.roll_out(folder, num_prompts=2, group_size=2)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    shared, separate = (
        helpers.make_engine(folder, micro=4, share_images=on, share_prompt=False)
        for on in (True, False)
    )
    batches = [helpers.make_batch(trajectories, images, positions, adapter) for _ in range(2)]
    first, second = gradients(shared, batches[0], 4), gradients(separate, batches[1], 4)
    assert (shared.vision_cache.num_encoded, shared.vision_cache.num_requested) == (2, 4)
    assert separate.vision_cache is None
    assert first.keys() == second.keys() and any("visual" in name for name in first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_freezing_reaches_tower_and_merger(recorded, gloo):
    folder, loaded, trajectories, images, _, positions = recorded["qwen2.5-vl padded"]
    engine = helpers.make_engine(folder, freeze_vision=True)
    grads = gradients(
        engine,
        helpers.make_batch(
            trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
        ),
        2,
    )
    assert grads and not any("visual" in name for name in grads)
    names = {name for name, _ in engine.module.named_parameters() if "visual" in name}
    assert any("merger" in name for name in names)


@pytest.mark.parametrize("head", ["mlp", "glu"])
def test_the_head_is_loaded_sent_and_saved(head, tmp_path, gloo):
    """A head is in the replay, and checkpoint and weight stream carry it, to the bit."""
    folder = helpers.make_checkpoint(tmp_path / "in", head=head)
    loaded, trajectories, images, expected, positions = helpers.roll_out(folder)
    engine = helpers.make_engine(folder)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert helpers.gap(helpers.infer(engine, batch), expected, trajectories) <= 1e-5
    own = loaded.model.state_dict()
    sent = dict(engine.get_per_tensor_param()[0])
    assert sent.keys() == own.keys() and any(name.startswith("lvr_head.") for name in sent)
    assert all(torch.equal(sent[name], own[name]) for name in own)

    engine.save_checkpoint(str(tmp_path / "out"), global_step=1)
    again = load_latent_model(tmp_path / "out" / "huggingface")
    assert (
        again.mechanism == loaded.mechanism
        and again.processor is not None
        and again.eos_ids == loaded.eos_ids
    )
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.model.state_dict().items())
    inputs = [
        p(text=["<|image_pad|>"], images=[Image.new("RGB", (28, 28))])
        for p in (again.processor, loaded.processor)
    ]
    assert torch.equal(*(torch.as_tensor(i["pixel_values"]) for i in inputs))


def replace_latents(trajectory, latents):
    from dataclasses import replace

    return replace(trajectory, latents=latents)


def replace_placeholders(trajectory, token_id):
    from dataclasses import replace

    return replace(
        trajectory, token_ids=torch.where(trajectory.latent_mask, token_id, trajectory.token_ids)
    )


def replace_prompt(trajectory, prompt_ids):
    from dataclasses import replace

    return replace(trajectory, prompt_ids=prompt_ids)


def first_latent_only(trajectory):
    """The same completion with spans of one latent, from START to the end of the text."""
    from dataclasses import replace

    kinds = trajectory.kinds
    follows_latent = torch.nn.functional.pad(kinds[:-1] == PositionKind.LATENT, (1, 0))
    keep = ~((kinds == PositionKind.LATENT) & follows_latent)
    is_kept_latent = keep[kinds == PositionKind.LATENT]
    fields = {
        n: getattr(trajectory, n)[keep]
        for n in ("token_ids", "kinds", "rollout_log_probs", "sampling_log_probs")
    }
    return replace(trajectory, latents=trajectory.latents[is_kept_latent], **fields)
