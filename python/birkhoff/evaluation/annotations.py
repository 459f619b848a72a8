"""Annotations in the format of COCO: which pixels belong to which object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from birkhoff._core import BirkhoffError
from birkhoff.evaluation.metrics import Masks


@dataclass(frozen=True)
class Annotations:
    """The objects of pictures."""

    path: Path
    #: By file name, as the annotations give it: the height and width of the picture.
    sizes: Mapping[str, tuple[int, int]]
    #: By file name: the segmentations of its objects; crowds are left out.
    segmentations: Mapping[str, list[Any]]

    def name_of(self, picture: Path) -> str | None:
        """The name of a picture in the annotations: its path from some folder on, or its name."""
        parts = picture.parts
        names = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((name for name in names if name in self.sizes), None)

    def masks(self, picture: Path, height: int, width: int) -> list[Masks]:
        """The objects of a picture; none if it is not annotated.

        Raises:
            BirkhoffError: The picture has another size in the annotations, or a segmentation is
                malformed.
        """
        name = self.name_of(picture)
        if name is None:
            return []
        if self.sizes[name] != (height, width):
            raise BirkhoffError(
                f"{self.path}: the annotations are for a picture {name!r} of "
                f"{_pixels(*self.sizes[name])}, but {picture} has {_pixels(height, width)}; "
                "give the pictures that were annotated"
            )
        masks = []
        for segmentation in self.segmentations[name]:
            try:
                mask = draw(segmentation, height, width)
            except (ValueError, TypeError, KeyError) as error:
                raise BirkhoffError(
                    f"{self.path}: an annotation of {name!r} is malformed: {error}"
                ) from error
            if mask.any():
                masks.append(mask)
        return masks


def read_annotations(path: str | Path) -> Annotations:
    """Reads a file in the format of COCO: polygons or run lengths.

    Raises:
        BirkhoffError: It is no such file.
        OSError: It cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        data = json.loads(content)
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        sizes = {
            str(image["file_name"]): (int(image["height"]), int(image["width"]))
            for image in data["images"]
        }
        segmentations: dict[str, list[Any]] = {name: [] for name in sizes}
        for annotation in data["annotations"]:
            if not annotation.get("iscrowd") and annotation.get("segmentation"):
                segmentations[names[annotation["image_id"]]].append(annotation["segmentation"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BirkhoffError(
            f"{path}: this is no file of annotations in the format of COCO, with 'images' and "
            f"'annotations' ({type(error).__name__}: {error})"
        ) from error
    return Annotations(path, sizes, segmentations)


def draw(segmentation: Any, height: int, width: int) -> Masks:
    """The mask of a segmentation: a list of polygons, or run lengths.

    Raises:
        ValueError: It is neither, or does not fit the picture.
    """
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict):
        raise ValueError("a segmentation is a list of polygons or an object with 'counts'")
    if tuple(segmentation["size"]) != (height, width):
        raise ValueError(f"run lengths of size {segmentation['size']}, not {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = _parse_counts(counts)
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError("the run lengths do not add up to the pixels of the picture")
    # Runs of background and object in turn, down the columns.
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _draw_polygons(polygons: list[Any], height: int, width: int) -> Masks:
    from PIL import Image, ImageDraw

    canvas = Image.new("1", (width, height))
    for polygon in polygons:
        corners = np.asarray(polygon, dtype=np.float64)
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
            raise ValueError("a polygon is a list of 3 or more x, y pairs")
        if not np.isfinite(corners).all() or np.abs(corners).max() > 1e6:
            raise ValueError("a corner of a polygon lies far outside of the picture")
        # Pixel centres are at whole numbers for Pillow, at halves for COCO.
        ImageDraw.Draw(canvas).polygon((corners - 0.5).tolist(), fill=1)
    return np.asarray(canvas)


def _parse_counts(text: str) -> list[int]:
    """Run lengths from the string in which COCO's tools pack them.

    A number is a little-endian string of groups of 5 bits and a bit that says that more follow; the
    sign is that of the last group; from the fourth on, a number is added to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError("packed run lengths with a character that does not belong there")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("packed run lengths with a number that is too large")
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _pixels(height: int, width: int) -> str:
    return f"{width} x {height} pixels"
