"""Compressed files as lazy mappings from names to arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import Entry, File, FormatError
from birkhoff.dtypes import NUMPY_DTYPES

if TYPE_CHECKING:
    from birkhoff._core import HyperMatrix


class TensorFile(Mapping[str, NDArray[Any]]):
    """A safetensors file, compressed or not, memory-mapped.

    A tensor is read, and decoded if need be, when it is asked for: ``file["name"]`` and
    ``file.tensor("name")`` are the same.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the file.

        Raises:
            FormatError: It is damaged or no safetensors file.
            OSError: It cannot be read.
        """
        self._file = File(Path(path))
        self._entries = {entry.name: entry for entry in self._file.entries()}

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._file.path)

    @property
    def compressed(self) -> bool:
        """Whether birkhoff wrote it."""
        return self._file.compressed

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes

    @property
    def settings(self) -> dict[str, Any]:
        """How it was compressed; empty if it was not."""
        settings: dict[str, Any] = json.loads(self._file.settings) if self.compressed else {}
        return settings

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The original shape of every tensor."""
        return {name: tuple(entry.shape) for name, entry in self._entries.items()}

    def entry(self, name: str) -> Entry:
        """How a tensor is held: its dtype, shape, coding, bits, and bytes."""
        if name not in self._entries:
            raise KeyError(f"{self.path}: there is no tensor {name!r}")
        return self._entries[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor in its original shape.

        Coded and bfloat16 tensors come as float32, other stored ones in the dtype in which they are
        stored, as read-only views of the file. Floats of 8 bits, which numpy lacks, come as their
        bytes.

        Raises:
            KeyError: There is no such tensor.
            FormatError: It is damaged.
        """
        entry = self.entry(name)
        if entry.coding == "tied" and entry.tied_to is not None:
            return self.tensor(entry.tied_to)
        stored_dtype = entry.stored_dtype or entry.dtype
        if entry.coding == "coded" or stored_dtype == "BF16":
            return self._file.float32(name).reshape(entry.shape)
        dtype = NUMPY_DTYPES.get(stored_dtype, np.dtype(np.uint8))
        return self._file.raw(name).view(dtype).reshape(entry.shape)

    def matrix(self, name: str) -> HyperMatrix:
        """A coded tensor as it lies in the file, undecoded.

        Raises:
            KeyError: There is no such tensor.
            ValueError: It is not coded.
        """
        self.entry(name)
        return self._file.matrix(name)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self)} tensors, {self.nbytes:,} bytes)"


def open(path: str | Path) -> TensorFile:
    """Opens a compressed file (or any other safetensors file) lazily."""
    return TensorFile(path)


def require_compressed(path: str | Path) -> File:
    """Opens a file that must be a compressed one.

    Raises:
        FormatError: It is not, or it is damaged.
        OSError: It cannot be read.
    """
    file = File(Path(path))
    if not file.compressed:
        raise FormatError(
            f"{path}: this safetensors file was not written by birkhoff; "
            "make one with `birkhoff compress`"
        )
    return file
