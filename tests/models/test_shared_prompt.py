"""A prompt that is run once for its group gives what running it in each row gives.

Log-probs, hidden states and gradients are compared in whole models, the rule in matrices; that
each position of a prompt is run once is counted.

Does not cover: verl's forward (test_shared_prompt_engine.py), FlexAttention's kernels and its
backward, which need a GPU.
"""

import dataclasses
import functools

import pytest
import torch
from latent_cases import TEXT_NAMES, build_case, sampling
from torch.nn.attention.flex_attention import flex_attention

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models.groups import check_groups
from grpo_latent.models.recompute import latents_by_passes
from grpo_latent.models.replay import replay, replay_hidden
from grpo_latent.models.sequences import collate
from grpo_latent.models.shared_prompt import SharedPrompt
from grpo_latent.models.shared_rows import SharedRows
from grpo_latent.models.visibility import attention_bias
from grpo_latent.trajectory import PositionKind as K

TEMPERATURE = 2.0
# model, visibility, settings of the mechanism
CASES = {
    "qwen2_5_vl": ("qwen2_5_vl", "full", {}),
    "qwen2_5_vl latents_only": ("qwen2_5_vl", "latents_only", {}),
    "qwen3_vl latents_only": ("qwen3_vl", "latents_only", {}),
    "qwen3": ("qwen3", "full", {}),
    "slots": ("qwen2_vl", "full", dict(mechanism="ivt_lr", steps=2, top_k_image=2)),
}


@functools.cache
def recorded(name):
    """Trajectories of three prompts in mixed order, one of them alone, with their images."""
    model, visibility, settings = CASES[name]
    c = build_case(model)
    if model in TEXT_NAMES:
        requests = [
            c.request("read ?", seeds=range(4), group_id="a"),
            c.request("? red ? blue ?", seeds=range(4, 7), group_id="b"),
            c.request("red", seeds=[9], group_id="c"),
        ]
    else:
        requests = [
            c.request("read red ?", c.images(1, seed=1), range(4), group_id="a"),
            c.request("read ?", c.images(2, seed=2), range(4, 7), image_first=True, group_id="b"),
            c.request("read blue ?", c.images(1, seed=3), [9], group_id="c"),
        ]
    settings = settings or dict(visibility=visibility)
    mechanism = c.mechanism(**settings)
    engine = c.engine(mechanism)
    groups = engine.generate(requests, sampling(16, temperature=TEMPERATURE))
    pairs = [
        (t, request.images) for request, group in zip(requests, groups, strict=True) for t in group
    ]
    pairs = [pairs[i] for i in (0, 4, 1, 7, 5, 2, 6, 3)]
    assert len({len(t.token_ids) for t, _ in pairs}) > 1 and sum(len(t.latents) for t, _ in pairs)
    return dataclasses.replace(c, adapter=engine.adapter), *map(list, zip(*pairs, strict=True))


def batch_of(name, shares, padding_side="right"):
    c, trajectories, images = recorded(name)
    return c, collate(
        trajectories, images, c.adapter, CASES[name][1], padding_side, shares_prompts=shares
    )


def gradients(c, loss):
    c.model.zero_grad()
    loss.backward()
    named = c.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("padding_side", ["right", "left", "both"])
@pytest.mark.parametrize("name", CASES)
def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(name, padding_side):
    found = []
    for shares in (False, True):
        c, batch = batch_of(name, shares, padding_side)
        log_probs_BT, hidden_BTH = replay(c.adapter, batch, temperature=TEMPERATURE)
        found.append((log_probs_BT, hidden_BTH[batch.valid_BT]))
        found[-1] += (gradients(c, log_probs_BT.sum() / batch.action_mask_BT().sum()),)
    (log_probs_BT, hidden_NH, grads), (shared_BT, shared_NH, shared_grads) = found
    assert (log_probs_BT != 0).sum() > 20
    torch.testing.assert_close(shared_BT, log_probs_BT, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared_NH, hidden_NH, rtol=0, atol=2e-5)  # of size 5
    assert grads.keys() == shared_grads.keys() and len(grads) > 20
    for parameter, grad in grads.items():
        torch.testing.assert_close(shared_grads[parameter], grad, rtol=0, atol=1e-5, msg=parameter)
    assert max(grad.abs().max() for grad in grads.values()) > 1e-2


@pytest.mark.parametrize("name", ["qwen2_5_vl latents_only", "qwen3"])
def test_layers_see_each_prompt_once_and_no_padding(name):
    c, batch = batch_of(name, True)
    lengths = []
    hook = c.adapter.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(tuple(args[0].shape[:2]))
    )
    replay_hidden(c.adapter, batch)
    hook.remove()
    _, trajectories, _ = recorded(name)
    prompts = {t.group_id: len(t.prompt_ids) for t in trajectories}
    completions = sum(len(t.token_ids) for t in trajectories)
    assert lengths == [(1, sum(prompts.values()) + completions)]


def test_completions_do_not_see_each_other():
    """Another completion beside it leaves a row's log-probs what they were, to the bit."""
    c, batch = batch_of("qwen2_5_vl", True)
    changed_ids = batch.input_ids_BT.clone()
    is_text_T = batch.kinds_BT[0] == K.TEXT
    changed_ids[0, is_text_T] = (changed_ids[0, is_text_T] + 1) % 20 + 10
    other = dataclasses.replace(
        batch, input_ids_BT=changed_ids, latents_NH=batch.latents_NH.clone()
    )
    num_own = int(batch.recorded_mask_BT[0].sum())
    other.latents_NH[:num_own] += 1.0
    with torch.no_grad():
        before_BT, after_BT = (
            replay(c.adapter, b, temperature=TEMPERATURE)[0] for b in (batch, other)
        )
    assert not torch.equal(before_BT[0], after_BT[0])
    assert torch.equal(before_BT[1:], after_BT[1:])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl latents_only"])
def test_checkpointed_layers_run_again_in_the_backward(name):
    """When the forward is over, and with it what its hooks knew."""
    c, batch = batch_of(name, True)
    plain = gradients(c, replay(c.adapter, batch, temperature=TEMPERATURE)[0].mean())
    c.model.train()
    c.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        again = gradients(c, replay(c.adapter, batch, temperature=TEMPERATURE)[0].mean())
    finally:
        c.model.gradient_checkpointing_disable()
        c.model.eval()
    for parameter, grad in plain.items():
        torch.testing.assert_close(again[parameter], grad, rtol=0, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl latents_only", "qwen3"])
def test_latents_are_recomputed_through_a_shared_prompt(name):
    """By forwards over the first columns, which end in the middle of some rows' spans."""
    c, batch = batch_of(name, True)
    made = []
    for sequences in (dataclasses.replace(batch, groups=None), batch):
        shared = SharedPrompt.install(c.model)
        mechanism = c.adapter.mechanism
        num_passes = max(int((row == K.LATENT).sum()) for row in batch.kinds_BT)

        def make(first, rows_M, columns_M):
            return c.adapter.make(replay_hidden(c.adapter, first)[rows_M, columns_M])

        with shared.share(sequences) if sequences.groups else torch.enable_grad():
            latents_NH = latents_by_passes(sequences, mechanism, num_passes, "bptt", make)
        made.append((latents_NH, gradients(c, latents_NH.square().mean())))
    (own_NH, own), (shared_NH, shared_grads) = made
    torch.testing.assert_close(shared_NH, own_NH, rtol=0, atol=1e-5)
    for parameter, grad in own.items():
        torch.testing.assert_close(shared_grads[parameter], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen2_5_vl latents_only", "qwen3_vl latents_only"]
)
def test_the_packed_rule_is_the_matrix_of_each_row(name):
    """Pair by pair: what FlexAttention asks is what the additive matrix of a row alone says."""
    _, batch = batch_of(name, True)
    rows = SharedRows(batch)
    length = len(rows.index_S)
    index_S = torch.arange(length)
    sees_SS = rows.packed_visibility.mask_mod(None, None, index_S[:, None], index_S)
    expected_SS = torch.zeros_like(sees_SS)
    allowed_BTT = attention_bias(batch.kinds_BT, batch.valid_BT, batch.visibility, torch.float32)[
        :, 0
    ].eq(0)
    for row, (allowed_TT, valid_T) in enumerate(zip(allowed_BTT, batch.valid_BT, strict=True)):
        places = rows.place_BT[row][valid_T]
        expected_SS[places[:, None], places] = allowed_TT[valid_T][:, valid_T]
    assert torch.equal(sees_SS, expected_SS)
    mask = rows.packed_visibility.block_mask
    assert mask.shape == (1, 1, length, length)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl latents_only"])
def test_flex_attention_is_the_two_blocks(name):
    """Its forward without a kernel, which is all that a CPU can run of it."""
    rows = SharedRows(batch_of(name, True)[1])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(rows.index_S), 16) for heads in (4, 2, 2))
    attended = flex_attention(
        query, key, value, block_mask=rows.packed_visibility.block_mask, enable_gqa=True
    )
    torch.testing.assert_close(
        rows.attend(query, key, value, 0.0, None), attended.transpose(1, 2), rtol=0, atol=1e-5
    )


def test_groups_whose_prompts_differ_are_refused():
    prompts = [torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2, 3])]
    check_groups(prompts, (4, 4, 7), "here")
    with pytest.raises(LatentMismatchError, match="here, rows 0 and 2, group 4"):
        check_groups(prompts, (4, 4, 4), "here")


def test_another_attention_is_refused():
    c = build_case("qwen3")
    c.model.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="got eager"):
        SharedPrompt.install(c.model)
