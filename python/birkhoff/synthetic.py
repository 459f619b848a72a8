"""Pictures with the statistics of natural ones, drawn from random numbers alone.

Their edges, flat areas and spectrum are enough to see which weights of a vision model matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Radii of the discs, as shares of the side.
SMALLEST_RADIUS, LARGEST_RADIUS = 0.015, 0.4
#: Discs in a picture, far more than it takes to cover it.
DISCS = 1500

Picture = NDArray[np.float32]


def synthetic_picture(side: int, rng: np.random.Generator, *, kind: str = "dead leaves") -> Picture:
    """A square picture: float32 of shape (side, side, 3) between 0 and 1.

    Args:
        side: Pixels of a side.
        rng: Where random numbers come from.
        kind: ``"dead leaves"`` or ``"noise"``.
    """
    return dead_leaves(side, rng) if kind == "dead leaves" else pink_noise(side, rng)


def dead_leaves(side: int, rng: np.random.Generator) -> Picture:
    """Discs of random colours that cover one another, the number of radius r falling as r^-3."""
    picture = rng.random(3, dtype=np.float32) * np.ones((side, side, 3), dtype=np.float32)
    low, high = (radius**-2.0 for radius in (LARGEST_RADIUS, SMALLEST_RADIUS))
    radii = side * rng.uniform(low, high, DISCS) ** -0.5
    centres = rng.uniform(0, side, (DISCS, 2))
    colours = rng.random((DISCS, 3), dtype=np.float32)
    for radius, (y, x), colour in zip(radii, centres, colours, strict=True):
        top, left = (max(0, int(centre - radius)) for centre in (y, x))
        bottom, right = (min(side, int(centre + radius) + 2) for centre in (y, x))
        rows, columns = np.ogrid[top:bottom, left:right]
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        picture[top:bottom, left:right][inside] = colour
    grainy: Picture = np.clip(picture + rng.normal(0, 0.02, picture.shape), 0, 1).astype(np.float32)
    return grainy


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
