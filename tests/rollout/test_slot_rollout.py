"""IVT-LR and Coconut: rollout = replay for mixed batches, lengths, and what is refused.

Slots are shared within a group.
"""

import dataclasses
import functools

import pytest
import torch
from latent_cases import case, sampling
from slot_cases import check_replay, scored

from grpo_latent.errors import ConfigError, LatentMismatchError, RolloutError
from grpo_latent.models.injection import SelectionInjector
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.models.slot_choice_scores import chosen_columns
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.trajectory import PositionKind as K

TEMPERATURE = 2.0
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3")


def config_of(c, **changes):
    values = dict(steps=2)
    values |= dict(mechanism="ivt_lr", top_k_image=4) if c.processor else dict(mechanism="coconut")
    return c.mechanism(**values | changes)


@functools.cache
def recorded(name):
    """Prompts with two images, one and none; one with a slot more."""
    c = case(name)
    images = [c.images(2, seed=2), c.images(1, seed=1), None] if c.processor else [None] * 3
    requests = [
        c.request("read ? ?", images[0], range(6), image_first=True),
        c.request("read red ?", images[1], range(6, 12), steps=3),
        c.request("read blue ?", images[2], range(12, 18)),
    ]
    engine = c.engine(config_of(c))
    groups = engine.generate(requests, sampling(20, temperature=TEMPERATURE))
    return requests, groups, engine


def replay_by_index(adapter, batch):
    """Log-probs where SELECTED positions read the image positions of `selected_idx_M`.

    Whatever vectors were recorded.
    """
    is_image_BT = (
        (batch.input_ids_BT == adapter.image_token_id)
        & (batch.kinds_BT == K.VISION)
        & batch.valid_BT
    )
    is_selected_N = (batch.kinds_BT == K.SELECTED)[batch.recorded_mask_BT]
    spoiled = dataclasses.replace(
        batch, latents_NH=batch.latents_NH.masked_fill(is_selected_N[:, None], 9.0)
    )
    injector = SelectionInjector.install(adapter.model)
    rows_M, columns_M, images_M = chosen_columns(
        batch.kinds_BT, batch.valid_BT, is_image_BT, batch.selected_idx_M
    )
    injector.arm(rows_M, columns_M, rows_M, images_M)
    try:
        return replay(adapter, spoiled, temperature=TEMPERATURE)[0]
    finally:
        injector.disarm()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rollout_equals_replay_recompute_and_replay_by_index(name):
    requests, groups, engine = recorded(name)
    batch = check_replay(requests, groups, engine, TEMPERATURE)
    if name == "qwen3":
        return
    right_BT, _ = replay(engine.adapter, batch, temperature=TEMPERATURE)
    torch.testing.assert_close(replay_by_index(engine.adapter, batch), right_BT, rtol=0, atol=1e-5)
    wrong = dataclasses.replace(batch, selected_idx_M=batch.selected_idx_M.flip(0) % 6)
    assert float((replay_by_index(engine.adapter, wrong) - right_BT).abs().max()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_completions_begin_with_the_prompts_slots_and_differ_after(name):
    _, groups, engine = recorded(name)
    has_images = name != "qwen3"
    expected = [
        ([K.SELECTED] * 4 + [K.LATENT]) * 2,
        [K.SELECTED] * 4
        + [K.LATENT]
        + [K.SELECTED] * 2
        + [K.LATENT] * 2,  # six image positions for three slots
        [K.LATENT] * 2,
    ]
    if not has_images:
        expected = [[K.LATENT] * num for num in (2, 3, 2)]
    for group, slots in zip(groups, expected, strict=True):
        for t in group:
            assert t.kinds[: len(slots)].tolist() == slots
            assert (t.kinds[len(slots) :] == K.TEXT).all() and len(t.kinds) > len(slots)
            assert len(t.kinds) <= 20 and (len(t.kinds) == 20 or t.stop_reason == "eos")
            assert (
                len(set(t.selected_idx.tolist())) == len(t.selected_idx) == slots.count(K.SELECTED)
            )
            assert (
                torch.equal(t.latents, group[0].latents)
                and not t.response_mask()[: len(slots)].any()
            )
            assert (t.token_ids[len(slots) :] != engine.mechanism.start_id).all(), (
                "no span is opened later"
            )
        assert len({tuple(t.text_ids) for t in group}) > 1


def test_slots_count_towards_max_new_tokens():
    """Rows with slots of 10, 9 and 2 positions in one batch."""
    requests, _, _ = recorded("qwen2_vl")
    c = case("qwen2_vl")
    groups = c.engine(config_of(c), sampled=("3", "7")).generate(requests, sampling(12))
    for group, room in zip(groups, (2, 3, 10), strict=True):
        for t in group:
            assert len(t.text_ids) <= room and (t.stop_reason == "eos" or len(t.text_ids) == room)
    assert all(any(t.stop_reason == "length" for t in group) for group in groups[:2])


def test_a_row_does_not_depend_on_its_batch():
    requests, groups, engine = recorded("qwen2_vl")
    for request, group in zip(requests, groups, strict=True):
        alone = engine.generate(
            [dataclasses.replace(request, seeds=request.seeds[3:4])], sampling(20, temperature=2.0)
        )
        assert torch.equal(alone[0][0].token_ids, group[3].token_ids)
        assert torch.equal(alone[0][0].selected_idx, group[3].selected_idx)


PARTS = {  # whether a latent of this kind and slot is in the part
    "all": lambda kind, slot: True,
    "text": lambda kind, slot: kind == K.LATENT,
    "vision": lambda kind, slot: kind == K.SELECTED,
    "span0": lambda kind, slot: True,
    "span1": lambda kind, slot: False,
    "latent1": lambda kind, slot: slot == 1,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_override_of_slots_replaces_its_part_and_nothing_else(name, part):
    """An override of slots replaces its part of them, beside an untouched prompt.

    Log-probs are those of a replay of the record; h that is not replaced is the model's.
    """
    requests, groups, engine = recorded(name)
    table = 3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    mixed = [dataclasses.replace(requests[1], seeds=[6])]
    for request, group in zip(requests, groups, strict=True):
        override = LatentOverride(table, part, group[0].selected_idx if request.images else None)
        mixed.append(dataclasses.replace(request, seeds=[7, 8], latent_override=override))
    untouched, *changed = engine.generate(mixed, sampling(20, temperature=TEMPERATURE))
    assert torch.equal(untouched[0].token_ids, groups[1][0].token_ids)
    for request, group, own in zip(requests, changed, (group[0] for group in groups), strict=True):
        kinds = own.kinds[own.latent_mask].tolist()
        slots = [kinds[:place].count(K.LATENT) for place in range(len(kinds))]
        replaced = [place for place, kind in enumerate(kinds) if PARTS[part](kind, slots[place])]
        kept_images = [
            place
            for place, kind in enumerate(kinds)
            if kind == K.SELECTED and place not in replaced
        ]
        batch = collate(group, [request.images] * len(group), engine.adapter, "full", "both")
        log_probs_BT, _ = replay(engine.adapter, batch, temperature=TEMPERATURE)
        made = recompute_latents(engine.adapter, batch).split(len(kinds))
        for row, t in enumerate(group):
            assert t.kinds[: len(kinds)].tolist() == kinds and torch.equal(
                t.selected_idx, own.selected_idx
            )
            assert torch.equal(t.latents[replaced], table[torch.arange(len(replaced)) % 3])
            torch.testing.assert_close(
                t.latents[kept_images], own.latents[kept_images], rtol=0, atol=1e-5
            )
            if K.LATENT not in [kinds[place] for place in replaced]:
                torch.testing.assert_close(made[row], t.latents, rtol=0, atol=1e-4)
            values = log_probs_BT[row][batch.valid_BT[row]][len(t.prompt_ids) :]
            torch.testing.assert_close(values, t.rollout_log_probs, rtol=0, atol=1e-4)


def test_without_recorded_places_attention_chooses_anew():
    requests, groups, engine = recorded("qwen2_vl")
    override = LatentOverride(torch.full((1, 32), 5.0), "text")
    moved = engine.generate(
        [dataclasses.replace(requests[0], latent_override=override)], sampling(20)
    )[0][0]
    own = groups[0][0].selected_idx
    assert torch.equal(moved.selected_idx[:4], own[:4]) and not torch.equal(
        moved.selected_idx, own
    )


def test_no_slots_is_an_ordinary_rollout():
    c = case("qwen3")
    request = c.request("read red ?", seeds=range(4))
    group = c.engine(config_of(c, steps=0)).generate([request], sampling(8))[0]
    plain = c.engine(c.mechanism(max_spans=0)).generate([request], sampling(8))[0]
    for t, other in zip(group, plain, strict=True):
        assert torch.equal(t.token_ids, other.token_ids) and t.latents.shape == (0, 32)


def test_what_slots_cannot_do_is_an_error():
    c, text = case("qwen2_vl"), case("qwen3")
    request = c.request("read red ?", c.images(1), group_id="row-5")
    with pytest.raises(
        RolloutError, match="group 'row-5'.*max_new_tokens 8, slots of 8 positions"
    ):
        c.engine(config_of(c)).generate([request], sampling(8))
    with pytest.raises(LatentMismatchError, match="prompt 0.*6 different ones below 6"):
        override = LatentOverride(torch.zeros(9, 32), selected_idx=torch.arange(5))
        c.engine(config_of(c)).generate(
            [dataclasses.replace(request, latent_override=override)], sampling(20)
        )
    for temperature in (None, 0.5):
        engine = text.engine(
            config_of(text, mechanism="ivt_lr", top_k_image=4), selection_temperature=temperature
        )
        with pytest.raises(ConfigError, match="latent.top_k_image: no image embeddings to insert"):
            engine.generate([text.request()], sampling(20))


def test_drawn_slots_differ_in_a_group_and_their_log_probs_are_a_replays():
    """Plackett-Luce: the same seeds give the same draws whatever the batch.

    Greedy decoding takes the best as before.
    """
    c = case("qwen2_vl")
    requests, plain, _ = recorded("qwen2_vl")
    engine = c.engine(config_of(c), selection_temperature=0.5)
    groups = engine.generate(requests, sampling(20, temperature=TEMPERATURE))
    for group in groups[:2]:
        assert len({tuple(t.selected_idx.tolist()) for t in group}) > 1
    trajectories = [t for group in groups for t in group]
    images = [
        request.images for request, group in zip(requests, groups, strict=True) for _ in group
    ]
    batch = collate(trajectories, images, engine.adapter, "full", "right")
    with torch.no_grad():
        text_BT, _ = replay(engine.adapter, batch, temperature=TEMPERATURE)
        _, choice_M = scored(engine.adapter, batch, 0.5)
    values_BT = text_BT.masked_scatter((batch.kinds_BT == K.SELECTED) & batch.valid_BT, choice_M)
    for row, t in enumerate(trajectories):
        values = values_BT[row][batch.valid_BT[row]][len(t.prompt_ids) :]
        torch.testing.assert_close(values, t.rollout_log_probs, rtol=0, atol=1e-4)
        assert torch.equal(
            t.sampling_log_probs[t.kinds == K.SELECTED], t.rollout_log_probs[t.kinds == K.SELECTED]
        )
    alone = engine.generate(
        [dataclasses.replace(requests[1], seeds=[9])], sampling(20, temperature=TEMPERATURE)
    )[0][0]
    assert torch.equal(alone.selected_idx, groups[1][3].selected_idx) and torch.equal(
        alone.token_ids, groups[1][3].token_ids
    )
    greedy = engine.generate(requests[:1], sampling(20, temperature=0.0))[0][0]
    assert torch.equal(greedy.selected_idx, plain[0][0].selected_idx)
