"""Linear layers on CPU through oneDNN, with weights laid out once for many products.

torch's own `linear` hands the weight to its BLAS as it lies in memory, in each call anew. A
rollout multiplies with the same weights hundreds of times, a few rows at each decoding step, so
that the layout decides the time. Laying the weights out costs about as much as two steps: it is
done for each rollout and forgotten, so that no copy can outlive an update of the weights. Results
differ from the plain layers' by the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# rows that the layout is chosen for, whatever their number is: of a constant, so that results are
# reproducible
LAYOUT_ROWS = 64
_linear = (
    torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN has packed products for this weight.

    On CPU, in float32 or (where the CPU has the instructions) bfloat16.
    """
    if _linear is None or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


@contextmanager
def packed_linears(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Within the block every `nn.Linear` in `modules` multiplies with a packed copy of its weight.

    Yields their number. Not for subclasses of `nn.Linear`, weights that `packs` refuses, or a
    forward of somebody else's: those stay as they are. No gradient passes a packed layer, and
    weights must not change within the block.
    """
    found = {
        id(m): m
        for module in modules
        for m in module.modules()
        if type(m) is nn.Linear and packs(m.weight)
    }
    layers = [layer for layer in found.values() if "forward" not in vars(layer)]
    try:
        for layer in layers:
            # in the instance, where it hides the class's own: `module(…)` looks there first, and
            # nothing else of the layer changes
            vars(layer)["forward"] = _packed_forward(layer)
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    product = _linear
    assert product is not None, "`packs` refuses every weight where oneDNN is missing"
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), LAYOUT_ROWS)
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(inputs: Tensor) -> Tensor:
        return product(inputs, weight, bias, "none", [], "")

    return forward
