"""Chameleon as a backbone of IVT-LR: discrete images, slots, rollout = replay, SFT.

A plain forward of Hugging Face's is the reference for what stands at image positions. Not covered:
published weights, the verl plug-in (which refuses it).
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_cases import Case, sampling
from PIL import Image
from slot_cases import check_replay

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import RolloutError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.sft.stepwise.forward import loss_sums
from grpo_latent.sft.stepwise.rows import StepwiseRow, collate_rows
from grpo_latent.trajectory import PositionKind as K

NUM_TOKENS, TOP_K = 16, 4
SLOTS = dict(mechanism="ivt_lr", steps=2, top_k_image=TOP_K)


@functools.cache
def chameleon() -> Case:
    """Builds a tiny Chameleon whose log-probs a wrong vector moves by far more than 1e-4.

    Its weights are scaled up, so that attention is far from uniform.
    """
    model, tokenizer, processor = tiny.tiny_chameleon(("read", "red", "blue", "?"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vqmodel" not in name and parameter.ndim >= 2:
                parameter.mul_(10.0)
        model.model.vqmodel.quantize.embedding.weight.mul_(
            0.01
        )  # or all patches are nearest to one code
    case = Case("chameleon", model, tokenizer, processor, ModelAdapter(model))
    return replace(case, adapter=ModelAdapter(model, case.mechanism(**SLOTS)))


def prompt(c, text, num_images, seed=0):
    rng = np.random.default_rng(seed)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        for _ in range(num_images)
    ]
    content = [{"type": "text", "text": text}, *[{"type": "image"}] * num_images]
    return encode_prompt(
        c.tokenizer, c.processor, [{"role": "user", "content": content}], pictures, "test"
    )


@functools.cache
def recorded():
    c = chameleon()
    prompts = [prompt(c, "read ? ?", 2, 1), prompt(c, "read red ?", 1, 2), prompt(c, "blue", 0)]
    requests = [
        RolloutRequest(p.ids, list(range(4 * i, 4 * i + 4)), p.images, steps=5 if i == 1 else None)
        for i, p in enumerate(prompts)
    ]
    engine = c.engine(c.mechanism(**SLOTS), sampled=("<|im_end|>", "<answer>", "3", "7"))
    return requests, engine.generate(requests, sampling(28, temperature=2.0)), engine


@torch.no_grad()
def test_the_adapters_forward_is_hugging_faces():
    """Logits too: Chameleon gives its image tokens no probability."""
    c = chameleon()
    p = prompt(c, "read red ?", 2)
    ids_1T, mask_1T = p.ids[None], torch.ones_like(p.ids)[None]
    hidden = c.adapter.forward_hidden(ids_1T, mask_1T, mask_1T.cumsum(-1) - 1, p.images)
    expected = c.model(input_ids=ids_1T, pixel_values=p.images.pixel_values).logits
    assert torch.equal(c.adapter.logits(hidden), expected)
    features = c.model.get_image_features(p.images.pixel_values, return_dict=True).pooler_output
    assert torch.equal(c.adapter.encode_images(p.images), features.flatten(0, 1))
    assert len(features.flatten(0, 1).unique(dim=0)) > 4, (
        "one code everywhere would hide a wrong place"
    )
    assert p.images.image_grid_thw.tolist() == [[1, 4, 4]] * 2
    assert int((p.ids == c.adapter.image_token_id).sum()) == 2 * NUM_TOKENS
    kinds = c.adapter.prompt_kinds(p.ids)
    assert int((kinds == K.VISION).sum()) == 2 * (NUM_TOKENS + 2), "delimiters too"


@torch.no_grad()
def test_rollout_equals_replay_and_recompute():
    requests, groups, engine = recorded()
    check_replay(requests, groups, engine, 2.0)
    for request, group in zip(requests, groups, strict=True):
        for t in group if request.images is not None else []:
            # what slots are fed is what stands at the image positions that they chose
            is_selected_N = t.kinds[t.latent_mask] == K.SELECTED
            chosen_SH = engine.adapter.encode_images(request.images)[t.selected_idx]
            assert torch.equal(t.latents[is_selected_N], chosen_SH)


def test_slots_take_what_is_left_and_the_policy_never_draws_an_image_token():
    c, (_, groups, _) = chameleon(), recorded()
    counts = [int((group[0].kinds == K.SELECTED).sum()) for group in groups]
    assert counts == [2 * TOP_K, NUM_TOKENS, 0], "five slots of four, and 16 image tokens"
    image_ids = set(c.adapter.backbone.unpredicted_ids)
    assert not any(image_ids & set(t.text_ids) for group in groups for t in group)


def test_sft_has_the_replays_loss_and_a_gradient():
    requests, groups, engine = recorded()
    pairs = [
        (t, r.images)
        for r, group in zip(requests, groups, strict=True)
        for t in group
        if r.steps is None
    ]
    rows = [StepwiseRow(t.prompt_ids, (torch.tensor(t.text_ids),), image) for t, image in pairs]
    sums = loss_sums(engine.adapter, collate_rows(rows, 0), 2, True)
    with torch.no_grad():
        batch = collate(
            [t for t, _ in pairs], [image for _, image in pairs], engine.adapter, "full", "both"
        )
        log_probs_BT, _ = replay(engine.adapter, batch)
    assert sums["ce"].item() == pytest.approx(-log_probs_BT.sum().item(), rel=1e-4)
    weight = engine.adapter.decoder.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(sums["ce"], weight)
    assert float(gradient.abs().max()) > 0


def test_a_folder_loads_with_its_processor(tmp_path):
    c = chameleon()
    save_latent_model(tmp_path, c.model, c.tokenizer, c.processor, c.mechanism(**SLOTS))
    loaded = load_latent_model(tmp_path)
    own, again = (
        prompt(c, "read red ?", 1),
        prompt(Case("", loaded.model, loaded.tokenizer, loaded.processor, None), "read red ?", 1),
    )
    assert torch.equal(own.ids, again.ids) and torch.equal(
        own.images.pixel_values, again.images.pixel_values
    )
    assert loaded.mechanism.top_k_image == TOP_K


def test_images_that_do_not_fit_are_errors():
    c = chameleon()
    p = prompt(c, "read red ?", 2)
    one = ImageInputs(p.images.pixel_values[:1], p.images.image_grid_thw[:1])
    with pytest.raises(RolloutError, match="32 placeholders; expected 16"):
        c.adapter.check_prompt(p.ids, one, "row 1")
    with pytest.raises(RolloutError, match="pixels do not fit the image grid"):
        c.adapter.check_prompt(
            p.ids, ImageInputs(p.images.pixel_values[:1], p.images.image_grid_thw), "row 1"
        )
