"""Reads the checkpoints that people have, one tensor at a time.

A ``.safetensors`` file, a Hugging Face folder (``config.json`` beside one or several safetensors
files), or a file of ``torch.save`` (:mod:`birkhoff.torch_checkpoint`). What a file is follows from
its content, not from its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from birkhoff import _core
from birkhoff._core import FormatError
from birkhoff.dtypes import FLOATS

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, whose data are read when asked for."""

    name: str
    #: Element type by the name that safetensors gives it.
    dtype: str
    shape: tuple[int, ...]
    #: The elements in row-major order as little-endian bytes.
    read: Callable[[], NDArray[np.uint8]] = field(repr=False)
    #: The earlier tensor that shares this one's memory, if any.
    tied_to: str | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is of a dtype that can be encoded."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, in its order."""

    path: Path
    tensors: list[Tensor]
    #: The files that hold it.
    files: list[Path]
    #: What was left out or renamed, a sentence each.
    notes: list[str] = field(default_factory=list)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Raises:
        FormatError: The file is damaged, or no checkpoint, or compressed already.
        OSError: It cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    with path.open("rb") as file:
        head = file.read(9)
    # A zip archive, or a bare pickle; the ninth byte of a safetensors file opens its JSON header.
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[8:] != b"{"):
        from birkhoff.torch_checkpoint import open_torch_checkpoint

        return open_torch_checkpoint(path)
    if head[8:] != b"{" and path.suffix != ".safetensors":
        raise FormatError(
            f"{path}: this is neither a safetensors file nor a PyTorch checkpoint; "
            "give a .safetensors, .pth, .pt or .bin file or a Hugging Face folder"
        )
    return Checkpoint(path, _safetensors(path), [path])


def _safetensors(path: Path) -> list[Tensor]:
    file = _core.File(path)
    if file.compressed:
        raise FormatError(
            f"{path}: this file is compressed already; "
            "give the original, or decompress it first with `birkhoff decompress`"
        )

    def reader(name: str) -> Callable[[], NDArray[np.uint8]]:
        return lambda: file.raw(name)

    return [
        Tensor(entry.name, entry.dtype, tuple(entry.shape), reader(entry.name))
        for entry in file.entries()
    ]


def _open_folder(folder: Path) -> Checkpoint:
    """A Hugging Face folder with one safetensors file, or shards and their index."""
    index = folder / INDEX
    if index.exists():
        return _open_shards(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(
            f"{folder}: the folder holds no .safetensors file; "
            "give the checkpoint file itself if it is a .pth, .pt or .bin"
        )
    if len(files) > 1:
        raise FormatError(
            f"{folder}: the folder holds {len(files)} .safetensors files and no {INDEX} that says "
            "how they belong together; give one of the files"
        )
    return Checkpoint(folder, _safetensors(files[0]), files)


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{index}: this is no index of safetensors shards; download the folder again"
        ) from error
    files: list[Path] = []
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shard_of.values()):
        path = folder / shard
        if path.parent != folder:
            raise FormatError(f"{index}: the shard {shard!r} lies outside of the folder")
        if not path.is_file():
            raise FormatError(f"{index}: the shard {shard!r} is missing; download the folder again")
        files.append(path)
        tensors |= {
            tensor.name: tensor
            for tensor in _safetensors(path)
            if shard_of.get(tensor.name) == shard
        }
    missing = [name for name in shard_of if name not in tensors]
    if missing:
        raise FormatError(
            f"{index}: tensor {missing[0]!r} is not in its shard {shard_of[missing[0]]!r}; "
            "download the folder again"
        )
    return Checkpoint(folder, [tensors[name] for name in shard_of], files)
