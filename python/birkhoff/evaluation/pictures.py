"""Finds and reads pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError

#: What is taken for a picture in a folder, by the ending of its name.
ENDINGS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"])

#: uint8 of shape (height, width, 3), red first.
Picture = NDArray[np.uint8]


def find_pictures(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """The pictures of a folder and of the folders in it, in the order of their names.

    Args:
        images: A folder, one picture, or a list of pictures, which is returned as it is.

    Raises:
        BirkhoffError: There are none.
        OSError: The folder cannot be read.
    """
    if not isinstance(images, str | Path):
        paths = [Path(path) for path in images]
        if not paths:
            raise BirkhoffError("the list of pictures is empty")
        return paths
    folder = Path(images)
    if not folder.is_dir():
        folder.stat()
        return [folder]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise BirkhoffError(
            f"{folder}: the folder holds no pictures; they are known by their endings: "
            + ", ".join(sorted(ENDINGS))
        )
    return paths


def read_picture(path: Path) -> Picture:
    """A picture as it is to be seen: in RGB and the right way up.

    Raises:
        BirkhoffError: It cannot be decoded, is suspiciously large, or Pillow is not installed.
        OSError: It cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            'reading pictures takes Pillow; install it with `pip install "birkhoff[eval]"`'
        ) from error
    with path.open("rb") as file:
        try:
            with Image.open(file) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except Image.DecompressionBombError as error:
            raise BirkhoffError(
                f"{path}: the picture has too many pixels to be one; scale it down"
            ) from error
        except Exception as error:  # A damaged file can make a decoder raise anything.
            raise BirkhoffError(
                f"{path}: this is no picture that can be read, or it is damaged; remove it"
            ) from error
