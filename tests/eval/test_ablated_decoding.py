"""Decoding under ablations: that nothing else changes; leaks past the latents."""

import pytest
import torch
from ablation_cases import evaluator, prompts

from grpo_latent.eval.ablations import ABLATIONS, AblationInputs, make_changes
from grpo_latent.eval.decode import with_partners_images
from grpo_latent.eval.leak import leak
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.trajectory import PositionKind as K


@pytest.mark.parametrize("name", [*ABLATIONS, "shuffle@span0", "noise@span1"])
def test_ablated_decoding_differs_in_what_the_ablation_says_only(name):
    """What comes before the first change stays, and the given table stands at the latents.

    Prompt, tokens, log-probs and seed are the own ones: runs are paired. The table is fed in
    turn.
    """
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    with e.encoded_once(rows) as visual:
        ideal = [
            visual_MH[list(prompt.roi)] for prompt, visual_MH in zip(rows, visual, strict=True)
        ]
        swapped = e.greedy(with_partners_images(rows))
    changes = make_changes(name, AblationInputs(rows, own, ideal, e.loaded.mechanism, 0, swapped))
    ablated = e.greedy(rows, changes)
    assert sum(change is not None for change in changes) >= (1 if name == "noise@span1" else 4)
    moved = 0
    for before, after, change in zip(own, ablated, changes, strict=True):
        assert before.seed == after.seed and torch.equal(before.prompt_ids, after.prompt_ids)
        if change is None:
            assert torch.equal(before.token_ids, after.token_ids)
            continue
        span = int(name[-1]) if "@" in name else 0
        # of `no_span` the start itself is the change, of all others what follows it
        first = before.spans[span].start - (name == "no_span")
        assert torch.equal(before.token_ids[:first], after.token_ids[:first])
        torch.testing.assert_close(
            before.rollout_log_probs[:first], after.rollout_log_probs[:first], rtol=0, atol=1e-5
        )
        moved += not torch.equal(before.token_ids, after.token_ids)
        if name == "markers_only":
            assert (after.kinds == K.START).sum() == (after.kinds == K.FORCED).sum() > 0 and len(
                after.latents
            ) == 0
        elif name == "no_span":
            assert (after.kinds == K.TEXT).all()
        elif name == "image_blind_after_span":
            torch.testing.assert_close(before.latents[:2], after.latents[:2], rtol=0, atol=1e-5)
        else:
            table, given = change["latent_override"].vectors, after.latents
            if "@" in name:
                skipped = sum(s.length for s in after.spans[:span])
                given = given[skipped : skipped + after.spans[span].length]
                torch.testing.assert_close(
                    after.latents[:skipped], before.latents[:skipped], rtol=0, atol=1e-5
                )
            assert torch.equal(given, table[torch.arange(len(given)) % len(table)])
    assert moved or name == "noise@span1", "hardly any text follows the second span"


def test_own_latents_given_back_reproduce_the_own_trajectories():
    """An override with what was recorded anyway changes no token: runs are paired.

    Log-probs change by rounding only.
    """
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    again = e.greedy(
        rows,
        [{"latent_override": LatentOverride(t.latents)} if len(t.latents) else None for t in own],
    )
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
        images = dict(
            pixel_values=prompt.images.pixel_values, image_grid_thw=prompt.images.image_grid_thw
        )
        e.loaded.model(input_ids=prompt.prompt_ids[None], **images)
    hook.remove()
    is_image = prompt.prompt_ids == e.adapter.image_token_id
    with e.encoded_once([*prompts(with_images=False)[:1], prompt]) as visual:
        torch.testing.assert_close(visual[1], seen[0][0, is_image], rtol=0, atol=1e-6)
        assert visual[0] is None


@pytest.mark.parametrize(
    ("visibility", "steps", "leaks"), [("latents_only", 1, False), ("full", 1, True)]
)
def test_leak(visibility, steps, leaks):
    e, rows = evaluator(visibility, steps), prompts()
    value = leak(e.adapter, rows, e.greedy(rows), visibility)
    assert value > 1e-3 if leaks else value == 0.0


def test_leak_by_hand():
    """Each prompt with text after a span gets the image of the next such prompt.

    Against plain replays, one by one.
    """
    e, rows = evaluator(), prompts()
    own = e.greedy(rows)
    fit = [i for i, t in enumerate(own) if K.FORCED in t.kinds[:-1].tolist()]
    assert len(fit) >= 3
    largest = 0.0
    for t, mine, other in (
        (own[a], rows[a], rows[b]) for a, b in zip(fit, fit[1:] + fit[:1], strict=True)
    ):
        with torch.no_grad():
            a, b = (
                replay(e.adapter, collate([t], [p.images], e.adapter, "full"))[0][
                    0, len(t.prompt_ids) :
                ]
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
