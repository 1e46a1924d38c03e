"""The leak test of `latent.visibility=latents_only`.

Swap the image under recorded latents, and nothing after may move.

With one latent a span the channel is closed exactly (0.0, not "small"); `full`, and two latents a
span, are the negative controls. Both sides are covered: the engine (recorded latents given back as
`latent_override`) and replay.
"""

from dataclasses import replace

import pytest
import torch
from latent_cases import VL_NAMES, case, sampling

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.trajectory import PositionKind as K


def recorded(c, visibility, steps, image_first):
    """Sampled trajectories with a completed span each, and their request."""
    images = c.images(1, seed=1)
    request = c.request("read blue ?", images, range(48), image_first=image_first)
    group = c.engine(c.mechanism(visibility=visibility, steps=steps)).generate(
        [request], sampling(16, temperature=2.0)
    )[0]
    kept = [t for t in group if (t.kinds == K.FORCED).any() and t.kinds[-1] == K.TEXT]
    assert len(kept) >= 4 and any(len(t.spans) > 1 for t in kept)
    return request, kept


def change_after_swap(c, visibility, steps, image_first) -> tuple[float, float]:
    """Largest change, by an image swap in replay, after spans and at any other action."""
    request, trajectories = recorded(c, visibility, steps, image_first)
    batch = collate(
        trajectories, [request.images] * len(trajectories), c.adapter, visibility, "both"
    )
    other = ImageInputs.concat([c.images(1, seed=2)] * len(trajectories))
    with torch.no_grad():
        before, _ = replay(c.adapter, batch)
        after, _ = replay(c.adapter, replace(batch, images=other))
    change_BT = (after - before).abs()
    past_span_BT = (batch.kinds_BT == K.FORCED).cumsum(-1) > 0
    text_BT = batch.kinds_BT == K.TEXT
    return float(change_BT[past_span_BT & text_BT].max()), float(change_BT.max())


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("name", VL_NAMES)
def test_no_post_span_log_prob_sees_the_image(name, image_first):
    post_span, _ = change_after_swap(case(name), "latents_only", 1, image_first)
    assert post_span == 0.0


@pytest.mark.parametrize("image_first", [False, True])
def test_text_before_the_first_span_is_blind_too(image_first):
    """The rule makes all prompt text and sampled text blind, so no action at all may move."""
    _, anywhere = change_after_swap(case("qwen2_5_vl"), "latents_only", 1, image_first)
    assert anywhere == 0.0


@pytest.mark.parametrize(("visibility", "steps"), [("full", 1), ("latents_only", 2)])
@pytest.mark.parametrize("image_first", [False, True])
def test_negative_controls(visibility, steps, image_first):
    """`full` shows the image; with two latents the first one's keys and values carry it."""
    post_span, _ = change_after_swap(case("qwen2_5_vl"), visibility, steps, image_first)
    assert post_span > 1e-3


def test_own_latents_depend_on_the_image():
    """Else the tests above would pass on a model that is blind altogether."""
    c = case("qwen2_5_vl")
    engine = c.engine(c.mechanism(visibility="latents_only", steps=1))
    groups = engine.generate(
        [c.request(images=c.images(1, seed=s), seeds=range(8)) for s in (1, 2)], sampling(8)
    )
    pairs = [
        (a, b)
        for a, b in zip(*groups, strict=True)
        if a.spans and b.spans and a.spans[0] == b.spans[0]
    ]
    assert pairs and all((a.latents[0] - b.latents[0]).abs().max() > 0.05 for a, b in pairs)


@pytest.mark.parametrize(("visibility", "exact"), [("latents_only", True), ("full", False)])
def test_engine_with_given_latents_sees_the_image_only_with_full(visibility, exact):
    """The engine's own mask, step by step: two images, the same given latents.

    It is a second reading of the rule. A call each: what a product of matrices makes of a row may depend
    on the row's place.
    """
    c = case("qwen2_5_vl")
    table = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    engine = c.engine(c.mechanism(visibility=visibility, steps=1))
    requests = [
        c.request(
            images=c.images(1, seed=s), seeds=range(16), latent_override=LatentOverride(table)
        )
        for s in (1, 2)
    ]
    first, second = (engine.generate([request], sampling(12))[0] for request in requests)
    same = [torch.equal(a.token_ids, b.token_ids) for a, b in zip(first, second, strict=True)]
    changes = [
        float((a.rollout_log_probs - b.rollout_log_probs).abs().max())
        for a, b, equal in zip(first, second, same, strict=True)
        if equal
    ]
    assert any(t.spans for t in first)
    if exact:
        assert all(same) and max(changes) == 0.0
    else:
        assert not all(same) or max(changes) > 1e-3
