"""Compress any Segment Anything Model without data.

>>> import birkhoff
>>> summary = birkhoff.compress_file("sam_vit_b.pth", "sam_vit_b.safetensors")  # doctest: +SKIP
>>> matrix = birkhoff.encode(weight, bits=4)  # doctest: +SKIP
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

from birkhoff._core import (
    BirkhoffError,
    Distortion,
    FormatError,
    HyperMatrix,
    get_num_threads,
    set_num_threads,
)
from birkhoff.arrays import encode
from birkhoff.compression import compress_file, decompress_file
from birkhoff.files import TensorFile, open
from birkhoff.precision import get_precision, set_precision
from birkhoff.summary import Summary, TensorSummary
from birkhoff.verify import Verification, verify_file

if _TYPE_CHECKING:
    from birkhoff import nn
    from birkhoff.models import compress, load, save

__version__ = _version("birkhoff")

__all__ = [
    "BirkhoffError",
    "Distortion",
    "FormatError",
    "HyperMatrix",
    "Summary",
    "TensorFile",
    "TensorSummary",
    "Verification",
    "__version__",
    "compress",
    "compress_file",
    "decompress_file",
    "encode",
    "get_num_threads",
    "get_precision",
    "load",
    "nn",
    "open",
    "save",
    "set_num_threads",
    "set_precision",
    "verify_file",
]


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is asked for."""
    if name == "nn":
        return _import_module("birkhoff.nn")
    if name in ("compress", "load", "save"):
        return getattr(_import_module("birkhoff.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
