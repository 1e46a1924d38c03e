"""Slots of an embedding of their own: what is fed, and which treatments of RL train it.

(Rollout, replay, gradients: tests/testing.)
"""

import pytest
import torch

from grpo_latent.eval.ablations import AblationInputs, make_changes
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.latent.mechanisms import OwnSlots
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.testing.cases import build_case


@pytest.fixture(scope="module")
def made():
    return build_case(OwnSlots, "qwen3", dict(steps=2))


def test_every_slot_of_every_prompt_is_the_same_vector(made):
    own_H = made.model.own_slot.detach()
    for trajectory in made.recorded.trajectories:
        assert torch.equal(trajectory.latents, own_H.expand(2, -1))


@pytest.mark.parametrize("gradient, trains", [("cut", False), ("one_hop", True), ("bptt", True)])
def test_recompute_leaves_it_or_trains_it(made, gradient, trains):
    sequences = made.collate(padding_side="both")
    latents_NH = recompute_latents(made.adapter, sequences, gradient)
    torch.testing.assert_close(latents_NH, sequences.latents_NH, rtol=0, atol=0)
    assert latents_NH.requires_grad == trains
    if trains:
        (own_H,) = torch.autograd.grad(latents_NH.sum(), [made.model.own_slot])
        assert torch.equal(own_H, torch.full_like(own_H, float(len(latents_NH))))


def test_recompute_feeds_the_vector_as_it_is_now(made):
    sequences = made.collate(padding_side="both")
    with torch.no_grad():
        made.model.own_slot += 1.0
        try:
            latents_NH = recompute_latents(made.adapter, sequences)
        finally:
            made.model.own_slot -= 1.0
    torch.testing.assert_close(latents_NH, sequences.latents_NH + 1.0)


def test_the_vectors_of_others_are_the_own_ones(made):
    """The control's control: `shuffle` has nothing to change."""
    own = made.recorded.trajectories[:: len(made.requests[0].seeds)]
    prompts = [
        EvalPrompt(request.prompt_ids, None, "tiny", "7", "row", str(i))
        for i, request in enumerate(made.requests)
    ]
    inputs = AblationInputs(prompts, own, [None] * len(own), made.mechanism)
    assert make_changes("shuffle", inputs) == [None] * len(own)
