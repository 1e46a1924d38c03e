"""Engine `hf` against a loop a trajectory and against uncached forwards.

The loop has a `DynamicCache`, the forwards hand-built embeddings.

Not covered here: exits other than `steps` (test_hf_spans.py) and truncated sampling
(test_sampling.py).
"""

from functools import partial

import pytest
import slow_reading
import torch
from latent_cases import ALL_NAMES, TEXT_NAMES, case, sampling

from grpo_latent.models.attention import FOLDED_SDPA
from grpo_latent.models.packed_linears import packs
from grpo_latent.rollout import prefill
from grpo_latent.trajectory import PositionKind as K

TEMPERATURE = 2.0


def mixed_requests(c):
    """Prompts that differ in length, number of images and order; text only for text models."""
    if c.name in TEXT_NAMES:
        texts = ("read red ?", "read blue blue green ? ?", "?")
        return [
            c.request(text, seeds=range(5 * idx, 5 * idx + 5)) for idx, text in enumerate(texts)
        ]
    return [
        c.request("read red ?", c.images(1, seed=1), range(5)),
        c.request("read blue green ? ?", c.images(2, seed=2), range(5, 10), image_first=True),
        c.request("read green ?", None, range(10, 15)),
        c.request("read ?", c.images(1, seed=3, size=(56, 28)), range(15, 20), steps=2),
    ]


def rollouts(c, visibility, temperature=TEMPERATURE, **engine_arguments):
    requests = mixed_requests(c)
    config = c.mechanism(visibility=visibility)
    return requests, c.engine(config, **engine_arguments).generate(
        requests, sampling(16, temperature=temperature)
    )


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_tokens_kinds_and_latents_equal_the_naive_loop(name, visibility):
    c = case(name)
    requests, groups = rollouts(c, visibility)
    num_spans = []
    for request, group in zip(requests, groups, strict=True):
        for seed, trajectory in list(zip(request.seeds, group, strict=True))[:3]:
            naive = slow_reading.rollout(
                c,
                c.mechanism(visibility=visibility),
                request,
                seed,
                sampling(16, temperature=TEMPERATURE),
                c.sampled_ids,
            )
            assert trajectory.token_ids.tolist() == naive["token_ids"]
            assert trajectory.kinds.tolist() == naive["kinds"]
            if naive["latents"]:
                torch.testing.assert_close(
                    trajectory.latents, torch.stack(naive["latents"]), rtol=0, atol=1e-4
                )
            num_spans.append(len(trajectory.spans))
    assert sum(num_spans) >= 3, "this seed exercises too few spans"
    kinds = torch.nn.utils.rnn.pad_sequence(
        [t.kinds for group in groups for t in group], batch_first=True
    )
    modes = [(kinds == kind).any(0) for kind in (K.TEXT, K.LATENT)]
    assert (modes[0] & modes[1]).any(), "no step at which rows are in different modes"


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_log_probs_equal_an_uncached_forward(name, visibility):
    """Each recorded log-prob is that of a plain forward over the whole sequence."""
    c, temperature = case(name), TEMPERATURE
    requests, groups = rollouts(c, visibility, temperature)
    for request, group in zip(requests, groups, strict=True):
        for trajectory in group[:3]:
            expected = slow_reading.log_probs(
                c, trajectory, request.images, visibility, temperature
            )
            assert trajectory.rollout_log_probs.tolist() == pytest.approx(expected, abs=1e-4)


def test_latents_matter_to_these_log_probs():
    """Wrong latents move the uncached log-probs by far more than 1e-4.

    A control: without that, the two tests above would say nothing.
    """
    c = case("qwen2_5_vl")
    requests, groups = rollouts(c, "full")
    gaps = []
    for trajectory in groups[0]:
        right = slow_reading.log_probs(c, trajectory, requests[0].images, "full")
        trajectory.latents.copy_(trajectory.latents.flip(0))
        wrong = slow_reading.log_probs(c, trajectory, requests[0].images, "full")
        gaps.append(max(abs(a - b) for a, b in zip(right, wrong, strict=True)))
    assert max(gaps) > 0.1


def assert_same(first, second, atol):
    assert torch.equal(first.token_ids, second.token_ids) and torch.equal(
        first.kinds, second.kinds
    )
    assert first.stop_reason == second.stop_reason
    for name in ("latents", "rollout_log_probs", "sampling_log_probs"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=atol)


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3"])
def test_prompts_of_different_lengths_are_prefilled_apart_and_decode_as_together(
    monkeypatch, name, visibility
):
    """A bucket a length, in another order than the requests', against one prefill of all."""
    c, shapes = case(name), []
    _, together = rollouts(c, visibility)
    monkeypatch.setattr(prefill, "MIN_POSITIONS", 1)
    monkeypatch.setattr(prefill, "MIN_FILL", 1.0)
    requests = mixed_requests(c)
    engine = c.engine(c.mechanism(visibility=visibility))
    inner = engine.adapter.forward_hidden
    monkeypatch.setattr(
        engine.adapter,
        "forward_hidden",
        lambda ids, *args: shapes.append(ids.shape) or inner(ids, *args),
    )
    apart = engine.generate(requests, sampling(16, temperature=TEMPERATURE))
    lengths = sorted({len(request.prompt_ids) for request in requests}, reverse=True)
    assert [shape[1] for shape in shapes] == lengths and len(lengths) > 2
    assert sum(shape[0] for shape in shapes) == len(requests)
    for group, other in zip(apart, together, strict=True):
        for a, b in zip(group, other, strict=True):
            assert_same(a, b, atol=5e-5)


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_batch_composition_order_and_compaction_change_nothing(visibility):
    """Rows end at steps 1 to 24, so that stopped rows are dropped several times.

    Each row alone gives the same.
    """
    c = case("qwen2_5_vl")
    requests = mixed_requests(c)
    engine, params = (
        c.engine(c.mechanism(visibility=visibility)),
        sampling(24, temperature=TEMPERATURE),
    )
    together = engine.generate(requests, params)
    lengths = {len(t.token_ids) for group in together for t in group}
    assert min(lengths) <= 3 and max(lengths) == 24, lengths
    reversed_order = engine.generate(requests[::-1], params)[::-1]
    in_chunks = c.engine(c.mechanism(visibility=visibility), max_batch_rows=7).generate(
        requests, params
    )
    for request, group, other, chunked in zip(
        requests, together, reversed_order, in_chunks, strict=True
    ):
        for idx, seed in enumerate(request.seeds):
            alone_request = c.request(seeds=[seed])
            object.__setattr__(alone_request, "prompt_ids", request.prompt_ids)
            object.__setattr__(alone_request, "images", request.images)
            object.__setattr__(alone_request, "steps", request.steps)
            alone = engine.generate([alone_request], params)[0][0]
            for variant in (other[idx], chunked[idx], alone):
                assert_same(group[idx], variant, atol=5e-5)


def test_same_requests_give_bit_identical_trajectories():
    c = case("qwen2_5_vl")
    _, first = rollouts(c, "full")
    _, second = rollouts(c, "full")
    for group, again in zip(first, second, strict=True):
        for a, b in zip(group, again, strict=True):
            assert_same(a, b, atol=0)


def test_seeds_decide():
    c = case("qwen2_5_vl")
    group = c.engine().generate([c.request(images=c.images(1), seeds=[5, 6, 7, 5])], sampling())[0]
    assert_same(group[0], group[3], atol=1e-5)
    assert len({tuple(t.token_ids.tolist()) for t in group[:3]}) > 1


def test_eager_attention_gives_the_same():
    """`eager` takes neither the folded attention nor sdpa."""
    c = case("qwen2_5_vl")
    requests, folded = rollouts(c, "latents_only")
    try:
        c.model.set_attn_implementation("eager")
        eager = c.engine(c.mechanism(visibility="latents_only")).generate(
            requests, sampling(16, temperature=TEMPERATURE)
        )
    finally:
        c.model.set_attn_implementation("sdpa")
    for group, other in zip(folded, eager, strict=True):
        for a, b in zip(group, other, strict=True):
            assert_same(a, b, atol=5e-5)


def test_vision_runs_once_an_image_and_the_prompt_once_a_group():
    c, seen = case("qwen2_5_vl"), []
    handles = [
        c.model.model.visual.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append("vision"), with_kwargs=True
        ),
        c.model.model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ),
    ]
    requests = [c.request(images=c.images(1, seed=s), seeds=range(8)) for s in (1, 2)]
    try:
        c.engine().generate(requests, sampling(4))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [(2, len(requests[0].prompt_ids)), "vision"]


def test_a_prompt_of_one_token_beside_a_prompt_with_an_image():
    c = case("qwen2_5_vl")
    short = c.request(seeds=range(5))
    object.__setattr__(short, "prompt_ids", short.prompt_ids[:1])
    engine, params = c.engine(), sampling(10)
    alone = engine.generate([short], params)[0]
    beside = engine.generate([c.request(images=c.images(2), seeds=[1]), short], params)[1]
    for a, b in zip(alone, beside, strict=True):
        assert_same(a, b, atol=5e-5)


def test_start_with_id_zero():
    """0 also stands at the positions of rows that have stopped: those must not open spans."""
    c = case("qwen2")
    config = c.mechanism().replace(start_id=0, start_token="<|endoftext|>")
    sampled = ("<|endoftext|>", "<|im_end|>", "7")
    request = c.request(seeds=range(24))
    group = c.engine(config, sampled).generate([request], sampling(12, temperature=TEMPERATURE))[0]
    assert {len(t.token_ids) for t in group} > {12} and sum(len(t.spans) for t in group) > 4
    for seed in range(24):
        ids = [c.token_id(token) for token in sampled]
        naive = slow_reading.rollout(
            c, config, request, seed, sampling(12, temperature=TEMPERATURE), ids
        )
        assert (
            group[seed].token_ids.tolist() == naive["token_ids"]
            and group[seed].kinds.tolist() == naive["kinds"]
        )


@pytest.mark.parametrize("pack_linears", [True, False])
def test_prefill_and_decoding_use_the_attention_and_linears_meant_for_them(
    monkeypatch, pack_linears
):
    """Folded attention has no mask of its own making, so the prefill must not run in it.

    Decoding should. Linears are packed in both, and the model's own again afterwards.
    """
    c, seen = case("qwen2_5_vl"), {}
    engine = c.engine(pack_linears=pack_linears)
    layer = engine.adapter.decoder.layers[0].mlp.up_proj

    def observed(name, inner, *args):
        seen[name] = (engine.adapter.text_config._attn_implementation, "forward" in vars(layer))
        return inner(*args)

    for name in ("forward_hidden", "decode_hidden"):
        monkeypatch.setattr(
            engine.adapter, name, partial(observed, name, getattr(engine.adapter, name))
        )
    engine.generate([c.request(images=c.images(1))], sampling(3))
    packed = pack_linears and packs(layer.weight)
    assert seen == {"forward_hidden": ("sdpa", packed), "decode_hidden": (FOLDED_SDPA, packed)}
    assert "forward" not in vars(layer)


@pytest.mark.skipif(not packs(torch.zeros(1, 1)), reason="torch without oneDNN")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3"])
def test_packed_linears_move_log_probs_by_rounding_only(name):
    c = case(name)
    _, packed = rollouts(c, "full")
    _, plain = rollouts(c, "full", pack_linears=False)
    for group, other in zip(packed, plain, strict=True):
        for a, b in zip(group, other, strict=True):
            assert_same(a, b, atol=1e-4)


def test_trajectories_are_ordinary_tensors():
    """Nothing of inference mode leaves the engine: training differentiates through it."""
    c = case("qwen2_5_vl")
    trajectory = next(t for t in rollouts(c, "full")[1][0] if t.spans)
    for value in vars(trajectory).values():
        assert not isinstance(value, torch.Tensor) or not value.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (trajectory.latents * weight).sum().backward()
    assert weight.grad is not None


def test_no_requests_no_trajectories_and_training_mode_is_restored():
    c = case("qwen2")
    assert c.engine().generate([], sampling()) == []
    c.model.train()
    try:
        c.engine().generate([c.request()], sampling(2))
        assert c.model.training
    finally:
        c.model.eval()
