"""Invariant 8: the three latent gradients against central differences of what each of them states, in float64."""

import functools

import pytest
import torch
from latent_cases import build_case, sampling

from grpo_latent.errors import ConfigError
from grpo_latent.models.recompute import GRADIENTS, own_latents
from grpo_latent.models.replay import collate, recompute_latents, replay_hidden, with_latents
from grpo_latent.trajectory import PositionKind as K


@functools.cache
def double_case():
    c = build_case("qwen2")
    group = c.engine(c.config(steps=4)).generate([c.request(seeds=range(6))], sampling(14))[0]
    assert max(len(trajectory.spans) for trajectory in group) >= 2
    c.model.double()
    batch = collate(group, [None] * 6, c.adapter)
    batch = with_latents(batch, batch.latents_NH.double())
    return c, with_latents(batch, recompute_latents(c.adapter, batch, "full"))


def objective(c, batch, latents_NH):
    return replay_hidden(c.adapter, with_latents(batch, latents_NH), "full")[batch.action_mask_BT()].sin().sum()


def stated(c, batch, gradient):
    """What is differentiated: the latents as a function of the weights, z₀ frozen where the mode freezes it."""
    if gradient == "cut":
        return batch.latents_NH
    if gradient == "bptt":
        return recompute_latents(c.adapter, batch, "full")
    hidden_BTH = replay_hidden(c.adapter, batch, "full")
    return torch.stack([hidden_BTH[row, column - 1] for row, column in (batch.kinds_BT == K.LATENT).nonzero().tolist()])


def derivatives():
    """Directional derivative of each mode: (by backward, by central difference)."""
    c, batch = double_case()
    weight = c.model.model.layers[0].self_attn.v_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    found = {}
    for gradient in GRADIENTS:
        weight.grad = None
        latents_NH = own_latents(c.adapter, batch, "full", gradient)
        torch.testing.assert_close(latents_NH, batch.latents_NH, rtol=0, atol=1e-5)
        objective(c, batch, latents_NH).backward()
        analytic, step, values = float((weight.grad * direction).sum()), 1e-4, []
        with torch.no_grad():
            for sign in (1, -2):
                weight += sign * step * direction
                values.append(float(objective(c, batch, stated(c, batch, gradient))))
            weight += step * direction
        found[gradient] = (analytic, (values[0] - values[1]) / (2 * step))
    weight.grad = None
    return found


def test_gradients_equal_central_differences_and_differ_from_each_other():
    found = derivatives()
    for gradient, (analytic, numeric) in found.items():
        assert analytic == pytest.approx(numeric, rel=1e-3), gradient
    values = [analytic for analytic, _ in found.values()]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(values[first] - values[second]) > 0.02 * abs(values[second])


def test_unknown_gradient_is_an_error():
    c, batch = double_case()
    with pytest.raises(ConfigError, match="one of"):
        own_latents(c.adapter, batch, "full", "some")
