"""Compress any Segment Anything Model without data.

>>> import birkhoff
>>> summary = birkhoff.compress_file("sam_vit_b.pth", "sam_vit_b.safetensors")  # doctest: +SKIP
>>> matrix = birkhoff.encode(weight, bits=4)  # doctest: +SKIP
"""

from importlib.metadata import version as _version

from birkhoff._core import (
    BirkhoffError,
    Distortion,
    FormatError,
    HyperMatrix,
    get_num_threads,
    set_num_threads,
)
from birkhoff.arrays import encode
from birkhoff.compress import compress_file, decompress_file
from birkhoff.files import TensorFile, open
from birkhoff.precision import get_precision, set_precision
from birkhoff.summary import Summary, TensorSummary
from birkhoff.verify import Verification, verify_file

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
    "compress_file",
    "decompress_file",
    "encode",
    "get_num_threads",
    "get_precision",
    "open",
    "set_num_threads",
    "set_precision",
    "verify_file",
]
