"""The codec of the paper as published, as a baseline.

Written from its description in *Compress Any Segment Anything Model* (arXiv 2507.08765). Two
weights are a point of the plane, and a code is the place theta on a trajectory of `POINTS` points
that winds through a square of side `BOX` round the mean of the tensor, 40 levels a weight. Points
outside of the square fall into at most `RINGS` rings round it, equally wide up to the farthest
weight; a point of ring m is scaled into the square and back. A code is theta + POINTS * m, and all
codes of a tensor have as many bits as the largest one needs.

What the description leaves open is decided here: there are as many rings as half the box fits into
the distance between the square and the farthest weight, up to `RINGS`; distance is the larger of
both coordinates; the centre of the trajectory is the centre of the square. An odd weight at the end
is paired with the mean.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

LEVELS = 40
POINTS = LEVELS**2
BOX = 0.1
RINGS = 3


def trajectory(theta: NDArray[np.int64]) -> NDArray[np.float64]:
    """The points theta * (1 / POINTS, 1 / LEVELS) mod 1, moved to be symmetric about the origin:
    (..., 2)."""
    first = theta / POINTS % 1 - (POINTS - 1) / (2 * POINTS)
    second = theta % LEVELS / LEVELS - (LEVELS - 1) / (2 * LEVELS)
    return np.stack([first, second], -1)


def nearest_theta(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where the trajectory passes nearest to points (n, 2) of the square from -0.5 to 0.5."""
    row = np.round(points[:, 1] * LEVELS + (LEVELS - 1) / 2)
    best = np.full(len(points), np.inf)
    theta = np.zeros(len(points), np.int64)
    for offset in (-1, 0, 1):  # the trajectory rises by one level over a whole row of points
        r = np.clip(row + offset, 0, LEVELS - 1)
        q = np.clip(
            np.round(((points[:, 0] + (POINTS - 1) / (2 * POINTS)) * POINTS - r) / LEVELS),
            0,
            LEVELS - 1,
        )
        candidate = (q * LEVELS + r).astype(np.int64)
        distance = ((trajectory(candidate) - points) ** 2).sum(1)
        theta = np.where(distance < best, candidate, theta)
        best = np.minimum(best, distance)
    return theta


def paper_codec(weights: Array) -> tuple[float, Array]:
    """Bits of the tensor, the mean and the farthest distance included, and the decoded weights."""
    mean = float(weights.mean(dtype=np.float64))
    flat = weights.astype(np.float64).ravel() - mean
    points = np.append(flat, np.zeros(flat.size % 2)).reshape(-1, 2) / BOX
    distance = np.abs(points).max(1)
    farthest = max(float(distance.max()), 0.5)
    rings = min(RINGS, math.ceil(round(2 * farthest, 9)) - 1)
    width = (farthest - 0.5) / max(rings, 1)
    ring = np.ceil((distance - 0.5) / width).clip(0, rings) if rings else np.zeros(len(points))
    scale = (1 + 2 * width * ring)[:, None]  # the side of the square that the ring closes
    decoded = (trajectory(nearest_theta(points / scale)) * scale * BOX).ravel()[: flat.size] + mean
    code_bits = math.ceil(math.log2(POINTS * (rings + 1)))
    return len(points) * code_bits + 64, decoded.reshape(weights.shape).astype(np.float32)
