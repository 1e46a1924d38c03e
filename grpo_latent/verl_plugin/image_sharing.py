"""Encodes an image once a micro-batch, however many of its rows show it (the rows of a group all do).

Hooks on the vision tower: the forward of verl passes the pixels of every row, the tower sees each distinct image once, and
its output is expanded to the rows again. Gradients add up over the rows, as they would without sharing.

This is the seam for a vision cache across the forwards of a step, which a frozen tower would allow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageSharing:
    """The hooks of one vision tower."""

    def __init__(self, visual: nn.Module):
        self.merge_area = visual.spatial_merge_size**2
        self._rows_I: Tensor | None = None
        self._grid: Tensor | None = None
        self.num_encoded = 0
        visual.register_forward_pre_hook(self._keep_distinct, with_kwargs=True)
        visual.register_forward_hook(self._expand)

    def _keep_distinct(self, module: nn.Module, args: tuple, kwargs: dict):
        pixel_values, grid = args[0], kwargs["grid_thw"]
        rows_I, firsts = distinct_images(pixel_values, grid)
        self._grid, self.num_encoded = grid, len(firsts)
        self._rows_I = rows_I if len(firsts) < grid.shape[0] else None
        if self._rows_I is None:
            return None
        parts = pixel_values.split(grid.prod(-1).tolist())
        kept = torch.cat([parts[image_idx] for image_idx in firsts])
        return (kept, *args[1:]), {**kwargs, "grid_thw": grid[firsts]}

    def _expand(self, module: nn.Module, args: tuple, output):
        if self._rows_I is None:
            return None
        order = self._feature_order(output_features(output).device)
        if not hasattr(output, "pooler_output"):
            return output[order]
        output.pooler_output = output.pooler_output[order]
        if getattr(output, "deepstack_features", None):
            output.deepstack_features = [features[order] for features in output.deepstack_features]
        return output

    def _feature_order(self, device: torch.device) -> Tensor:
        """int64, for each merged visual token of the rows its index among those of the distinct images."""
        counts = (self._grid.prod(-1) // self.merge_area).tolist()
        starts: dict[int, Tensor] = {}
        total, order = 0, []
        for count, distinct_idx in zip(counts, self._rows_I.tolist(), strict=True):
            if distinct_idx not in starts:
                starts[distinct_idx] = torch.arange(total, total + count, device=device)
                total += count
            order.append(starts[distinct_idx])
        return torch.cat(order)


def output_features(output) -> Tensor:
    return getattr(output, "pooler_output", output)


def distinct_images(pixel_values: Tensor, grid: Tensor) -> tuple[Tensor, list[int]]:
    """Which images are equal, to the bit.

    Args:
        pixel_values: [patches, features] of I images.
        grid: int64 [I, 3].

    Returns:
        int64 [I], the index of each image among the distinct ones, and the first image index of each distinct one.
    """
    parts = pixel_values.split(grid.prod(-1).tolist())
    # the sum only finds candidates: equality decides
    sums = torch.stack([part.double().sum() for part in parts]).tolist()
    candidates: dict[tuple, list[int]] = {}
    firsts: list[int] = []
    rows = []
    for image_idx, (part, total) in enumerate(zip(parts, sums, strict=True)):
        key = (*grid[image_idx].tolist(), total)
        for distinct_idx in candidates.get(key, []):
            if torch.equal(parts[firsts[distinct_idx]], part):
                rows.append(distinct_idx)
                break
        else:
            candidates.setdefault(key, []).append(len(firsts))
            rows.append(len(firsts))
            firsts.append(image_idx)
    return torch.tensor(rows), firsts
