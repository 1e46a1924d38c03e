"""What exactly each ablation feeds, by hand; that nothing else changes; hit and leak."""

import functools

import pytest
import torch
from latent_cases import build_case, case

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import (
    ABLATIONS,
    AblationInputs,
    donors,
    leak,
    make_vectors,
    nearest_token_hits,
    repeat_to,
    with_truth_of,
)
from grpo_latent.eval.evaluate import EvalSettings, Evaluator
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.replay import collate, replay
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

TEXTS = ("read red ?", "read blue ?", "? green", "read ? ?", "red", "blue ? read", "green", "? ?")


@functools.cache
def evaluator(visibility="full", steps=2):
    """A random model; `max_new_tokens` 10, so that trajectories hold one span or two, or none."""
    c = build_case("qwen2_5_vl")
    config = c.config(visibility=visibility, steps=steps)
    loaded = LatentModel(c.model, c.tokenizer, c.processor, config, (c.eos_id,))
    return Evaluator(loaded, EvalSettings(max_new_tokens=10, num_sampled=1, temperature=2.0))


def prompts(with_images=True):
    c, found = case("qwen2_5_vl"), []
    for index, text in enumerate(TEXTS):
        images = c.images(1, seed=index) if with_images else None
        request = c.request(text, images)
        found.append(EvalPrompt(request.prompt_ids, images, "test", str(index), f"row {index}", roi=(index % 6,)))
    return found


def trajectory(latents, kinds=None):
    num_latents = len(latents)
    kinds = [K.START, *[K.LATENT] * num_latents, K.FORCED, K.TEXT] if num_latents else [K.TEXT]
    kinds = torch.tensor(kinds)
    zeros = torch.zeros(len(kinds))
    ids = torch.zeros(len(kinds), dtype=torch.long)
    return Trajectory(
        torch.ones(2, dtype=torch.long), ids, kinds, torch.as_tensor(latents).float(), zeros, zeros, "eos"
    )


OWN = [trajectory([[3.0, 4.0], [0.0, 2.0]]), trajectory(torch.zeros(0, 2)), trajectory([[6.0, 8.0]])]
VISUAL = [torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), torch.ones(3, 2), None]


def inputs(rois=((2, 0), (1,), (0,)), seed=0):
    rows = [EvalPrompt(torch.ones(2), None, "test", str(i), f"row {i}", roi) for i, roi in enumerate(rois)]
    return AblationInputs(rows, OWN, VISUAL, seed)


def test_zero():
    first, second, third = make_vectors("zero", inputs())
    assert first.tolist() == [[0, 0], [0, 0]] and second is None and third.tolist() == [[0, 0]]


def test_noise_has_the_norms_of_the_own_latents_and_other_directions():
    first, second, third = make_vectors("noise", inputs())
    assert first.norm(dim=-1).tolist() == pytest.approx([5.0, 2.0]) and second is None
    assert third.norm(dim=-1).tolist() == pytest.approx([10.0])
    for vectors, own in ((first, OWN[0]), (third, OWN[2])):
        assert (torch.cosine_similarity(vectors, own.latents) < 0.999).all()
    assert torch.equal(make_vectors("noise", inputs())[0], first), "seeded"
    assert not torch.equal(make_vectors("noise", inputs(seed=1))[0], first)


def test_shuffle_feeds_the_latents_of_another_prompt():
    """Only prompts 0 and 2 have latents: they swap."""
    first, second, third = make_vectors("shuffle", inputs())
    assert torch.equal(first, OWN[2].latents) and second is None and torch.equal(third, OWN[0].latents)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_holders", [2, 3, 50])
def test_donors_are_a_derangement_of_the_holders(num_holders, seed):
    own = [
        trajectory([[1.0, 0.0]]) if i % 3 else trajectory(torch.zeros(0, 2)) for i in range(num_holders * 3 // 2 + 2)
    ]
    holders = {i for i, t in enumerate(own) if len(t.latents)}
    given = donors(own, seed)
    assert {d for d in given if d is not None} == holders == {i for i, d in enumerate(given) if d is not None}
    assert all(donor != i for i, donor in enumerate(given))


def test_one_holder_has_no_donor():
    assert donors(OWN[:2], 0) == [None, None] and donors([], 0) == []


def test_oracle_takes_the_boxes_tokens_in_their_order():
    first, second, third = make_vectors("oracle", inputs())
    assert first.tolist() == [[3, 3], [1, 1]] and second is None and third is None, "no own latent; no image"
    assert make_vectors("oracle", inputs(rois=((), (), ())))[0] is None


def test_unknown_ablation_is_refused():
    with pytest.raises(ConfigError, match="ablations.*'lobotomy'|lobotomy"):
        make_vectors("lobotomy", inputs())


def test_repeat_to():
    vectors = torch.tensor([[1.0], [2.0], [3.0]])
    assert repeat_to(vectors, 7)[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 1] and repeat_to(vectors, 2)[:, 0].tolist() == [
        1,
        2,
    ]


def test_nearest_token_hits():
    """Latents (3, 4) and (0, 2): nearest of (1, 1), (2, 2), (3, 3) are numbers 2 and 0."""
    assert nearest_token_hits(OWN[0], (2, 0), VISUAL[0]) == [True, True]
    assert nearest_token_hits(OWN[0], (1, 0), VISUAL[0]) == [False, True]
    assert nearest_token_hits(OWN[0], (2,), VISUAL[0]) == [True] and nearest_token_hits(OWN[0], (), VISUAL[0]) == []


def test_truth_of_donors():
    swapped = with_truth_of(inputs().prompts, [2, None, 0])
    assert [(p.ground_truth, p.where) for p in swapped] == [("2", "row 0"), ("1", "row 1"), ("0", "row 2")]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_decoding_differs_in_the_latents_only(name):
    """Recorded latents are the given ones, in turn; tokens up to the first latent are the own ones."""
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    visual = [e.visual(prompt.images) for prompt in rows]
    vectors = make_vectors(name, AblationInputs(rows, own, visual))
    ablated = e.greedy(rows, vectors)
    assert sum(table is not None for table in vectors) >= 4
    for before, after, table in zip(own, ablated, vectors, strict=True):
        if table is None:
            assert torch.equal(before.token_ids, after.token_ids) and len(before.latents) == 0
            continue
        assert torch.equal(after.latents, table[torch.arange(len(after.latents)) % len(table)])
        first = before.spans[0].start
        assert after.spans[0].start == first and torch.equal(before.token_ids[:first], after.token_ids[:first])
    assert any(not torch.equal(a.token_ids, b.token_ids) for a, b in zip(own, ablated, strict=True)), "moves something"


def test_own_latents_given_back_reproduce_the_own_trajectories():
    """The pairing: an override with what was recorded anyway changes no token, and log-probs by rounding only."""
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    again = e.greedy(rows, [t.latents if len(t.latents) else None for t in own])
    for a, b in zip(own, again, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.kinds, b.kinds)
        torch.testing.assert_close(a.rollout_log_probs, b.rollout_log_probs, rtol=0, atol=1e-5)


def test_visual_is_what_the_model_puts_at_its_placeholders():
    """Against the embeddings that the decoder is given in a plain Hugging Face forward."""
    e, prompt = evaluator(), prompts()[0]
    seen = []
    hook = e.adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        images = dict(pixel_values=prompt.images.pixel_values, image_grid_thw=prompt.images.image_grid_thw)
        e.loaded.model(input_ids=prompt.prompt_ids[None], **images)
    hook.remove()
    is_image = prompt.prompt_ids == e.adapter.image_token_id
    torch.testing.assert_close(e.visual(prompt.images), seen[0][0, is_image], rtol=0, atol=1e-6)
    assert e.visual(None) is None


@pytest.mark.parametrize(("visibility", "steps", "leaks"), [("latents_only", 1, False), ("full", 1, True)])
def test_leak(visibility, steps, leaks):
    e, rows = evaluator(visibility, steps), prompts()
    value = leak(e.adapter, rows, e.greedy(rows), visibility)
    assert value > 1e-3 if leaks else value == 0.0


def test_leak_by_hand():
    """Each prompt with text after a span gets the image of the next such prompt. Against plain replays, one by one."""
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    fit = [i for i, t in enumerate(own) if K.FORCED in t.kinds[:-1].tolist()]
    assert len(fit) >= 3
    largest = 0.0
    for t, mine, other in ((own[a], rows[a], rows[b]) for a, b in zip(fit, fit[1:] + fit[:1], strict=True)):
        with torch.no_grad():
            a, b = (
                replay(e.adapter, collate([t], [p.images], e.adapter), "full")[0][0, len(t.prompt_ids) :]
                for p in (mine, other)
            )
        kinds = t.kinds.tolist()
        ends = [i for i, kind in enumerate(kinds) if kind == K.FORCED]
        scored = [i for i, kind in enumerate(kinds) if kind == K.TEXT and ends and i > ends[0]]
        largest = max([largest, *(float((a - b).abs()[i]) for i in scored)])
    assert largest > 0 and leak(e.adapter, rows, own, "full") == pytest.approx(largest, abs=1e-5)


def test_leak_is_none_where_nothing_can_be_swapped():
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    assert leak(e.adapter, rows[:1], own[:1], "full") is None, "no partner"
    text_only = prompts(with_images=False)
    assert leak(e.adapter, text_only, e.greedy(text_only), "full") is None
