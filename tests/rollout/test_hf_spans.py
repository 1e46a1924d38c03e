"""Spans of the engine: their length, re-entry, cap, exits, and what cannot end one.

Exactly N latents and a forced end; max_new_tokens inside a span; EOS ignored in a span.

The language-model head is scripted: it prefers one token a call, so that each case is a
hand-written table of kinds.
"""

from contextlib import contextmanager

import pytest
import slow_reading
import torch
from latent_cases import build_case, case, sampling

from grpo_latent.latent.mechanisms.lvr import END_VECTOR_ATTRIBUTE
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.trajectory import LatentSpan
from grpo_latent.trajectory import PositionKind as K

START, EOS, SEVEN, END = "<|lvr_start|>", "<|im_end|>", "7", "<|lvr_end|>"
T, S, Z, F = int(K.TEXT), int(K.START), int(K.LATENT), int(K.FORCED)


@contextmanager
def script(c, tokens):
    """Scripts the language-model head: call n gives `tokens[n]` the largest logit, "7" the next.

    Later calls take the last one.
    """
    calls = iter(tokens)
    state = {"now": None, "num_calls": 0}

    def prefer(module, args, logits):
        state["now"] = next(calls, state["now"])
        state["num_calls"] += 1
        logits = logits.clone()
        logits[..., c.token_id(SEVEN)] += 500.0
        logits[..., c.token_id(state["now"])] += 1000.0
        return logits

    handle = c.model.lm_head.register_forward_hook(prefer)
    try:
        yield state
    finally:
        handle.remove()


def run(c, config, tokens, max_new_tokens=12, **request):
    with script(c, tokens) as state:
        trajectory = c.engine(config).generate(
            [c.request(**request)], sampling(max_new_tokens, temperature=0)
        )[0][0]
    return trajectory, state["num_calls"]


@pytest.mark.parametrize(
    ("tokens", "kinds", "stop_reason"),
    [
        ([EOS], [T], "eos"),
        ([SEVEN, SEVEN, EOS], [T, T, T], "eos"),
        ([START, EOS], [S, Z, Z, F, T], "eos"),
        ([SEVEN, START, SEVEN, EOS], [T, S, Z, Z, F, T, T], "eos"),
        ([START, START, EOS], [S, Z, Z, F, S, Z, Z, F, T], "eos"),
        ([START, SEVEN, START, EOS], [S, Z, Z, F, T, S, Z, Z, F, T], "eos"),
        ([SEVEN], [T] * 12, "length"),
        ([START], [S, Z, Z, F] * 3, "length"),
    ],
)
def test_exit_steps(tokens, kinds, stop_reason):
    """The head is not even asked inside a span, so that EOS cannot stop one (`[START, EOS]`)."""
    trajectory, num_calls = run(case("qwen2"), case("qwen2").mechanism(steps=2), tokens)
    assert trajectory.kinds.tolist() == kinds and trajectory.stop_reason == stop_reason
    assert num_calls == sum(kind in (T, S) for kind in kinds)
    c = case("qwen2")
    ids = {S: c.token_id(START), F: c.token_id(END), Z: c.token_id("<|lvr|>")}
    for token_id, kind in zip(trajectory.token_ids.tolist(), kinds, strict=True):
        assert kind == T or token_id == ids[kind]
    assert trajectory.num_forced_ends == kinds.count(F) and len(trajectory.latents) == kinds.count(
        Z
    )


@pytest.mark.parametrize(
    ("max_new_tokens", "kinds"),
    [
        (1, [S]),
        (2, [S, Z]),
        (3, [S, Z, Z]),
        (4, [S, Z, Z, Z]),
        (5, [S, Z, Z, Z, F]),
        (6, [S, Z, Z, Z, F, T]),
    ],
)
def test_max_new_tokens_cuts_anywhere(max_new_tokens, kinds):
    trajectory, _ = run(
        case("qwen2"), case("qwen2").mechanism(steps=3), [START, SEVEN], max_new_tokens
    )
    assert trajectory.kinds.tolist() == kinds and trajectory.stop_reason == "length"
    assert trajectory.latents.shape == (kinds.count(Z), 32)


def test_steps_of_a_request_override_the_checkpoints():
    c = case("qwen2")
    with script(c, [START, EOS]):
        groups = c.engine(c.mechanism(steps=2)).generate(
            [c.request(steps=4), c.request(), c.request(steps=1)], sampling(8, temperature=0)
        )
    # the scripted calls are the batch's: the one-step row samples EOS first, at call 1
    assert [group[0].spans for group in groups] == [
        [LatentSpan(1, 4)],
        [LatentSpan(1, 2)],
        [LatentSpan(1, 1)],
    ]
    assert {group[0].stop_reason for group in groups} == {"eos"}


@pytest.mark.parametrize(("max_spans", "num_spans"), [(0, 0), (1, 1), (2, 2), (None, 3)])
def test_max_spans_caps_what_can_be_sampled(max_spans, num_spans):
    c = case("qwen2")
    trajectory, _ = run(c, c.mechanism(steps=2, max_spans=max_spans), [START], 12)
    assert len(trajectory.spans) == num_spans
    assert trajectory.kinds.tolist() == ([S, Z, Z, F] * num_spans + [T] * 12)[:12]
    assert (trajectory.token_ids[trajectory.kinds == T] != c.token_id(START)).all()


def test_sampled_rows_open_and_close_every_span_by_the_rule():
    """Many sampled rows: after a start exactly N latents, then the forced end.

    Nothing else is FORCED or LATENT.
    """
    c = case("qwen2_5_vl")
    engine = c.engine(c.mechanism(steps=3, max_spans=2))
    group = engine.generate([c.request(images=c.images(1), seeds=range(64))], sampling(20))[0]
    completed = 0
    for trajectory in group:
        kinds = trajectory.kinds.tolist()
        for idx, kind in enumerate(kinds):
            if kind == S:
                whole = kinds[idx + 1 : idx + 5]
                assert whole == [Z, Z, Z, F][: len(whole)]
                completed += len(whole) == 4
        assert kinds.count(S) == len(trajectory.spans) + (kinds[-1] == S) <= 2
        assert kinds.count(Z) <= 3 * kinds.count(S) and kinds.count(F) <= kinds.count(S)
        assert (trajectory.stop_reason == "eos") == (
            trajectory.token_ids[-1] == c.eos_id and kinds[-1] == T
        )
        assert c.eos_id not in trajectory.token_ids[:-1]
    assert completed > 60


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        # calls are one a position here: exit end_token reads the logits at each; [0] samples, [1]
        # is at `start`
        ([START, END, END, EOS], [S, Z, F, T]),
        ([START, SEVEN, SEVEN, END, EOS], [S, Z, Z, F, T]),
        ([START, EOS, EOS, EOS, EOS], [S, Z, Z, Z, F, T]),
        ([START, START, START, START, START, START, EOS, END, EOS], [S, Z, Z, Z, F, S, Z, F, T]),
    ],
)
def test_exit_end_token(tokens, kinds):
    """Leaves when the arg-max at a latent position is `end`, at least one latent, at most `steps`.

    EOS does nothing.
    """
    trajectory, num_calls = run(
        case("qwen2"), case("qwen2").mechanism(steps=3, exit="end_token"), tokens
    )
    assert trajectory.kinds.tolist() == kinds and trajectory.stop_reason == "eos"
    assert num_calls == len(kinds)


def free_latents(c, num_steps):
    trajectory, _ = run(c, c.mechanism(steps=num_steps), [START, EOS], num_steps + 4)
    return trajectory.latents


@pytest.mark.parametrize("target", [0, 2, 4])
def test_exit_latent_end_stops_at_the_hand_set_vector(target):
    """The end vector is put at latent `target` of a free span: that latent is the last one."""
    c, num_steps = build_case("qwen2"), 5
    latents = free_latents(c, num_steps)
    setattr(c.model, END_VECTOR_ATTRIBUTE, torch.nn.Parameter(latents[target].clone()))
    distances = (latents - latents[target]).square().mean(-1)
    others = torch.cat([distances[:target], distances[target + 1 :]])
    threshold = float(others.min()) / 2
    config = c.mechanism(steps=num_steps, exit="latent_end", latent_end_threshold=threshold)
    trajectory, _ = run(c, config, [START, EOS])
    assert trajectory.kinds.tolist() == [S, *[Z] * (target + 1), F, T]
    torch.testing.assert_close(trajectory.latents, latents[: target + 1])


def test_exit_latent_end_is_capped_and_threshold_is_a_mean_square():
    c, num_steps = build_case("qwen2"), 3
    latents = free_latents(c, num_steps)
    far = latents[0] + torch.full((32,), 10.0)
    setattr(c.model, END_VECTOR_ATTRIBUTE, torch.nn.Parameter(far))
    distance = sum((float(a) - float(b)) ** 2 for a, b in zip(latents[0], far, strict=True)) / 32
    for threshold, num_latents in ((distance * 1.001, 1), (20.0, 3)):
        config = c.mechanism(steps=num_steps, exit="latent_end", latent_end_threshold=threshold)
        trajectory, _ = run(c, config, [START, EOS])
        assert trajectory.kinds.tolist() == [S, *[Z] * num_latents, F, T], threshold


def test_latent_override_enters_at_its_positions_and_is_recorded():
    c = case("qwen2")
    table = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    given, _ = run(
        c, c.mechanism(steps=2), [START, START, EOS], latent_override=LatentOverride(table)
    )
    assert given.spans == [LatentSpan(1, 2), LatentSpan(5, 2)] and torch.equal(
        given.latents, table
    )
    # unscripted: the recorded log-probs are those of a plain forward that reads the table's
    # vectors
    request = c.request(seeds=[4], latent_override=LatentOverride(table))
    sampled = c.engine(c.mechanism(steps=2)).generate([request], sampling(10))[0][0]
    assert len(sampled.latents) >= 2 and torch.equal(sampled.latents[:2], table[:2])
    expected = slow_reading.log_probs(c, sampled, None, "full")
    assert sampled.rollout_log_probs.tolist() == pytest.approx(expected, abs=1e-4)


def test_latent_override_of_one_request_leaves_the_others():
    c = case("qwen2")
    table = torch.zeros(12, 32)
    requests = [
        c.request(seeds=range(4)),
        c.request("? ?", seeds=range(4, 8), latent_override=LatentOverride(table)),
    ]
    plain, overridden = c.engine().generate(requests, sampling(12))
    alone = c.engine().generate(requests[:1], sampling(12))[0]
    for a, b in zip(plain, alone, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=0, atol=1e-5)
    assert sum(len(t.latents) for t in overridden) > 4 and all(
        (t.latents == 0).all() for t in overridden
    )


def test_latent_override_of_one_span_leaves_the_others_to_the_model():
    """By hand: which vectors stand where."""
    c = case("qwen2")
    table = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    own, _ = run(c, c.mechanism(steps=2), [START, START, EOS])
    given, _ = run(
        c,
        c.mechanism(steps=2),
        [START, START, EOS],
        latent_override=LatentOverride(table, "span1"),
    )
    assert torch.equal(given.latents[:2], own.latents[:2]) and torch.equal(
        given.latents[2:], table[:2]
    )
    given, _ = run(
        c,
        c.mechanism(steps=4),
        [START, START, EOS],
        latent_override=LatentOverride(table, "span0"),
    )
    assert torch.equal(given.latents[:4], table[[0, 1, 2, 0]]), "number i mod 3"
    assert float((given.latents[4:] - table[[1, 2, 0, 1]]).abs().min()) > 0
    again, _ = run(
        c,
        c.mechanism(steps=2),
        [START, START, EOS],
        latent_override=LatentOverride(table, "vision"),
    )
    assert torch.equal(again.latents, own.latents), "no image embeddings among a span's latents"


def test_no_steps_leaves_the_delimiters_and_no_spans_forces_text():
    c = case("qwen2")
    markers, _ = run(c, c.mechanism(steps=2), [START, START, EOS], steps=0)
    assert markers.kinds.tolist() == [S, F, S, F, T] and markers.latents.shape == (0, 32)
    requests = [c.request(seeds=range(8)), c.request(seeds=range(8), max_spans=0)]
    free, forced = c.engine().generate(requests, sampling(10))
    assert any(t.spans for t in free) and all((t.kinds == T).all() for t in forced)
    bounded = c.engine(c.mechanism(max_spans=1)).generate(requests[:1], sampling(10))[0]
    assert max(t.kinds.tolist().count(S) for t in bounded) == 1


def test_blind_after_span_hides_the_image_from_what_follows():
    """Recorded log-probs are those of a plain forward whose mask is drawn by hand.

    Text before the span still sees the image.
    """
    c = case("qwen2_5_vl")
    request = c.request(images=c.images(1), seeds=range(24), blind_after_span=True)
    group = c.engine(c.mechanism(steps=2)).generate([request], sampling(10))[0]
    num_after = num_before = 0
    for t in group:
        expected = slow_reading.log_probs(c, t, request.images, "blind_after_span")
        assert t.rollout_log_probs.tolist() == pytest.approx(expected, abs=1e-4)
        ends = [i for i, kind in enumerate(t.kinds.tolist()) if kind == F]
        num_after += bool(ends) and ends[0] + 1 < len(t.kinds)
        num_before += bool(ends) and t.kinds[0] == T
    assert num_after > 2 and num_before > 0


def test_head_is_applied_to_what_is_fed():
    """With a head, the first latent is head(h(start)), h by a forward over prompt and start."""
    c = build_case("qwen2", head="mlp")
    config = c.mechanism(steps=2, head="mlp")
    trajectory, _ = run(c, config, [START, EOS])
    with torch.no_grad():
        ids = torch.cat([trajectory.prompt_ids, trajectory.token_ids[:1]])[None]
        hidden = c.model.model(input_ids=ids).last_hidden_state[0, -1]
        expected = c.model.lvr_head.mlp(c.model.lvr_head.ln_q(hidden))
    torch.testing.assert_close(trajectory.latents[0], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, hidden, atol=0.1)
