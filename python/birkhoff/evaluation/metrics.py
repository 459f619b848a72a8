"""How much two masks agree: by area and by contour.

Masks are boolean arrays of shape (..., height, width); the leading dimensions of two masks are
broadcast against each other, and the result has their shape.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError

#: The tolerance of the DAVIS benchmark, as a share of the image's diagonal.
DAVIS_TOLERANCE = 0.008

Masks = NDArray[np.bool_]


def iou(first: Masks, second: Masks) -> NDArray[np.float64]:
    """Intersection over union, from 0 to 1; two empty masks agree: 1.

    Raises:
        TypeError: A mask is not boolean.
        ValueError: The shapes do not fit each other.
    """
    first, second = _broadcast(first, second)
    intersection = np.count_nonzero(first & second, axis=(-2, -1))
    union = np.count_nonzero(first | second, axis=(-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def boundary_f(
    first: Masks, second: Masks, *, tolerance: float = DAVIS_TOLERANCE
) -> NDArray[np.float64]:
    """The contour accuracy F of the DAVIS benchmark, from 0 to 1.

    The harmonic mean of the shares of either contour that lie within the tolerance of the other.
    It is that of Perazzi et al., *A Benchmark Dataset and Evaluation Methodology for Video Object
    Segmentation*, CVPR 2016, as their toolkit computes it: a contour pixel differs from the pixel
    on its right, below it, or on its lower right; the edge of the image is no contour; two masks
    without contours agree: 1.

    Args:
        first: The one mask.
        second: The other; F is symmetric.
        tolerance: A distance in pixels if at least 1, else a share of the image's diagonal, rounded
            up to a whole pixel.

    Raises:
        TypeError: A mask is not boolean.
        ValueError: The shapes do not fit each other, or the tolerance is negative.
        BirkhoffError: scipy is not installed.
    """
    first, second = _broadcast(first, second)
    if not tolerance >= 0:
        raise ValueError(f"the tolerance of a contour must be 0 or more, not {tolerance}")
    height, width = first.shape[-2:]
    distance = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(height, width))
    shape = first.shape[:-2]
    scores = np.empty(shape)
    for index in np.ndindex(shape):
        scores[index] = _contour_f(_contour(first[index]), _contour(second[index]), distance)
    return scores


def _contour(mask: Masks) -> NDArray[np.intp]:
    """Rows and columns of the contour pixels of one mask: (n, 2)."""
    # Repeating the last row and column makes the image's edge no contour.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here, right = padded[:-1, :-1], padded[:-1, 1:]
    below, lower_right = padded[1:, :-1], padded[1:, 1:]
    return np.argwhere((here != right) | (here != below) | (here != lower_right))


def _contour_f(first: NDArray[np.intp], second: NDArray[np.intp], distance: float) -> float:
    if len(first) == 0 or len(second) == 0:
        return float(len(first) == len(second))
    precision = _share_near(first, second, distance)
    recall = _share_near(second, first, distance)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(points: NDArray[np.intp], others: NDArray[np.intp], distance: float) -> float:
    """The share of the points that have one of the others within the distance."""
    try:
        from scipy.spatial import cKDTree
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            'comparing contours takes scipy; install it with `pip install "birkhoff[eval]"`'
        ) from error
    nearest, _ = cKDTree(others).query(points, distance_upper_bound=distance + 0.5)
    return float(np.mean(nearest <= distance))


def _broadcast(first: Masks, second: Masks) -> tuple[Masks, Masks]:
    for mask in (first, second):
        if mask.dtype != np.bool_:
            raise TypeError(f"a mask is a boolean array, not one of {mask.dtype}; threshold it")
        if mask.ndim < 2:
            raise ValueError(f"a mask has height and width, but this one has shape {mask.shape}")
    if first.shape[-2:] != second.shape[-2:]:
        raise ValueError(
            f"masks of {first.shape[-2:]} and {second.shape[-2:]} pixels cannot be compared; "
            "resize one of them"
        )
    try:
        first, second = np.broadcast_arrays(first, second)
    except ValueError as error:
        raise ValueError(
            f"masks of shapes {first.shape} and {second.shape} cannot be paired"
        ) from error
    return first, second
