"""ILVR in the core: an official folder's config, interleaved spans, rollout = replay.

Spans have a length of their own.
"""

import dataclasses
import functools
import json

import pytest
import torch
from latent_cases import WORDS, Case, build_case, sampling

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import ILVR
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import read_mechanism
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.trajectory import PositionKind as K

ILVR_TOKENS = tuple(ILVR.published_tokens.values())
START, PAD, END = ILVR_TOKENS
STEPS = 4


@functools.cache
def ilvr_case(name):
    """`latent_cases`' reactive model under ILVR's tokens.

    `end` is likely enough to stop some spans early.
    """
    source = build_case(name)
    model, tokenizer, processor = getattr(tiny, f"tiny_{name}")(
        WORDS, latent_tokens=(*ILVR_TOKENS, "<|unused|>")
    )
    assert len(tokenizer) == len(source.tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.load_state_dict(source.model.state_dict())
    mechanism = ILVR.from_tokens(tokenizer.get_vocab(), steps=STEPS)
    c = Case(name, model, tokenizer, processor, ModelAdapter(model, mechanism))
    with torch.no_grad():
        model.lm_head.bias.zero_()
        for token, value in ((START, 4.0), (END, 4.0), (tokenizer.eos_token, -0.5)):
            model.lm_head.bias[c.token_id(token)] = value
    return c


def mechanism_of(c, **changes):
    return ILVR.from_tokens(c.tokenizer.get_vocab(), steps=STEPS, **changes)


@functools.cache
def recorded(name):
    c = ilvr_case(name)
    config = mechanism_of(c)
    banned = set(range(len(c.tokenizer))) - {
        c.token_id(token) for token in (START, "3", "7", "<|im_end|>")
    }
    engine = HFRolloutEngine(c.model, config, [c.eos_id], banned)
    images = [c.images(1, seed=1), c.images(2, seed=2), None] if c.processor else [None] * 3
    requests = [
        c.request(text, image, range(8 * idx, 8 * idx + 8))
        for idx, (text, image) in enumerate(
            zip(("read red ?", "? ?", "blue"), images, strict=True)
        )
    ]
    groups = engine.generate(requests, sampling(24))
    return (
        [t for g in groups for t in g],
        [r.images for r, g in zip(requests, groups, strict=True) for _ in g],
        requests,
        engine,
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3"])
def test_spans_repeat_between_texts_and_end_at_the_cap_or_before(name):
    trajectories, _, _, _ = recorded(name)
    lengths = {span.length for t in trajectories for span in t.spans[:-1]}
    assert max(lengths) == STEPS and min(lengths) < STEPS, "both exits occur"
    assert max(len(t.spans) for t in trajectories) >= 3
    for t in trajectories:
        for span in t.spans:
            after = span.start + span.length
            assert t.kinds[span.start - 1] == K.START
            if after < len(t.kinds):
                assert t.kinds[after] == K.FORCED and t.token_ids[after] == ilvr_case(
                    name
                ).token_id(END)
    # an end, a word, and another span
    assert any(
        torch.equal(t.kinds[i : i + 2], torch.tensor([K.FORCED, K.TEXT]))
        for t in trajectories
        for i in range(20)
    )
    assert min(len(t.spans) for t in trajectories) == 0


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3"])
@torch.no_grad()
def test_rollout_equals_replay_and_recompute(name):
    trajectories, images, _, _ = recorded(name)
    c = ilvr_case(name)
    batch = collate(trajectories, images, c.adapter, "full", "both")
    log_probs_BT, _ = replay(c.adapter, batch)
    for row, t in enumerate(trajectories):
        values = log_probs_BT[row][batch.valid_BT[row]][len(t.prompt_ids) :]
        torch.testing.assert_close(values, t.rollout_log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        recompute_latents(c.adapter, batch), batch.latents_NH, rtol=0, atol=1e-4
    )


def test_a_row_does_not_depend_on_its_batch():
    """Published decoding takes one row at a time."""
    trajectories, _, requests, engine = recorded("qwen2_5_vl")
    alone = engine.generate([dataclasses.replace(requests[1], seeds=[11])], sampling(24))[0][0]
    together = trajectories[11]
    assert torch.equal(alone.token_ids, together.token_ids) and torch.equal(
        alone.kinds, together.kinds
    )
    torch.testing.assert_close(alone.latents, together.latents, rtol=0, atol=1e-4)


def test_an_official_folder_gives_its_own_span_length(tmp_path):
    c = ilvr_case("qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2_5_vl", "latent_size": 6}))
    assert read_mechanism(tmp_path, c.tokenizer) == mechanism_of(c).replace(steps=6)
    path.write_text(json.dumps({"latent_size": 0}))
    with pytest.raises(CheckpointError, match="latent_size: not a valid count; got 0"):
        read_mechanism(tmp_path, c.tokenizer)
    path.write_text(json.dumps({"latent_size": 6}))
    with pytest.raises(CheckpointError, match="not an ILVR checkpoint"):
        read_mechanism(tmp_path, build_case("qwen3").tokenizer)
