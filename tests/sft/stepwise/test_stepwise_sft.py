"""SFT with prompt slots: its loss is the replay's log-prob of the same completion.

Its gradient is the chosen one.
"""

import dataclasses

import pytest
import torch
from latent_cases import build_case, sampling
from sft_cases import png

from grpo_latent.data.formats.stepwise import StepwiseExample
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.sft.stepwise.forward import loss_sums
from grpo_latent.sft.stepwise.rows import StepwiseEncoder, StepwiseRow, collate_rows


def slot_case(name):
    c = build_case(name)
    changes = dict(mechanism="ivt_lr", top_k_image=4) if c.processor else dict(mechanism="coconut")
    mechanism = c.mechanism(steps=2, **changes)
    return c, mechanism, ModelAdapter(c.model, mechanism)


def rollouts(c, mechanism):
    images = [c.images(2, seed=2), c.images(1, seed=1), None] if c.processor else [None] * 3
    requests = [
        c.request(text, image, range(4 * i, 4 * i + 4))
        for i, (text, image) in enumerate(
            zip(("read ? ?", "read red ?", "blue"), images, strict=True)
        )
    ]
    groups = c.engine(mechanism).generate(requests, sampling(20))
    pairs = [
        (t, request.images) for request, group in zip(requests, groups, strict=True) for t in group
    ]
    return [t for t, _ in pairs], [image for _, image in pairs]


@pytest.mark.parametrize(
    "name, gradient", [("qwen2_vl", "cut"), ("qwen3", "cut"), ("qwen3", "bptt")]
)
def test_loss_and_gradient_equal_those_of_replayed_rollouts(name, gradient):
    c, mechanism, adapter = slot_case(name)
    trajectories, images = rollouts(c, mechanism)
    rows = [
        StepwiseRow(t.prompt_ids, (torch.tensor(t.text_ids),), image)
        for t, image in zip(trajectories, images, strict=True)
    ]
    weight = adapter.decoder.layers[0].mlp.up_proj.weight
    sums = loss_sums(adapter, collate_rows(rows, 0), 2, gradient == "cut")
    sums["ce"].backward()
    found, weight.grad = weight.grad, None
    batch = collate(trajectories, images, adapter, "full", "both")
    latents_NH = recompute_latents(adapter, batch, gradient)
    log_probs_BT, _ = replay(adapter, batch.with_latents(latents_NH))
    (-log_probs_BT.sum()).backward()
    assert sums["ce"].item() == pytest.approx(-log_probs_BT.sum().item(), rel=1e-4)
    torch.testing.assert_close(
        found, weight.grad, rtol=1e-3, atol=1e-3 * float(weight.grad.abs().max())
    )


def test_gradient_checkpointing_in_training_keeps_the_cache():
    """transformers drops the cache of a checkpointed layer with no more than a warning."""
    losses = []
    for checkpointing in (False, True):
        c, mechanism, adapter = slot_case("qwen3")
        rows = [
            StepwiseRow(
                c.request("read red ?").prompt_ids, (torch.tensor([12, 13, c.eos_id]),), None
            )
        ]
        c.model.train()
        if checkpointing:
            c.model.gradient_checkpointing_enable()
        losses.append(loss_sums(adapter, collate_rows(rows, 0), 2, False)["ce"].item())
        assert adapter.decoder.layers[0].gradient_checkpointing is checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stages_write_what_is_not_replaced():
    c, mechanism, adapter = slot_case("qwen2_vl")
    content = [{"type": "image"}, {"type": "text", "text": "read red ?"}]
    image = ImageRef("row 1: image", data=png(0))
    steps = ("red 3", "blue 7")
    messages = ({"role": "user", "content": content},)
    example = StepwiseExample(
        messages, (image,), steps, "3", "<answer> 3 </answer>", "test", "row 1"
    )
    encode = StepwiseEncoder(
        tokenizer=c.tokenizer,
        processor=c.processor,
        mechanism=mechanism,
        eos_id=c.eos_id,
        vision_ids=adapter.vision_ids,
        image_token_id=adapter.image_token_id,
        max_length=40,
    )
    row = encode(example)
    texts = [c.tokenizer.decode(ids) for ids in row.response_ids]
    tail = "<answer> 3 </answer> <|im_end|>"
    assert texts == [f"red 3 blue 7 {tail}", f"blue 7 {tail}", tail]
    for stage, length in enumerate((8, 6, 4)):
        batch = collate_rows([row, row], stage)
        assert batch["response_valid"].sum(-1).tolist() == [length] * 2 and batch[
            "image_grid_thw"
        ].shape == (2, 3)
    with pytest.raises(DataError, match="row 1: a reserved token"):
        encode(dataclasses.replace(example, steps=("red <|lvr|>",)))
    with pytest.raises(
        DataError, match="row 1: more slots than image tokens; got 7 slots, 6 image tokens"
    ):
        dataclasses.replace(encode, mechanism=mechanism.replace(steps=7))(example)
    with pytest.raises(DataError, match="row 1: row too long; got 31 positions"):
        dataclasses.replace(encode, max_length=30)(example)


def test_an_adapter_numbers_positions_as_its_mechanism_says_and_slots_need_one():
    c, mechanism, adapter = slot_case("qwen3")
    assert adapter.positions == mechanism.positions == "1d"
    batch = collate_rows([StepwiseRow(torch.tensor([1]), (torch.tensor([2]),), None)], 0)
    with pytest.raises(ConfigError, match="no mechanism says what a latent is"):
        loss_sums(ModelAdapter(c.model), batch, 1, True)
