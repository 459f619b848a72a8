"""Checks a compressed file, alone or against its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from birkhoff._core import BirkhoffError, Distortion, Entry, File
from birkhoff.checkpoint import Tensor, open_checkpoint
from birkhoff.files import require_compressed
from birkhoff.summary import Summary, summarize

#: A coded tensor with a lower SQNR, in dB, than this is no encoding of the original.
LOWEST_SQNR = 0.0
#: Errors up to this size are none: rows of so small weights are stored as zeros.
VANISHING = 1e-33


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_file` found."""

    summary: Summary
    #: What is wrong, a sentence each; empty if all is well.
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"ok": self.ok, "problems": self.problems, **self.summary.to_json()}


def verify_file(
    path: str | Path,
    against: str | Path | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Checks every checksum of a compressed file and, if given, compares it with its original.

    Args:
        path: The compressed file.
        against: The checkpoint it was made from.
        progress: Called after every tensor with its name, how many are done, and of how many.

    Raises:
        FormatError: One of the two cannot be read at all.
        OSError: The same.
    """
    file = require_compressed(path)
    entries = {entry.name: entry for entry in file.entries()}
    problems: list[str] = []
    distortions: dict[str, Distortion] = {}
    originals: dict[str, Tensor] = {}
    if against is not None:
        originals = {tensor.name: tensor for tensor in open_checkpoint(against).tensors}
        problems += [
            f"tensor {name!r} of the original is missing" for name in originals.keys() - entries
        ]
    for done, (name, entry) in enumerate(entries.items(), start=1):
        try:
            file.check(name)
        except BirkhoffError as error:
            problems.append(str(error))
        else:
            if against is not None:
                problem = _compare(file, entry, originals.get(name), distortions)
                if problem:
                    problems.append(f"tensor {name!r} {problem}")
        if progress is not None:
            progress(name, done, len(entries))
    return Verification(summarize(file, distortions), problems)


def _compare(
    file: File, entry: Entry, original: Tensor | None, distortions: dict[str, Distortion]
) -> str | None:
    """Compares one tensor, and records its distortion; returns what is wrong with it."""
    if original is None:
        return "is not in the original"
    if tuple(entry.shape) != original.shape:
        return f"has shape {tuple(entry.shape)}, but {original.shape} in the original"
    if entry.dtype != original.dtype:
        return f"has dtype {entry.dtype}, but {original.dtype} in the original"
    data = original.read()
    if entry.coding == "stored" and entry.stored_dtype == entry.dtype:
        if not np.array_equal(file.raw(entry.name), data):
            return "is stored unchanged, but differs from the original"
    elif original.is_float:
        distortion = file.compare(entry.name, data, entry.dtype)
        distortions[entry.name] = distortion
        if distortion.max_error > VANISHING and distortion.sqnr <= LOWEST_SQNR:
            return f"does not resemble the original: its SQNR is {distortion.sqnr:.1f} dB"
    return None
