"""Boxes to visual tokens, against exact rational overlap."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_latent.data.boxes import BadBoxes, box_to_visual_tokens, check_box
from grpo_latent.errors import BadBoxError, ConfigError, DataError


def brute_force(x0, y0, x1, y1, rows, columns):
    """Tokens of a rows x columns grid whose open cell meets the open box, in exact arithmetic."""
    return [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if max(x0, Fraction(column, columns)) < min(x1, Fraction(column + 1, columns))
        and max(y0, Fraction(row, rows)) < min(y1, Fraction(row + 1, rows))
    ]


def interval():
    def ordered(denominator):
        pair = st.tuples(st.integers(0, denominator), st.integers(0, denominator)).filter(
            lambda ab: ab[0] != ab[1]
        )
        return pair.map(lambda ab: tuple(Fraction(value, denominator) for value in sorted(ab)))

    return st.integers(1, 500).flatmap(ordered)


@given(interval(), interval(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
def test_equals_brute_force_overlap(xs, ys, rows, columns, merge_size):
    grid_thw = (1, rows * merge_size, columns * merge_size)
    box = tuple(float(value) for value in (xs[0], ys[0], xs[1], ys[1]))
    assert box_to_visual_tokens(box, grid_thw, merge_size) == brute_force(
        xs[0], ys[0], xs[1], ys[1], rows, columns
    )


@given(interval(), interval(), st.integers(1, 98), st.integers(1, 98))
def test_grid_lines_are_exact_for_unmerged_patches(xs, ys, rows, columns):
    box = tuple(float(value) for value in (xs[0], ys[0], xs[1], ys[1]))
    assert box_to_visual_tokens(box, (1, rows, columns), 1) == brute_force(
        *(xs[0], ys[0], xs[1], ys[1]), rows, columns
    )


@pytest.mark.parametrize(
    ("box", "grid_thw", "expected"),
    [
        ((0, 0, 1, 1), (1, 4, 4), [0, 1, 2, 3]),
        ((0.5, 0.5, 1, 1), (1, 4, 4), [3]),
        ((0.49, 0.5, 1, 1), (1, 4, 4), [2, 3]),
        ((1 - 1e-9, 0, 1, 1e-9), (1, 4, 4), [1]),  # a sliver is still one token
        ((1 / 49, 0, 2 / 49, 1), (1, 2, 98), [1]),  # 1 / 49 * 49 < 1 in floating point
        ((0, 0, 14 / 50, 1), (1, 2, 50), list(range(7))),  # 14 / 50 * 50 > 14
        (
            (0.382, 0.456, 0.718, 0.656),
            (1, 24, 36),
            [5 * 18 + 6 + i for i in range(7)]
            + [6 * 18 + 6 + i for i in range(7)]
            + [7 * 18 + 6 + i for i in range(7)],
        ),
    ],
)
def test_worked_examples(box, grid_thw, expected):
    assert box_to_visual_tokens(box, grid_thw, 2) == expected


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ((0.1, 0.1, 1.2, 0.5), "outside the image"),
        ((-0.1, 0.1, 0.2, 0.5), "outside the image"),
        ((120, 40, 180, 90), "outside the image"),
        ((0.5, 0.1, 0.5, 0.5), "no area"),
        ((0.5, 0.4, 0.6, 0.3), "no area"),
        ((float("nan"), 0.1, 0.2, 0.5), "not finite"),
        ((0.1, 0.1, float("inf"), 0.5), "not finite"),
        ((0.1, 0.1, 0.5), "four numbers"),
        (("a", 0.1, 0.5, 0.5), "four numbers"),
        (None, "four numbers"),
        (7, "four numbers"),
    ],
)
def test_bad_boxes_are_typed_errors(box, what):
    with pytest.raises(DataError, match=what) as caught:
        check_box(box, where="a.json row 3: bboxes[0]")
    error = caught.value
    assert (
        error.where == "a.json row 3: bboxes[0]" and error.expected.startswith("[x0") and error.fix
    )


def published_tokens(box, rows, columns):
    """The published rule, on patches of a grid of 2 x 2 merges: every index is clamped."""
    x0, y0, x1, y1 = box

    def side(low, high, size):
        first = max(0, min(math.floor(low * size), size - 1))
        end = max(0, min(math.ceil(high * size), size))
        return range(first // 2, (end + 1) // 2)

    return [
        row * (columns // 2) + column
        for row in side(y0, y1, rows)
        for column in side(x0, x1, columns)
    ]


coordinate = st.floats(-0.2, 1.2, allow_nan=False, allow_infinity=False).map(
    lambda value: round(value, 3)
)


@given(coordinate, coordinate, coordinate, coordinate, st.integers(1, 12), st.integers(1, 12))
def test_clamped_boxes_take_the_published_tokens(x0, y0, x1, y1, rows, columns):
    """Where that rule takes any: for a box without width on a line of the grid it takes none."""
    box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    bad_boxes = BadBoxes("clamp")
    clamped = bad_boxes.check(box, "row 0")
    tokens = box_to_visual_tokens(clamped, (1, 2 * rows, 2 * columns), 2)
    # 0.28 * 50 is above 14 in floating point, and there the published rule has a token more
    exact = [Fraction(str(value)) for value in box]
    expected = published_tokens(exact, 2 * rows, 2 * columns)
    assert tokens and (tokens == expected or not expected)
    is_bad = min(box) < 0 or max(box) > 1 or box[0] == box[2] or box[1] == box[3]
    assert bad_boxes.num_clamped == is_bad


def test_worked_examples_of_boxes_just_outside():
    """By hand, on 2 x 2 tokens: one coordinate of 1.001; no width off the grid, on it, at the edge."""
    bad_boxes = BadBoxes("clamp")
    grid = (1, 4, 4)
    for box, tokens in (
        ((0.5, 0.5, 1.001, 1.0), [3]),
        ((-0.2, 0.0, 0.25, 1.0), [0, 2]),
        ((0.3, 0.0, 0.3, 1.0), [0, 2]),
        ((0.5, 0.0, 0.5, 1.0), [1, 3]),
        ((1.0, 0.0, 1.0, 1.0), [1, 3]),
        ((1.2, 0.6, 1.4, 0.7), [3]),
    ):
        assert box_to_visual_tokens(bad_boxes.check(box, "row 7"), grid, 2) == tokens
    assert bad_boxes.num_clamped == 6 and bad_boxes.num_dropped == 0
    assert bad_boxes.check((0.0, 0.0, 0.5, 0.5), "row 8") == (0.0, 0.0, 0.5, 0.5)
    assert bad_boxes.report() == ("data.on_bad_box=clamp: 6 boxes clamped, the first at row 7")


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ((0.5, 0.1, 0.4, 0.5), "no area"),
        ((0.5, 0.1, -0.4, 0.5), "outside"),
        ((float("nan"), 0.1, 0.2, 0.5), "not finite"),
        ((0.1, 0.1, 0.5), "four numbers"),
    ],
)
def test_what_no_clamp_mends(box, what):
    with pytest.raises(DataError, match=what):
        BadBoxes("clamp").check(box, "row 0")


def test_rules():
    with pytest.raises(BadBoxError, match="outside the image"):
        BadBoxes().check((0.0, 0.0, 1.001, 1.0), "row 0")
    with pytest.raises(ConfigError, match="data.on_bad_box"):
        BadBoxes("ignore")
    assert BadBoxes().report() == BadBoxes("drop").report() == ""


@pytest.mark.parametrize("grid_thw", [(2, 4, 4), (1, 3, 4), (1, 4, 0)])
def test_bad_grids_are_typed_errors(grid_thw):
    with pytest.raises(DataError, match="not the grid of an image"):
        box_to_visual_tokens((0, 0, 1, 1), grid_thw, 2)
