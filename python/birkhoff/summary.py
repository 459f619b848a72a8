"""What a compressed file holds, and how close it is to the original."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from birkhoff._core import Distortion, Entry, File


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a compressed file."""

    name: str
    #: The original dtype, by the name that safetensors gives it.
    dtype: str
    shape: tuple[int, ...]
    #: ``"coded"``, ``"stored"`` or ``"tied"``.
    coding: str
    #: What was done to it, such as ``"4 bits"``, ``"F32 as F16"``, ``"I64"`` or ``"tied"``.
    kind: str
    #: Code bits a weight, if coded.
    bits: int | None
    original_nbytes: int
    nbytes: int
    #: Ratio of signal to quantization noise in dB, infinite if exact; None if it was not measured.
    sqnr: float | None = None
    #: Largest absolute error; None if it was not measured.
    max_error: float | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """A compressed file as a whole, and tensor by tensor."""

    path: Path
    #: Bytes of the file.
    nbytes: int
    tensors: list[TensorSummary]
    #: How it was compressed: bits, codec, and the rules in the order in which they were read.
    settings: dict[str, Any]
    #: What was left out of the input or renamed.
    notes: list[str]
    seconds: float | None = None
    #: Overall ratio of signal to noise in dB; None if it was not measured.
    sqnr: float | None = None

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original tensors; tied ones counted once."""
        return sum(tensor.original_nbytes for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """How many times smaller than the original tensors the file is."""
        return self.original_nbytes / self.nbytes if self.nbytes else math.nan

    @property
    def bits_per_weight(self) -> float:
        """Bits that a coded weight takes, scales and padding counted."""
        coded = [tensor for tensor in self.tensors if tensor.coding == "coded"]
        weights = sum(tensor.elements for tensor in coded)
        return 8 * sum(tensor.nbytes for tensor in coded) / weights if weights else math.nan

    @property
    def worst(self) -> TensorSummary | None:
        """The tensor with the lowest SQNR; None if nothing was measured or all is exact."""
        measured = [t for t in self.tensors if t.sqnr is not None and math.isfinite(t.sqnr)]
        return min(measured, key=lambda t: t.sqnr or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; figures that are infinite or undefined are null."""
        worst = self.worst
        return {
            "path": str(self.path),
            "original_nbytes": self.original_nbytes,
            "nbytes": self.nbytes,
            "ratio": finite(self.ratio),
            "bits_per_weight": finite(self.bits_per_weight),
            "sqnr_db": finite(self.sqnr),
            "worst_sqnr_db": worst.sqnr if worst else None,
            "worst_tensor": worst.name if worst else None,
            "seconds": self.seconds,
            "settings": self.settings,
            "notes": self.notes,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "coding": tensor.coding,
                    "kind": tensor.kind,
                    "bits": tensor.bits,
                    "original_nbytes": tensor.original_nbytes,
                    "nbytes": tensor.nbytes,
                    "sqnr_db": finite(tensor.sqnr),
                    "max_error": finite(tensor.max_error),
                }
                for tensor in self.tensors
            ],
        }


def finite(value: float | None) -> float | None:
    """The value if JSON can hold it, else None."""
    return value if value is not None and math.isfinite(value) else None


def summarize(
    file: File,
    distortions: Mapping[str, Distortion] | None = None,
    *,
    notes: list[str] | None = None,
    seconds: float | None = None,
) -> Summary:
    """Sums up a file.

    Args:
        file: The file.
        distortions: The distortion of each tensor that was measured.
        notes: What was left out of the input or renamed.
        seconds: How long it took to compress.
    """
    distortions = distortions or {}
    total = reduce(add, distortions.values()) if distortions else None
    return Summary(
        path=Path(file.path),
        nbytes=file.nbytes,
        tensors=[_summarize(entry, distortions.get(entry.name)) for entry in file.entries()],
        settings=json.loads(file.settings) if file.compressed else {},
        notes=notes or [],
        seconds=seconds,
        sqnr=total.sqnr if total else None,
    )


def _summarize(entry: Entry, distortion: Distortion | None) -> TensorSummary:
    tied = entry.coding == "tied"
    if entry.coding == "coded":
        kind = f"{entry.bits} bits"
    elif tied:
        kind = "tied"
    elif entry.stored_dtype == entry.dtype:
        kind = entry.dtype
    else:
        kind = f"{entry.dtype} as {entry.stored_dtype}"
    return TensorSummary(
        name=entry.name,
        dtype=entry.dtype,
        shape=tuple(entry.shape),
        coding=entry.coding,
        kind=kind,
        bits=entry.bits,
        original_nbytes=0 if tied else entry.original_nbytes,
        nbytes=0 if tied else entry.nbytes,
        sqnr=distortion.sqnr if distortion else None,
        max_error=distortion.max_error if distortion else None,
    )
