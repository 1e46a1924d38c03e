"""Replay and recompute against uncached single-row forwards and the rollout.

Placeholder ids change nothing in either.
"""

import dataclasses
import functools

import pytest
import slow_reading
import torch
from latent_cases import ALL_NAMES, TEXT_NAMES, build_case, case, norms_in_double, sampling

from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay, replay_hidden, token_log_probs
from grpo_latent.models.sequences import collate
from grpo_latent.trajectory import PositionKind as K

TEMPERATURE = 2.0
VISIBILITIES = ("full", "latents_only")


@functools.cache
def recorded(name, visibility):
    """Trajectories of several prompts with the images of each: two images, one, none.

    Spans at any offset, or none.
    """
    c = case(name)
    if name in TEXT_NAMES:
        texts = ("read ?", "? red ? blue ?", "red")
        requests = [
            c.request(text, seeds=range(7 * idx, 7 * idx + 7)) for idx, text in enumerate(texts)
        ]
    else:
        requests = [
            c.request("read red ?", c.images(1, seed=1), range(5)),
            c.request("read ? ? ?", c.images(2, seed=2), range(5, 10), image_first=True),
            c.request("read blue ?", None, range(10, 15)),
        ]
    groups = c.engine(c.mechanism(visibility=visibility)).generate(
        requests, sampling(16, temperature=TEMPERATURE)
    )
    pairs = [
        (t, request.images) for request, group in zip(requests, groups, strict=True) for t in group
    ]
    spans = [len(t.spans) for t, _ in pairs]
    assert min(spans) == 0 and max(spans) >= 2, "rows without a span and rows with several"
    return [t for t, _ in pairs], [images for _, images in pairs]


def completion_values(trajectories, values_BT, batch, prompts_valid=True):
    """Rows of label-aligned values cut back to each completion."""
    rows = []
    for row, trajectory in enumerate(trajectories):
        rows.append(values_BT[row][batch.valid_BT[row]][len(trajectory.prompt_ids) :])
    return rows


@pytest.mark.parametrize("padding_side", ["left", "right", "both"])
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_replay_equals_rollout(name, visibility, padding_side):
    """A batch of all rows replays to ≤ 1e-4 at every action, 0 elsewhere."""
    c, (trajectories, images) = case(name), recorded(name, visibility)
    batch = collate(trajectories, images, c.adapter, visibility, padding_side)
    with torch.no_grad():
        log_probs_BT, _ = replay(c.adapter, batch, temperature=TEMPERATURE)
    for trajectory, values in zip(
        trajectories, completion_values(trajectories, log_probs_BT, batch), strict=True
    ):
        torch.testing.assert_close(values, trajectory.rollout_log_probs, rtol=0, atol=1e-4)
    assert (log_probs_BT[~batch.action_mask_BT()] == 0).all()


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_hidden_states_equal_an_uncached_forward_row_by_row(name, visibility):
    """A padded batch of replay has the hidden states of plain single-row forwards.

    Batch 1 has them, too.
    """
    c, (trajectories, images) = case(name), recorded(name, visibility)
    batch = collate(trajectories, images, c.adapter, visibility, "both")
    with torch.no_grad():
        hidden_BTH = replay_hidden(c.adapter, batch)
        for row in range(0, len(trajectories), 2):
            _, expected_TH = slow_reading.forward(c, trajectories[row], images[row], visibility)
            torch.testing.assert_close(
                hidden_BTH[row][batch.valid_BT[row]], expected_TH, rtol=0, atol=1e-4
            )
            alone = collate([trajectories[row]], [images[row]], c.adapter, visibility)
            torch.testing.assert_close(
                replay_hidden(c.adapter, alone)[0], expected_TH, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_gradient_checkpointing_changes_neither_log_probs_nor_gradients(name):
    trajectories, images = recorded(name, "latents_only")
    results = []
    for checkpointing in (False, True):
        c = build_case(name)
        c.model.train()
        if checkpointing:
            c.model.gradient_checkpointing_enable()
            assert c.adapter.decoder.layers[0].gradient_checkpointing
        batch = collate(trajectories, images, c.adapter, "latents_only", "left")
        log_probs_BT, _ = replay(c.adapter, batch, temperature=TEMPERATURE)
        log_probs_BT.sum().backward()
        results.append(
            (
                log_probs_BT.detach(),
                {n: p.grad for n, p in c.model.named_parameters() if p.grad is not None},
            )
        )
    (plain, gradients), (checkpointed, others) = results
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)
    assert set(gradients) == set(others) and len(gradients) > 20
    for parameter_name, gradient in gradients.items():
        torch.testing.assert_close(
            others[parameter_name], gradient, rtol=1e-4, atol=1e-4, msg=parameter_name
        )


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_recomputed_latents_equal_stored_while_weights_are_unchanged(name, visibility):
    c, (trajectories, images) = case(name), recorded(name, visibility)
    batch = collate(trajectories, images, c.adapter, visibility, "both")
    latents_NH = recompute_latents(c.adapter, batch)
    torch.testing.assert_close(latents_NH, batch.latents_NH, rtol=0, atol=1e-4)
    assert not latents_NH.requires_grad and len(latents_NH) > 10
    # a wrong latent given as "recorded" is not simply echoed
    shuffled = batch.with_latents(batch.latents_NH.flip(0))
    torch.testing.assert_close(
        recompute_latents(c.adapter, shuffled), batch.latents_NH, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("gradient", ["cut", "bptt"])
def test_recompute_with_gradient_checkpointing_in_training(gradient):
    """transformers silently drops the cache of a checkpointed layer in training.

    That was the published code's second defect.
    """
    trajectories, images = recorded("qwen2_5_vl", "full")
    c = build_case("qwen2_5_vl")
    c.model.train()
    c.model.gradient_checkpointing_enable()
    batch = collate(trajectories, images, c.adapter, "full", "both")
    latents_NH = recompute_latents(c.adapter, batch, gradient)
    torch.testing.assert_close(latents_NH, batch.latents_NH, rtol=0, atol=1e-4)
    assert c.adapter.decoder.layers[0].gradient_checkpointing and c.model.training


def test_recompute_with_head_applies_it():
    c = build_case("qwen2", head="mlp")
    config = c.mechanism(head="mlp")
    group = c.engine(config).generate([c.request(seeds=range(8))], sampling(14))[0]
    batch = collate(group, [None] * 8, c.adapter, "full", "right")
    assert len(batch.latents_NH) > 5
    torch.testing.assert_close(
        recompute_latents(c.adapter, batch), batch.latents_NH, rtol=0, atol=1e-4
    )


def test_gradient_through_recomputed_latents_matches_finite_differences():
    """Back-propagation through a span's whole chain equals a central difference.

    In float64, but for norms, which stay float32.
    """
    c = build_case("qwen2")
    group = c.engine().generate([c.request(seeds=range(6))], sampling(12))[0]
    c.model.double()
    batch = collate(group, [None] * 6, c.adapter, "full")
    batch = batch.with_latents(batch.latents_NH.double())
    weight = c.model.model.layers[0].self_attn.v_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def objective(gradient):
        latents_NH = recompute_latents(c.adapter, batch, gradient)
        hidden_BTH = replay_hidden(c.adapter, batch.with_latents(latents_NH))
        return hidden_BTH[batch.action_mask_BT()].sin().sum()

    objective("bptt").backward()
    analytic, step = float((weight.grad * direction).sum()), 1e-4
    with torch.no_grad():
        weight += step * direction
        above = float(objective("cut"))
        weight -= 2 * step * direction
        below = float(objective("cut"))
    assert analytic == pytest.approx((above - below) / (2 * step), rel=1e-3)
    weight.grad = None
    cut = batch.with_latents(recompute_latents(c.adapter, batch))
    replay_hidden(c.adapter, cut)[batch.action_mask_BT()].sin().sum().backward()
    assert float((weight.grad * direction).sum()) != pytest.approx(analytic, rel=0.02), (
        "cut must differ"
    )


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen2"])
@pytest.mark.parametrize(
    "placeholder", ["<|im_end|>", "<|lvr_start|>", "<|lvr_end|>", "<|image_pad|>", 10**9]
)
def test_any_placeholder_at_latent_positions_changes_nothing(name, visibility, placeholder):
    """Changes exactly nothing, in replay and recompute; with ids outside the vocabulary."""
    c, (trajectories, images) = case(name), recorded(name, visibility)
    batch = collate(trajectories, images, c.adapter, visibility, "both")
    token_id = c.token_id(placeholder) if isinstance(placeholder, str) else placeholder
    other = dataclasses.replace(
        batch, input_ids_BT=batch.input_ids_BT.masked_fill(batch.latent_mask_BT, token_id)
    )
    assert not torch.equal(other.input_ids_BT, batch.input_ids_BT)
    with torch.no_grad():
        for a, b in zip(replay(c.adapter, batch), replay(c.adapter, other), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(
            recompute_latents(c.adapter, batch), recompute_latents(c.adapter, other)
        )


def test_start_is_an_action_by_choice():
    c, (trajectories, images) = case("qwen2"), recorded("qwen2", "full")
    batch = collate(trajectories, images, c.adapter, "full")
    with torch.no_grad():
        with_start, _ = replay(c.adapter, batch)
        without, _ = replay(c.adapter, batch, start_is_action=False)
    is_start = batch.kinds_BT == K.START
    assert is_start.any() and (with_start[is_start] < 0).all() and (without[is_start] == 0).all()
    assert torch.equal(with_start[~is_start], without[~is_start])


def test_gradients_reach_the_latents(monkeypatch):
    """Against a central difference, all of it in float64."""
    norms_in_double(monkeypatch)
    c = build_case("qwen2")
    group = c.engine().generate([c.request(seeds=range(4))], sampling(12))[0]
    c.model.double()
    batch = collate(group, [None] * 4, c.adapter, "full")
    latents_NH = batch.latents_NH.double().requires_grad_()
    direction = torch.randn(latents_NH.shape, generator=torch.Generator().manual_seed(0)).double()

    def objective(values_NH):
        hidden_BTH = replay_hidden(c.adapter, batch.with_latents(values_NH))
        return hidden_BTH[batch.action_mask_BT()].sin().sum()

    objective(latents_NH).backward()
    step = 1e-6
    with torch.no_grad():
        numeric = (
            objective(latents_NH + step * direction) - objective(latents_NH - step * direction)
        ) / (2 * step)
    assert float((latents_NH.grad * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


def test_batch_of_rows_without_latents():
    c = case("qwen2")
    group = c.engine(c.mechanism(max_spans=0)).generate([c.request(seeds=range(4))], sampling(6))[
        0
    ]
    batch = collate(group, [None] * 4, c.adapter, "full")
    assert batch.latents_NH.shape == (0, 32)
    with torch.no_grad():
        log_probs_BT, _ = replay(c.adapter, batch)
    for trajectory, values in zip(
        group, completion_values(group, log_probs_BT, batch), strict=True
    ):
        torch.testing.assert_close(values, trajectory.rollout_log_probs, rtol=0, atol=1e-4)
    assert torch.equal(recompute_latents(c.adapter, batch), batch.latents_NH)


def test_an_action_without_predecessor_is_an_error():
    c = case("qwen2")
    batch = collate(*[values[:1] for values in recorded("qwen2", "full")], c.adapter, "full")
    mask_BT = torch.zeros_like(batch.valid_BT)
    mask_BT[0, 0] = True
    with pytest.raises(LatentMismatchError, match="position 0 has no predecessor"):
        token_log_probs(c.adapter, batch, torch.zeros(1, mask_BT.shape[1], 32), 1.0, mask_BT)


def test_recompute_wants_completions_in_one_column():
    c = case("qwen2_5_vl")
    trajectories, images = recorded("qwen2_5_vl", "full")
    with pytest.raises(LatentMismatchError, match="padding_side='both'"):
        recompute_latents(c.adapter, collate(trajectories, images, c.adapter, "full", "left"))
