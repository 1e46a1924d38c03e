"""The three latent gradients against central differences of what each of them states.

In float64.

And the chain run by passes against the chain over a cache: values and gradients.
"""

import dataclasses
import functools

import pytest
import torch
from latent_cases import build_case, norms_in_double, sampling

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.recompute import GRADIENTS, latents_by_passes, recompute_latents
from grpo_latent.models.replay import replay, replay_hidden
from grpo_latent.models.sequences import collate
from grpo_latent.trajectory import PositionKind as K


def double_case():
    c = build_case("qwen2")
    group = c.engine(c.mechanism(steps=4)).generate([c.request(seeds=range(6))], sampling(14))[0]
    assert max(len(trajectory.spans) for trajectory in group) >= 2
    c.model.double()
    batch = collate(group, [None] * 6, c.adapter, "full")
    batch = batch.with_latents(batch.latents_NH.double())
    return c, batch.with_latents(recompute_latents(c.adapter, batch))


def objective(c, batch, latents_NH):
    return (
        replay_hidden(c.adapter, batch.with_latents(latents_NH))[batch.action_mask_BT()]
        .sin()
        .sum()
    )


def stated(c, batch, gradient):
    """The latents as a function of the weights, z₀ frozen where the mode freezes it."""
    if gradient == "cut":
        return batch.latents_NH
    if gradient == "bptt":
        return recompute_latents(c.adapter, batch)
    hidden_BTH = replay_hidden(c.adapter, batch)
    return torch.stack(
        [
            hidden_BTH[row, column - 1]
            for row, column in (batch.kinds_BT == K.LATENT).nonzero().tolist()
        ]
    )


def derivatives():
    """Directional derivative of each mode: (by backward, by central difference)."""
    c, batch = double_case()
    weight = c.model.model.layers[0].self_attn.v_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    found = {}
    for gradient in GRADIENTS:
        weight.grad = None
        latents_NH = recompute_latents(c.adapter, batch, gradient)
        torch.testing.assert_close(latents_NH, batch.latents_NH, rtol=0, atol=1e-5)
        objective(c, batch, latents_NH).backward()
        analytic, step, values = float((weight.grad * direction).sum()), 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                weight += sign * step * direction
                values.append(float(objective(c, batch, stated(c, batch, gradient))))
            weight += step * direction
        found[gradient] = (analytic, (values[0] - values[1]) / (2 * step))
    weight.grad = None
    return found


def test_gradients_equal_central_differences_and_differ_from_each_other(monkeypatch):
    norms_in_double(monkeypatch)
    found = derivatives()
    for gradient, (analytic, numeric) in found.items():
        assert analytic == pytest.approx(numeric, rel=1e-3), gradient
    values = [analytic for analytic, _ in found.values()]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(values[first] - values[second]) > 0.02 * abs(values[second])


def test_unknown_gradient_is_an_error():
    c, batch = double_case()
    with pytest.raises(ConfigError, match="one of"):
        recompute_latents(c.adapter, batch, "some")


CASES = {"qwen2_5_vl": "latents_only", "qwen3": "full", "slots": "full"}


@functools.cache
def recorded(name):
    """Gives (case, adapter, trajectories padded on the right, the same on both sides).

    Most rows have several latents.
    """
    c, changes = build_case("qwen2_vl" if name == "slots" else name), {"visibility": CASES[name]}
    if name == "slots":
        changes = dict(mechanism="ivt_lr", steps=2, top_k_image=2)
    requests = []
    for row, text in enumerate(("read ?", "? red ? blue ?", "red")):
        images = c.images(1, seed=row) if c.processor and row != 1 else None
        requests.append(c.request(text, images, range(3 * row, 3 * row + 3)))
    engine = c.engine(c.mechanism(**changes))
    groups = engine.generate(requests, sampling(14, temperature=2.0))
    trajectories = [t for group in groups for t in group]
    images = [
        request.images for request, group in zip(requests, groups, strict=True) for _ in group
    ]
    sides = [
        collate(trajectories, images, engine.adapter, CASES[name], side)
        for side in ("right", "both")
    ]
    return c, engine.adapter, *sides


def by_passes(adapter, sequences, gradient, num_passes=None, seen=None):
    """Through a forward of ours in place of verl's."""

    def make(part, rows_M, columns_M):
        if seen is not None:
            seen.append(part)
        return replay_hidden(adapter, part)[rows_M, columns_M]

    longest = (
        int((sequences.kinds_BT == K.LATENT).sum(-1).max()) if num_passes is None else num_passes
    )
    return latents_by_passes(sequences, adapter.mechanism, longest, gradient, make)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", CASES)
def test_by_passes_is_over_a_cache(name, gradient):
    """Values and the gradient of every parameter, whatever vectors were recorded at latents."""
    c, adapter, sequences, aligned = recorded(name)
    sequences = sequences.with_latents(
        sequences.latents_NH.masked_fill(sequences.is_made_N[:, None], 0.0)
    )
    found = []
    for given, run in ((aligned, recompute_latents), (sequences, by_passes)):
        c.model.zero_grad()
        latents_NH = run(adapter, given, gradient)
        assert latents_NH.requires_grad == (gradient != "cut")
        replay(adapter, given.with_latents(latents_NH), temperature=2.0)[0].sum().backward()
        gradients = {
            n: p.grad.clone() for n, p in c.model.named_parameters() if p.grad is not None
        }
        found.append((latents_NH.detach(), gradients))
    (cached_NH, cached), (passed_NH, passed) = found
    assert len(cached_NH) > 8
    torch.testing.assert_close(passed_NH, cached_NH, rtol=0, atol=1e-4)
    assert passed.keys() == cached.keys() and len(cached) > 20
    for parameter, gradient_ in cached.items():
        scale = float(gradient_.abs().max())
        torch.testing.assert_close(
            passed[parameter], gradient_, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=parameter
        )


def test_passes_run_the_needed_columns_only_and_as_often_as_they_are_told():
    _, adapter, sequences, aligned = recorded("qwen2_5_vl")
    seen: list = []
    made_NH = by_passes(adapter, sequences, "one_hop", num_passes=5, seen=seen)
    assert len(seen) == 6
    last = int(sequences.sources(adapter.mechanism)[1].max())
    assert all(part.kinds_BT.shape[1] == last + 1 < sequences.kinds_BT.shape[1] for part in seen)
    torch.testing.assert_close(made_NH, recompute_latents(adapter, aligned), rtol=0, atol=1e-4)
    packed = dataclasses.replace(sequences, is_packed=True)
    by_passes(adapter, packed, "cut", num_passes=1, seen=seen)
    assert seen[-1].kinds_BT.shape == sequences.kinds_BT.shape, "packed sequences cannot be cut"
    assert by_passes(adapter, sequences, "bptt", num_passes=0) is sequences.latents_NH
    # a rank without latents runs as many forwards as the others: their collectives meet
    kinds_BT = sequences.kinds_BT.masked_fill(sequences.recorded_mask_BT, int(K.TEXT))
    empty = dataclasses.replace(sequences, kinds_BT=kinds_BT, latents_NH=sequences.latents_NH[:0])
    for gradient, num_forwards in (("cut", 3), ("one_hop", 4), ("bptt", 3)):
        seen.clear()
        assert by_passes(adapter, empty, gradient, num_passes=3, seen=seen).shape[0] == 0
        assert len(seen) == num_forwards and seen[0].kinds_BT.shape == sequences.kinds_BT.shape
    # too few passes leave what depends on more latents as it was recorded
    zeroed = sequences.with_latents(torch.zeros_like(sequences.latents_NH))
    assert (
        float((by_passes(adapter, zeroed, "cut", num_passes=1) - made_NH.detach()).abs().max())
        > 1e-2
    )


class Halves(Mechanism):
    """Half a token's embedding beside its vector."""

    def compose(self, model, embeds_MH, recorded_MH):
        return 0.5 * embeds_MH + recorded_MH


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_mechanism_composes_is_fed_and_what_it_makes_is_returned(gradient):
    """Over a cache and by passes, where sampled tokens are MIXED."""
    c, _, _, aligned = recorded("qwen3")
    adapter, found = ModelAdapter(c.model, Halves()), []
    # the first six positions of each completion
    kinds_BT, first = aligned.kinds_BT, int((aligned.kinds_BT >= int(K.TEXT)).any(0).nonzero()[0])
    mixed_BT = torch.zeros_like(aligned.valid_BT)
    mixed_BT[:, first : first + 6] = aligned.valid_BT[:, first : first + 6]
    kinds_BT = kinds_BT.masked_fill(kinds_BT >= int(K.TEXT), int(K.TEXT)).masked_fill(
        mixed_BT, int(K.MIXED)
    )
    nothing_NH = torch.zeros(int(mixed_BT.sum()), c.adapter.hidden_size)
    mixed = dataclasses.replace(
        aligned, kinds_BT=kinds_BT, latents_NH=nothing_NH, latent_aux_MA=None
    )
    for run in (recompute_latents, lambda *args: by_passes(*args, num_passes=6)):
        c.model.zero_grad()
        latents_NH = run(adapter, mixed, gradient)
        replay(adapter, mixed.with_latents(latents_NH), temperature=2.0)[0].sum().backward()
        found.append(
            (latents_NH.detach(), c.model.model.layers[0].mlp.up_proj.weight.grad.clone())
        )
    (cached_NH, cached), (passed_NH, passed) = found
    torch.testing.assert_close(passed_NH, cached_NH, rtol=0, atol=1e-3)
    torch.testing.assert_close(passed, cached, rtol=1e-2, atol=1e-3 * float(cached.abs().max()))
    plain = recompute_latents(c.adapter, mixed, "cut")
    assert float((plain - cached_NH).abs().max()) > 1e-2, (
        "without the tokens' half they are others"
    )


class OneEarlier(Mechanism):
    """Each vector is made by the hidden state before the one that others take."""

    def sources(self, kinds_BT, valid_BT=None):
        rows, columns = super().sources(kinds_BT, valid_BT)
        return rows, columns - 1


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_mechanism_says_which_hidden_state_makes_a_latent(gradient):
    """Over a cache and by passes, with the gradient of a parameter."""
    c, _, sequences, aligned = recorded("qwen2_5_vl")
    adapter, found = ModelAdapter(c.model, OneEarlier()), []
    for given, run in ((aligned, recompute_latents), (sequences, by_passes)):
        c.model.zero_grad()
        latents_NH = run(adapter, given, gradient)
        replay(adapter, given.with_latents(latents_NH), temperature=2.0)[0].sum().backward()
        weight = c.model.model.language_model.layers[0].mlp.up_proj.weight
        found.append((latents_NH.detach(), weight.grad.clone()))
    (cached_NH, cached), (passed_NH, passed) = found
    torch.testing.assert_close(passed_NH, cached_NH, rtol=0, atol=1e-4)
    torch.testing.assert_close(passed, cached, rtol=1e-3, atol=1e-4 * float(cached.abs().max()))
    others_NH = recompute_latents(c.adapter, aligned)
    assert float((others_NH - cached_NH).abs().max()) > 1e-2
