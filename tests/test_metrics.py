"""The agreement of masks, against values that can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from birkhoff.evaluation.metrics import boundary_f, iou

Masks = NDArray[np.bool_]


def square(top: int, left: int, size: int, shape: tuple[int, int] = (64, 64)) -> Masks:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[top : top + size, left : left + size] = True
    return mask


def test_iou_of_squares() -> None:
    first, second = square(0, 0, 20), square(0, 10, 20)
    assert iou(first, first) == 1
    assert iou(first, second) == pytest.approx(200 / 600)
    assert iou(first, square(30, 30, 20)) == 0


def test_empty_masks_agree() -> None:
    empty = np.zeros((8, 8), dtype=np.bool_)
    assert iou(empty, empty) == boundary_f(empty, empty) == 1
    assert iou(empty, ~empty) == 0
    assert boundary_f(empty, square(2, 2, 3, (8, 8))) == 0


def test_leading_dimensions() -> None:
    masks = np.stack([square(0, 0, 20), square(0, 10, 20), square(30, 30, 20)])
    scores = iou(masks[:, None], masks)
    assert scores.shape == (3, 3)
    np.testing.assert_allclose(scores, scores.T)
    np.testing.assert_allclose(np.diag(scores), 1)
    assert boundary_f(masks[:, None], masks).shape == (3, 3)
    assert iou(masks[:0], masks[:0]).shape == (0,)


def test_a_shift_within_the_tolerance_is_none() -> None:
    first = square(10, 10, 30)
    for shift, expected in ((1, 1.0), (2, 1.0)):
        assert boundary_f(first, square(10, 10 + shift, 30), tolerance=2) == expected
    # Of the four sides of the squares, two lie on each other nearly as a whole.
    assert 0.4 < boundary_f(first, square(10, 20, 30), tolerance=2) < 0.6
    assert boundary_f(first, square(10, 13, 30), tolerance=2) < 1


def test_the_tolerance_is_a_share_of_the_diagonal() -> None:
    first, second = square(10, 10, 30), square(10, 12, 30)
    diagonal = 64 * 2**0.5
    assert boundary_f(first, second, tolerance=1.9 / diagonal) == 1
    assert boundary_f(first, second, tolerance=0.9 / diagonal) < 1
    assert boundary_f(first, second) == boundary_f(first, second, tolerance=1)


def test_against_dilation_with_a_disc() -> None:
    """The way in which the benchmark's own toolkit matches contours."""

    def contour(mask: Masks) -> Masks:
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])

    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((12, 90, 70)), (0, 5, 5))
    masks = noise > 0
    for radius in (1, 2, 5):
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        disc = x**2 + y**2 <= radius**2
        for first, second in pairwise(masks):
            a, b = contour(first), contour(second)
            precision = (a & ndimage.binary_dilation(b, disc)).sum() / a.sum()
            recall = (b & ndimage.binary_dilation(a, disc)).sum() / b.sum()
            expected = 2 * precision * recall / (precision + recall)
            assert boundary_f(first, second, tolerance=radius) == pytest.approx(expected)
            assert boundary_f(second, first, tolerance=radius) == pytest.approx(expected)


def test_bad_masks() -> None:
    mask = square(0, 0, 4)
    with pytest.raises(TypeError, match="boolean"):
        iou(mask.astype(np.float32), mask)
    with pytest.raises(ValueError, match="resize"):
        iou(mask, mask[:32])
    with pytest.raises(ValueError, match="paired"):
        boundary_f(np.stack([mask] * 2), np.stack([mask] * 3))
    with pytest.raises(ValueError, match="height and width"):
        iou(mask[0], mask[0])
    with pytest.raises(ValueError, match="tolerance"):
        boundary_f(mask, mask, tolerance=-1)
