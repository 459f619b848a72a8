"""Procedurally drawn scenes with exact visible masks.

A scene is 128 x 128 RGB with 3 to 8 shapes (ellipse, polygon, star, letter, ring), each filled with
a colour, a gradient or a pattern, drawn over one another, with noise on top. Beside the picture
stands the label map: 0 where the background shows, k where the k-th shape shows. Scene number n is
a function of n alone: training takes the numbers from 0 up, everything held out takes them from
`HELD_OUT` up, and the two ranges never meet.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIZE = 128  # pixels on a side
SUPERSAMPLING = 2
MIN_AREA = 48  # pixels a shape must show to be prompted for
HELD_OUT = 1_000_000_000
LETTERS = "ABCDEFGHJKLMNPQRSTUVXYZ23456789"

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class Scene(NamedTuple):
    image: UInt8Array  # (SIZE, SIZE, 3)
    labels: UInt8Array  # (SIZE, SIZE), 0 = background

    def objects(self) -> list[int]:
        """Labels of the shapes of which at least `MIN_AREA` pixels show."""
        areas = np.bincount(self.labels.ravel())
        return [k for k in range(1, len(areas)) if areas[k] >= MIN_AREA]


_FONTS: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}
_Y, _X = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SIZE


def _shape(rng: np.random.Generator) -> FloatArray:
    """Coverage of one random shape, (SIZE, SIZE) in 0..1."""
    side = SIZE * SUPERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    radius = math.exp(rng.uniform(math.log(10), math.log(46))) * SUPERSAMPLING
    cx, cy = rng.uniform(0.06, 0.94, 2) * side
    angle = rng.uniform(0, 2 * math.pi)
    kind = rng.choice(
        ["ellipse", "polygon", "star", "letter", "ring"], p=[0.25, 0.3, 0.15, 0.15, 0.15]
    )

    def outline(radii: FloatArray, turns: FloatArray, stretch: float) -> list[tuple[float, float]]:
        x, y = radii * np.cos(turns), radii * np.sin(turns) * stretch
        cos, sin = math.cos(angle), math.sin(angle)
        return list(
            zip((cx + x * cos - y * sin).tolist(), (cy + x * sin + y * cos).tolist(), strict=True)
        )

    if kind in ("ellipse", "ring"):
        turns = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        stretch = rng.uniform(0.4, 1.0) if kind == "ellipse" else rng.uniform(0.6, 1.0)
        draw.polygon(outline(np.full(64, radius), turns, stretch), fill=255)
        if kind == "ring":
            draw.polygon(
                outline(np.full(64, radius * rng.uniform(0.4, 0.7)), turns, stretch), fill=0
            )
    elif kind == "polygon":
        corners = int(rng.integers(3, 8))
        turns = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * (2 * math.pi / corners)
        draw.polygon(
            outline(radius * rng.uniform(0.7, 1.2, corners), turns, rng.uniform(0.5, 1.0)), fill=255
        )
    elif kind == "star":
        points = int(rng.integers(4, 8))
        radii = np.where(np.arange(2 * points) % 2 == 0, 1.15, rng.uniform(0.4, 0.65)) * radius
        draw.polygon(outline(radii, np.arange(2 * points) * (math.pi / points), 1.0), fill=255)
    else:
        size = 8 * max(2, round(2.2 * radius / 8))
        font = _FONTS.setdefault(size, ImageFont.load_default(size))
        letter = LETTERS[int(rng.integers(len(LETTERS)))]
        draw.text(
            (cx, cy), letter, fill=255, font=font, anchor="mm", stroke_width=max(1, size // 20)
        )
        if rng.random() < 0.5:
            canvas = canvas.rotate(
                math.degrees(rng.uniform(-0.6, 0.6)), Image.Resampling.NEAREST, center=(cx, cy)
            )
    covered = np.asarray(canvas, np.float32).reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    return covered.mean((1, 3)) / 255


def _fill(rng: np.random.Generator, colour: FloatArray) -> FloatArray:
    """A fill about `colour`, (SIZE, SIZE, 3) or broadcastable to it."""
    kind = rng.choice(
        ["plain", "gradient", "stripes", "checks", "dots"], p=[0.4, 0.3, 0.12, 0.09, 0.09]
    )
    if kind == "plain":
        return colour[None, None, :]
    other = np.clip(colour + rng.uniform(-0.3, 0.3, 3), 0, 1).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    u = _X * np.float32(math.cos(angle)) + _Y * np.float32(math.sin(angle))
    v = _Y * np.float32(math.cos(angle)) - _X * np.float32(math.sin(angle))
    period = np.float32(2 * math.pi * SIZE / rng.uniform(4, 14))
    if kind == "gradient":
        share = np.clip((u - u.mean()) * np.float32(rng.uniform(0.8, 2.5)) + 0.5, 0, 1)
    elif kind == "stripes":
        share = (np.sin(u * period) > 0).astype(np.float32)
    elif kind == "checks":
        share = (np.sin(u * period) * np.sin(v * period) > 0).astype(np.float32)
    else:
        share = (np.cos(u * period) + np.cos(v * period) > 0.9).astype(np.float32)
    return colour + share[:, :, None] * (other - colour)


def draw_scene(number: int) -> Scene:
    """Scene `number`; the same number always gives the same scene."""
    rng = np.random.default_rng([20240229, number])
    colours = [rng.uniform(0, 1, 3).astype(np.float32)]
    image = np.broadcast_to(_fill(rng, colours[0]), (SIZE, SIZE, 3)).astype(np.float32)
    if rng.random() < 0.5:  # a background of smooth blotches
        blotches = Image.fromarray((rng.random((8, 8, 3)) * 255).astype(np.uint8)).resize(
            (SIZE, SIZE), 3
        )
        image = image + (np.asarray(blotches, np.float32) / 255 - 0.5) * np.float32(
            rng.uniform(0.1, 0.5)
        )
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for k in range(1, int(rng.integers(3, 9)) + 1):
        coverage = _shape(rng)
        colour = rng.uniform(0, 1, 3).astype(np.float32)
        for _ in range(8):  # colours that can be told apart
            if min(float(np.abs(colour - c).sum()) for c in colours) > 0.35:
                break
            colour = rng.uniform(0, 1, 3).astype(np.float32)
        colours.append(colour)
        alpha = coverage[:, :, None]
        image = image + alpha * (_fill(rng, colour) - image)
        labels[coverage >= 0.5] = k
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 0.05))
    return Scene((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), labels)


def box_of(mask: BoolArray) -> tuple[int, int, int, int]:
    """The box round a mask as x0, y0, x1, y1, the pixels of the last row and column included."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])


def inner_point(mask: BoolArray) -> tuple[int, int]:
    """The pixel x, y of a mask that lies farthest from its border (by erosion with a 3 x 3 cross,
    first in raster order)."""
    remaining = np.pad(mask, 1)
    while True:
        eroded = remaining.copy()
        eroded[1:] &= remaining[:-1]
        eroded[:-1] &= remaining[1:]
        eroded[:, 1:] &= remaining[:, :-1]
        eroded[:, :-1] &= remaining[:, 1:]
        if not eroded.any():
            break
        remaining = eroded
    y, x = np.argwhere(remaining)[0]
    return int(x) - 1, int(y) - 1


def cached_scenes(first: int, count: int, folder: Path) -> tuple[UInt8Array, UInt8Array]:
    """Images (count, SIZE, SIZE, 3) and label maps (count, SIZE, SIZE) of consecutive scenes, drawn
    once and kept in `folder` as memory-mapped .npy files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scenes-{first}-{count}-{what}.npy" for what in ("images", "labels")]
    if not all(path.exists() for path in paths):
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        labels = np.empty((count, SIZE, SIZE), np.uint8)
        for i in range(count):
            images[i], labels[i] = draw_scene(first + i)
        for path, array in zip(paths, (images, labels), strict=True):
            np.save(path.with_suffix(".tmp.npy"), array)
            path.with_suffix(".tmp.npy").rename(path)
    images, labels = (np.load(path, mmap_mode="r") for path in paths)
    return images, labels
