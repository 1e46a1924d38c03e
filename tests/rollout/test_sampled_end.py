"""Spans whose end is the model's to write, as the published code of LVR decodes and trains.

The published decoding is written out here by itself: an uncached forward for each position, nothing
of the package's machinery.
"""

import pytest
import slow_reading
import torch
from latent_cases import SAMPLED, build_case, case, sampling

from grpo_latent.errors import ConfigError
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rewards.view import reward_view
from grpo_latent.trajectory import PositionKind as K

START, LATENT_END, END, SEVEN, EOS = (
    "<|lvr_start|>",
    "<|lvr_latent_end|>",
    "<|lvr_end|>",
    "7",
    "<|im_end|>",
)
T, S, Z, F, E = int(K.TEXT), int(K.START), int(K.LATENT), int(K.FORCED), int(K.END)
DRAWN = (*SAMPLED, LATENT_END, END)


def published(c, **changes):
    """The mechanism of an official folder."""
    own = dict(latent_end_token=LATENT_END, latent_end_id=c.token_id(LATENT_END), end_vector=False)
    return c.mechanism(span_end="sampled", **own | changes)


@pytest.fixture(scope="module", params=["qwen2", "qwen2_5_vl"])
def c(request):
    """A model that likes to end its spans, at times."""
    built = build_case(request.param)
    with torch.no_grad():
        for token in (LATENT_END, END):
            built.model.lm_head.bias[built.token_id(token)] += 2.0
    return built


@torch.no_grad()
def published_decoding(c, request, num_steps, max_new_tokens):
    """Greedy: h for exactly `num_steps` positions behind `start`, then the sampler again."""
    table = c.model.get_input_embeddings().weight
    allowed = [c.token_id(token) for token in DRAWN]
    vectors, tokens, kinds, left = list(table[request.prompt_ids]), [], [], 0
    positions = slow_reading.positions(c, request.prompt_ids, request.images, max_new_tokens)
    for _ in range(max_new_tokens):
        length = len(vectors)
        vision = {}
        if request.images is not None:
            vision = dict(
                pixel_values=request.images.pixel_values,
                image_grid_thw=request.images.image_grid_thw,
            )
        hidden = c.model(
            inputs_embeds=torch.stack(vectors)[None],
            position_ids=positions[..., :length] if c.processor else positions[0, :, :length],
            output_hidden_states=True,
            use_cache=False,
            **vision,
        ).hidden_states[-1][0, -1]
        if left:
            left -= 1
            tokens.append(c.token_id("<|lvr|>"))
            kinds.append(Z)
            vectors.append(hidden)
            continue
        logits = c.model.lm_head(hidden).tolist()
        token = max(sorted(allowed), key=lambda i: logits[i])
        tokens.append(token)
        kinds.append(
            {START: S, LATENT_END: E, END: E}.get(c.tokenizer.convert_ids_to_tokens(token), T)
        )
        left = num_steps if token == c.token_id(START) else 0
        vectors.append(table[token])
        if token == c.eos_id:
            break
    return tokens, kinds


def requests_of(c):
    texts = ("read red ?", "? ?", "blue green read", "read read", "green ? blue ?", "red")
    images = [c.images(1, seed=i) if c.processor and i % 2 else None for i in range(len(texts))]
    return [c.request(text, pixels, seeds=[0]) for text, pixels in zip(texts, images, strict=True)]


def test_decoding_is_the_published_one(c):
    """All rows at once in the engine; ends are written, left out, and written twice."""
    requests = requests_of(c)
    engine = c.engine(published(c, steps=2), DRAWN)
    groups = engine.generate(requests, sampling(24, temperature=0))
    followed = set()
    for request, (trajectory,) in zip(requests, groups, strict=True):
        tokens, kinds = published_decoding(c, request, 2, 24)
        assert trajectory.kinds.tolist() == kinds and trajectory.token_ids.tolist() == tokens
        followed |= {b for a, b in zip(kinds, kinds[1:], strict=False) if a == Z and b != Z}
    assert E in followed, "an end follows some span"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sampled_end_acts_and_replays(c, side):
    """Rollout = replay at every action, ends among them; switched off, they are none."""
    mechanism = published(c, steps=2)
    requests = [c.request("read red ?", seeds=range(12)), c.request("? ?", seeds=range(12))]
    groups = c.engine(mechanism, DRAWN).generate(requests, sampling(16))
    trajectories = [t for group in groups for t in group]
    sequences = collate(trajectories, [None] * len(trajectories), c.adapter, "full", side)
    log_probs_BT, _ = replay(c.adapter, sequences)
    num_ends = 0
    for row, trajectory in enumerate(trajectories):
        valid = sequences.valid_BT[row]
        replayed_T = log_probs_BT[row][valid][len(trajectory.prompt_ids) :]
        acted = trajectory.response_mask()
        assert float((replayed_T - trajectory.rollout_log_probs)[acted].abs().max()) <= 1e-4
        is_end = trajectory.kinds == K.END
        num_ends += int(is_end.sum())
        assert bool((trajectory.rollout_log_probs[is_end] < 0).all()) and bool(acted[is_end].all())
        assert not trajectory.response_mask(end_is_action=False)[is_end].any()
        assert not (trajectory.kinds == K.FORCED).any()
    assert num_ends > 10
    masked_BT, _ = replay(c.adapter, sequences, end_is_action=False)
    assert not masked_BT[sequences.kinds_BT == K.END].any()


def test_ends_are_no_text_wherever_they_stand(c):
    """What a reward or a harness reads has no delimiter in it, and the model's own words are all there."""
    mechanism = published(c, steps=1)
    group = c.engine(mechanism, DRAWN).generate([c.request(seeds=range(40))], sampling(12))[0]
    words = {SEVEN, "3", "<answer>"}
    for trajectory in group:
        view = reward_view(trajectory, c.tokenizer.decode, {c.eos_id})
        assert set(view.solution_str.split()) <= words and view.latent["num_forced_ends"] == 0
        assert view.latent["num_spans"] == len(trajectory.spans)


def test_the_own_default_stays_forced():
    mechanism = case("qwen2").mechanism()
    assert mechanism.span_end == "forced" and not mechanism.closing_ids
    assert case("qwen2").token_id(END) in mechanism.banned_ids


def test_values_are_checked():
    for changes in ({"span_end": "maybe"}, {"end_is_action": "yes"}, {"end_vector": 1}):
        with pytest.raises(ConfigError, match=f"latent.{next(iter(changes))}"):
            case("qwen2").mechanism(**changes)
    with pytest.raises(ConfigError, match="needs the learned end vector"):
        published(case("qwen2"), exit="latent_end")
