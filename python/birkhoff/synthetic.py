"""Pictures with the statistics of natural ones, drawn from random numbers alone.

Their edges, shading, flat areas and spectrum are enough to see which weights of a vision model
matter.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: Radii of the leaves, as shares of the side.
SMALLEST_RADIUS, LARGEST_RADIUS = 0.015, 0.4
#: Leaves in a picture: from a few things on an open ground to a thicket.
FEWEST_LEAVES, MOST_LEAVES = 8, 300
#: Standard deviation of the change of a colour over half a side.
SHADING = 0.25

Kind = Literal["dead leaves", "noise"]
Picture = NDArray[np.float32]


def synthetic_picture(side: int, rng: np.random.Generator, *, kind: Kind) -> Picture:
    """A square picture: float32 of shape (side, side, 3) between 0 and 1.

    Args:
        side: Pixels of a side.
        rng: Where random numbers come from.
        kind: :func:`dead_leaves` or :func:`pink_noise`.
    """
    return dead_leaves(side, rng) if kind == "dead leaves" else pink_noise(side, rng)


def dead_leaves(side: int, rng: np.random.Generator) -> Picture:
    """Shaded ellipses and rectangles that cover one another, with grain.

    The number of leaves of radius r falls as r^-3 (Lee, Mumford and Huang, IJCV 2001), and how many
    there are differs from picture to picture.
    """
    rows, columns = np.ogrid[:side, :side]
    picture = _shaded(rows, columns, side, rng)
    count = round(math.exp(rng.uniform(math.log(FEWEST_LEAVES), math.log(MOST_LEAVES))))
    low, high = (radius**-2.0 for radius in (LARGEST_RADIUS, SMALLEST_RADIUS))
    radii = side * rng.uniform(low, high, count) ** -0.5
    centres = rng.uniform(0, side, (count, 2))
    for radius, (y, x) in zip(radii, centres, strict=True):
        reach = math.sqrt(2) * radius  # of the corners of a square
        top, left = (max(0, int(centre - reach)) for centre in (y, x))
        bottom, right = (min(side, int(centre + reach) + 2) for centre in (y, x))
        within = (slice(top, bottom), slice(left, right))
        part = (rows[within[0]], columns[:, within[1]])
        inside = _leaf(part[0] - y, part[1] - x, radius, rng)
        picture[within][inside] = _shaded(*part, side, rng)[inside]
    grain = rng.normal(0, rng.uniform(0, 0.05), picture.shape)
    return np.clip(picture + grain, 0, 1).astype(np.float32)


def _leaf(
    y: NDArray[np.float64], x: NDArray[np.float64], radius: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Where an ellipse or a rectangle is, turned at random; y and x are from its centre."""
    angle, stretch = rng.uniform(0, math.pi), rng.uniform(0.4, 1)
    u = y * math.cos(angle) + x * math.sin(angle)
    v = (x * math.cos(angle) - y * math.sin(angle)) / stretch
    distance = np.hypot(u, v) if rng.random() < 0.5 else np.maximum(np.abs(u), np.abs(v))
    inside: NDArray[np.bool_] = distance <= radius
    return inside


def _shaded(
    rows: NDArray[np.int64], columns: NDArray[np.int64], side: int, rng: np.random.Generator
) -> Picture:
    """A colour that changes evenly across a part of a picture."""
    slopes = rng.normal(0, SHADING, (2, 3)) * 2 / side
    from_centre = [at[..., None] - at.mean() for at in (rows, columns)]
    colour = rng.random(3) + from_centre[0] * slopes[0] + from_centre[1] * slopes[1]
    shaded: Picture = colour.astype(np.float32)
    return shaded


def pink_noise(side: int, rng: np.random.Generator) -> Picture:
    """Noise whose amplitude falls as 1/f."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    frequencies[0, 0] = np.inf
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequencies
        noise = np.fft.irfft2(spectrum, (side, side))
        channels.append(0.5 + 0.25 * noise / noise.std())
    noisy: Picture = np.clip(np.stack(channels, axis=-1), 0, 1).astype(np.float32)
    return noisy
