"""Draws the embedded task's images: a noisy grid whose cells hold coloured handwritten digits.

Legend: N images, C cells of an image (row-major, as visual tokens are).
"""

from __future__ import annotations

import functools

import numpy as np

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 250),
    "yellow": (235, 215, 40),
    "magenta": (220, 60, 220),
    "cyan": (40, 215, 220),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
COLOR_NAMES = tuple(COLORS)
GRID = 4  # cells a side
CELL = 14  # pixels a side: one merged visual token of a model with 7-pixel patches
DIGIT_SIZE = 12
JITTER = 1  # pixels that a digit may lie off its cell's middle
IMAGE_SIZE = GRID * CELL
NUM_CELLS = GRID * GRID
NOISE_SIGMA = 25.0  # of 255: digits stay readable, and no two cells are equal
BACKGROUND = 60.0
NO_DIGIT = 10  # class of an empty cell, as is NO_COLOR
NO_COLOR = len(COLORS)
NUM_TRAIN_DIGITS = 1297
CHUNK = 256  # images drawn at once


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loads scikit-learn's digits, enlarged, at each place that jitter can put them.

    Returns:
        opacity [1797, offsets, offsets, CELL, CELL]; labels [1797]; training indices; held-out
        indices.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    centres = np.clip((np.arange(DIGIT_SIZE) + 0.5) * 8 / DIGIT_SIZE - 0.5, 0, 7)
    lower = np.floor(centres).astype(int)
    upscale = np.zeros((DIGIT_SIZE, 8))  # bilinear
    np.add.at(upscale, (np.arange(DIGIT_SIZE), lower), 1 - (centres - lower))
    np.add.at(upscale, (np.arange(DIGIT_SIZE), np.minimum(lower + 1, 7)), centres - lower)
    glyphs = np.einsum("yi,nij,xj->nyx", upscale, digits.images / 16, upscale).astype(np.float32)
    num_offsets = CELL - DIGIT_SIZE + 1
    opacity = np.zeros((len(glyphs), num_offsets, num_offsets, CELL, CELL), np.float32)
    for top, left in np.ndindex(num_offsets, num_offsets):
        opacity[:, top, left, top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = glyphs
    # RandomState, because its streams are frozen over numpy versions: the split must never move
    order = np.random.RandomState(1234).permutation(len(glyphs))
    return (
        opacity,
        digits.target,
        np.sort(order[:NUM_TRAIN_DIGITS]),
        np.sort(order[NUM_TRAIN_DIGITS:]),
    )


def compose(
    digit_NC: np.ndarray, color_NC: np.ndarray, offset_NC2: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws images uint8 [N, 56, 56, 3] of cells [N, 16].

    A cell is a digit image, a colour (`NO_COLOR`: empty) and a (top, left) offset.
    """
    opacity = digit_images()[0]
    palette = np.array([*COLORS.values(), (BACKGROUND,) * 3], np.float32) - BACKGROUND
    num = len(digit_NC)
    brightness_NC = rng.uniform(0.75, 1.0, digit_NC.shape).astype(np.float32)
    images = np.empty((num, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in range(0, num, CHUNK):  # bounds memory and stays in the cache
        chunk = slice(start, start + CHUNK)
        alpha = opacity[digit_NC[chunk], offset_NC2[chunk, :, 0], offset_NC2[chunk, :, 1]]
        alpha = alpha * brightness_NC[chunk, :, None, None]
        cells = BACKGROUND + alpha[..., None] * palette[color_NC[chunk]][:, :, None, None]
        cells = cells.reshape(-1, GRID, GRID, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
        canvas = cells.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
        noise = rng.standard_normal(canvas.shape, dtype=np.float32)
        images[chunk] = np.clip(canvas + NOISE_SIGMA * noise, 0, 255)
    return images
