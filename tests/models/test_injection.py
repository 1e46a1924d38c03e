"""The embedding hook: against hand-built `inputs_embeds`, its gradients, and its misuse."""

import copy

import pytest
import torch
from latent_cases import build_case, case

from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.injection import LatentInjector

IDS = torch.tensor([[1, 8, 8, 10, 12], [1, 12, 8, 8, 2]])
MASK = IDS == 8


def latents(count=4, seed=0):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_equals_inputs_embeds_built_by_hand(name):
    model = case(name).model
    embeds = model.get_input_embeddings().weight[IDS].clone()
    embeds[0, 1], embeds[0, 2], embeds[1, 2], embeds[1, 3] = latents()  # row-major order
    injector = LatentInjector.install(model)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        plain = model(input_ids=IDS).logits
        with injector.inject(MASK, latents()):
            injected = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, plain), (
            "the hook must be idle outside the block"
        )
    assert torch.equal(injected, expected) and not torch.allclose(injected, plain, atol=1e-2)


def test_packed_layout():
    """One row that holds both sequences, as a packed engine has it."""
    model = case("qwen2").model
    with torch.no_grad(), LatentInjector.install(model).inject(MASK.reshape(1, -1), latents()):
        embeds = model.get_input_embeddings()(IDS.reshape(1, -1))
    assert torch.equal(embeds[MASK.reshape(1, -1)], latents())


def test_gradients_flow_into_latents_and_not_into_the_placeholder_row():
    model = build_case("qwen2").model
    values_NH = latents().requires_grad_()
    with LatentInjector.install(model).inject(MASK, values_NH):
        model(input_ids=IDS).logits.square().sum().backward()
    assert (values_NH.grad.abs().sum(-1) > 0).all()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[12].abs().sum() > 0 and gradient[8].abs().sum() == 0


def test_install_twice_is_one_hook_and_no_state():
    model = build_case("qwen2").model
    names = set(model.state_dict())
    assert LatentInjector.install(model) is LatentInjector.install(model)
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    assert set(model.state_dict()) == names


def test_a_copy_of_the_model_has_its_own_injector():
    """A frozen reference is often a deep copy: arming one must not arm, or miss, the other."""
    model = build_case("qwen2").model
    injector = LatentInjector.install(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        plain = other(input_ids=IDS).logits
        with injector.inject(MASK, latents()):
            expected = model(input_ids=IDS).logits
            assert torch.equal(other(input_ids=IDS).logits, plain)
        with LatentInjector.install(other).inject(MASK, latents()):
            assert torch.equal(other(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (MASK, latents(3), r"bool with 4 positions, latents \(3, 32\)"),
        (MASK, latents(5), r"latents \(5, 32\)"),
        (MASK.long(), latents(), "mask torch.int64"),
        (MASK, latents().reshape(2, 2, 32), r"latents \(2, 2, 32\)"),
        (MASK[:1], latents(2), r"mask \(1, 5\).*expected mask \(2, 5\)"),
        (MASK, latents()[:, :16], r"latents \(4, 16\).*hidden size 32"),
    ],
)
def test_mismatches_are_errors_and_leave_the_hook_idle(mask, values, message):
    model = case("qwen2").model
    injector = LatentInjector.install(model)
    with torch.no_grad():
        with pytest.raises(LatentMismatchError, match=message), injector.inject(mask, values):
            model(input_ids=IDS)
        model(input_ids=IDS[:, :2])


def test_a_forward_that_ignores_the_latents_is_an_error():
    model = case("qwen2").model
    embeds = model.get_input_embeddings().weight[IDS].detach()
    with pytest.raises(
        LatentMismatchError, match="no call of the input-embedding module.*not with inputs_embeds"
    ):
        with torch.no_grad(), LatentInjector.install(model).inject(MASK, latents()):
            model(inputs_embeds=embeds)


def test_an_exception_of_the_forward_passes_and_disarms():
    model = case("qwen2").model
    injector = LatentInjector.install(model)
    with pytest.raises(KeyError, match="mine"), injector.inject(MASK, latents()):
        raise KeyError("mine")
    with torch.no_grad():
        model(input_ids=IDS[:, :2])
