"""Packed linears against `nn.Linear`'s own forward.

Where torch lacks oneDNN nothing is packed, and these are skipped.
"""

import pytest
import torch
from torch import nn

from grpo_latent.models.packed_linears import packed_linears, packs

needs_onednn = pytest.mark.skipif(not packs(torch.zeros(1, 1)), reason="torch without oneDNN")


class OwnLinear(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) + 1


def stack(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80, bias=bias), nn.GELU(), nn.Linear(80, 24, bias=bias))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 1, 48), (200, 48)])
def test_products_equal_the_plain_ones_for_any_number_of_rows(shape, bias):
    layers, inputs = stack(bias), torch.randn(shape)
    with torch.no_grad():
        expected = layers(inputs)
        with packed_linears([layers]) as num_packed:
            assert num_packed == 2
            # a packed layer must not read the weight that it was packed from
            kept = layers[0].weight.clone()
            layers[0].weight.zero_()
            torch.testing.assert_close(layers(inputs), expected, rtol=0, atol=1e-5)
            layers[0].weight.copy_(kept)
        assert torch.equal(layers(inputs), expected)


@needs_onednn
def test_bfloat16():
    if not packs(torch.zeros(1, 1, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no bfloat16 products")
    layers, inputs = stack().bfloat16(), torch.randn(9, 48).bfloat16()
    with torch.no_grad():
        expected = layers(inputs)
        with packed_linears([layers]) as num_packed:
            assert num_packed == 2
            torch.testing.assert_close(layers(inputs), expected, rtol=2**-6, atol=2**-6)


@needs_onednn
def test_an_update_between_blocks_is_seen_and_an_error_leaves_no_packed_layer():
    layers, inputs = stack(), torch.randn(5, 48)
    with torch.no_grad():
        with pytest.raises(RuntimeError), packed_linears([layers]):
            layers(torch.randn(5, 47))
        assert "forward" not in vars(layers[0])
        layers[0].weight.mul_(-1)
        with packed_linears([layers]):
            torch.testing.assert_close(
                layers(inputs), stack_forward(layers, inputs), rtol=0, atol=1e-5
            )


def stack_forward(layers, inputs):
    hidden = nn.functional.gelu(inputs @ layers[0].weight.T + layers[0].bias)
    return hidden @ layers[2].weight.T + layers[2].bias


def test_what_is_not_packed():
    """Subclasses, other dtypes and devices, and a forward that somebody else put there."""
    wrapped = nn.Linear(4, 4)
    wrapped.forward = lambda inputs: inputs
    half = nn.Linear(4, 4).half()
    parts = [OwnLinear(4, 4), half, nn.Linear(4, 4, device="meta"), wrapped]
    with packed_linears(parts) as num_packed:
        assert num_packed == 0
    assert wrapped.forward(7) == 7


def test_a_layer_that_stands_in_two_modules_is_packed_once():
    layer = nn.Linear(8, 8)
    with packed_linears([nn.Sequential(layer), layer]) as num_packed:
        assert num_packed == int(packs(layer.weight))
