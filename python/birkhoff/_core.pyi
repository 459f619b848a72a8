"""Codec, file format and kernels of birkhoff.

Every call that takes more than a few microseconds releases the GIL. Arrays of `uint8` called `data`
hold the raw little-endian bytes of a tensor in row-major order and must be C-contiguous. Dtypes are
named as safetensors names them (`"F32"`, `"BF16"`, `"I64"`, ...).
"""

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BirkhoffError",
    "BorrowedMatrix",
    "Distortion",
    "Entry",
    "File",
    "FormatError",
    "HyperMatrix",
    "Writer",
    "attention",
    "available_isas",
    "coded_nbytes",
    "cpu_features",
    "curve",
    "default_threads",
    "encode",
    "get_num_threads",
    "group_scales",
    "isa",
    "manifest",
    "planned_nbytes",
    "rates",
    "set_num_threads",
    "taps",
]

_Codec: TypeAlias = Literal["shift", "winding"]
_Precision: TypeAlias = Literal["highest", "high", "medium"]
_Planned: TypeAlias = (
    tuple[Literal["coded"], str, str, tuple[int, ...], int, int, int, str]
    | tuple[Literal["stored"], str, str, tuple[int, ...], str]
    | tuple[Literal["tied"], str, str, tuple[int, ...], str]
)

class BirkhoffError(Exception):
    """What birkhoff raises for reasons of its own."""

class FormatError(BirkhoffError, ValueError):
    """A file or a tensor is damaged or cannot be used."""

def isa() -> str:
    """The instruction set in use: `BIRKHOFF_ISA` if set, else the best that this CPU has.

    Raises ValueError if the variable names none, or one that this CPU lacks.
    """

def available_isas() -> list[str]:
    """The instruction sets that this CPU can run, plainest first."""

def cpu_features() -> list[str]:
    """The CPU features present that matter to the kernels."""

def default_threads() -> int:
    """`BIRKHOFF_NUM_THREADS` if set, else the CPUs that this process may use.

    Raises ValueError if the variable is no whole number from 1 to 1024.
    """

def set_num_threads(threads: int) -> None:
    """Set the number of threads (1 to 1024) for the whole process.

    `BIRKHOFF_NUM_THREADS`, if set, is stronger.
    """

def get_num_threads() -> int:
    """The number of threads in use."""

def rates(codec: str) -> list[int]:
    """The bits a weight that a codec can take."""

def coded_nbytes(rows: int, cols: int, *, bits: int, codec: str = "shift") -> int:
    """Bytes that a coded matrix takes, padding and scales included."""

def curve() -> list[int]:
    """The 256 int8 values of the curve, by place."""

def group_scales() -> list[float]:
    """What the 16 group exponents stand for; each is a float32."""

def taps(codec: str, bits: int) -> list[tuple[int, int]]:
    """How each of the 16 weights of a block of a stream is read: where its window of 16 bits ends,
    counted in bits from the first of the block, and its multiplier. Empty at 8 bits.
    """

@final
class Distortion:
    """What coding cost, summed over weights. `a + b` is the distortion of both together."""

    @property
    def signal(self) -> float:
        """Sum of squared weights."""

    @property
    def noise(self) -> float:
        """Sum of squared errors."""

    @property
    def max_error(self) -> float:
        """Largest error of one weight."""

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise ratio in dB; `inf` if nothing was lost."""

    def __add__(self, other: Distortion, /) -> Distortion: ...
    def __radd__(self, other: Distortion, /) -> Distortion: ...

@final
class HyperMatrix:
    """A coded matrix of out_features x in_features.

    Its parts are laid out as in a file (docs/format.md) and copied when given by hand.
    """

    def __new__(
        cls,
        codes: NDArray[np.uint8],
        row_scales: NDArray[np.uint16],
        group_exponents: NDArray[np.uint8],
        shape: tuple[int, int],
        *,
        bits: int,
        codec: str = "shift",
    ) -> HyperMatrix: ...
    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def bits(self) -> int:
        """Code bits a weight."""

    @property
    def codec(self) -> _Codec:
        """The trajectory family."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight with scales and padding; NaN or `inf` if there are no weights."""

    @property
    def codes(self) -> NDArray[np.uint8]:
        """Code bytes `[strips, blocks, bits * 64]`: read-only, not copied."""

    @property
    def row_scales(self) -> NDArray[np.uint16]:
        """Row scales `[strips * 16]`, the bits of bfloat16: read-only, not copied."""

    @property
    def group_exponents(self) -> NDArray[np.uint8]:
        """Group exponents `[strips, groups, 8]`, two a byte: read-only, not copied."""

    def decode(self) -> NDArray[np.float32]:
        """The weights as a new array of `shape`."""

    def linear(
        self,
        x: NDArray[np.float32] | NDArray[np.float16],
        bias: NDArray[np.floating[Any]] | None = None,
        precision: _Precision = "high",
    ) -> NDArray[Any]:
        """`x @ W.T + bias`, in the dtype of `x`.

        Args:
            x: `[..., in_features]`, float32 or float16, any strides.
            bias: `[out_features]`.
            precision: `"highest"` (24-bit fixed point a token: as accurate as float32), `"high"`
                (16-bit, relative error about 3e-5) or `"medium"` (8-bit, about 1e-2).

        Raises:
            ValueError: A shape, the dtype or the precision does not fit.
        """

    def __reduce__(self) -> tuple[Callable[..., HyperMatrix], tuple[object, ...]]: ...

@final
class BorrowedMatrix:
    """A coded matrix in memory that another library owns. For `birkhoff.ops` alone.

    The addresses must stay valid as long as `owner` lives; nothing checks them.
    """

    def __new__(
        cls,
        owner: object,
        codes: int,
        row_scales: int,
        group_exponents: int,
        shape: tuple[int, int],
        *,
        bits: int,
        codec: str,
    ) -> BorrowedMatrix: ...
    def linear(
        self,
        x: int,
        dtype: str,
        rows: int,
        row_stride: int,
        bias: int | None,
        out: int,
        precision_name: str,
        threads: int,
    ) -> None:
        """Writes the product to the address `out`; `x`, `bias` and `out` are addresses too."""

    def decode(self) -> NDArray[np.float32]:
        """The weights as a new array."""

_Heads: TypeAlias = tuple[int, Sequence[int], Sequence[int]]

def attention(
    queries: _Heads,
    keys: _Heads,
    values: _Heads,
    dtype: str,
    out: int,
    scale: float,
    relative_position: tuple[tuple[int, int], tuple[int, int]] | None,
    window: tuple[int, tuple[tuple[int, int], tuple[int, int]]] | None,
    threads: int,
) -> None:
    """Attention in memory that another library owns. For `birkhoff.attention` alone.

    A tensor is its address, its shape `(batch, height, width, heads, head_dim)` and the strides of
    all but the channels, in elements; `out` is an address. `relative_position` has address and
    length of the tables for rows and columns, `window` the rows of a window and address and length
    of the padding key and value. Nothing checks addresses. Raises ValueError if shapes do not fit.
    """

def encode(
    data: NDArray[np.uint8],
    dtype: str,
    rows: int,
    cols: int,
    *,
    bits: int = 4,
    codec: str = "shift",
    scale: str = "unbiased",
    factor: NDArray[np.float32] | None = None,
) -> tuple[HyperMatrix, Distortion]:
    """Encode a matrix of dtype "F64", "F32", "F16" or "BF16".

    `scale` is "unbiased" (rows keep their projection on the original) or "least-squares" (the least
    error). `factor` asks for error feedback, under which scales stay as they are first chosen: the
    upper triangular C, `[cols, cols]`, with C C^T the second moments of what the matrix is
    multiplied with; what is below its diagonal is not read. Raises ValueError if an argument is
    wrong or weights are NaN or infinite.
    """

@final
class Entry:
    """One original tensor of a file."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Its element type in the original."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the original."""

    @property
    def coding(self) -> Literal["coded", "stored", "tied"]:
        """How it is kept: as a coded matrix, as its elements, or as another tensor."""

    @property
    def bits(self) -> int | None:
        """Bits a weight, if it is coded."""

    @property
    def codec(self) -> _Codec | None:
        """The trajectory family, if it is coded."""

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """Rows and columns, if it is coded."""

    @property
    def stored_dtype(self) -> str | None:
        """Its element type in the file, if it is stored."""

    @property
    def tied_to(self) -> str | None:
        """The name of the tensor that holds its data, if it is tied."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file; 0 if it is tied."""

    @property
    def original_nbytes(self) -> int:
        """Bytes in the original."""

@final
class File:
    """A safetensors file, compressed or plain, as a memory map.

    Nothing may truncate the file or change it in place while this object, or an array or matrix
    taken from it, is alive. (birkhoff itself replaces files, which is safe.) Methods that take a
    name raise FormatError if there is no such tensor.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> File:
        """Open a file and check its header.

        Raises OSError if it cannot be read, FormatError if it is damaged, no safetensors file or of
        a newer version.
        """

    @property
    def path(self) -> str:
        """Where it was opened."""

    @property
    def compressed(self) -> bool:
        """Whether birkhoff wrote it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""

    @property
    def settings(self) -> str:
        """The settings given to its `Writer`: JSON, "{}" if it is a plain file."""

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the safetensors header."""

    def entries(self) -> list[Entry]:
        """The original tensors in their original order; by offset in a plain file."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a stored tensor as in the file: read-only, not copied."""

    def matrix(self, name: str) -> HyperMatrix:
        """A coded tensor, not copied."""

    def float32(self, name: str) -> NDArray[np.float32]:
        """A float tensor of any coding as a new array in its original shape."""

    def check(self, name: str) -> None:
        """Raise FormatError if the bytes of a tensor do not have their checksum.

        A plain file has no checksums.
        """

    def compare(self, name: str, data: NDArray[np.uint8], dtype: str) -> Distortion:
        """How far a tensor is from its original.

        Raises FormatError if the original is of another kind or size, or a tensor of integers or
        bools differs from it.
        """

    def decompress(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[str], object] | None = None,
    ) -> int:
        """Write an ordinary safetensors file; return its bytes.

        Names, shapes and dtypes are those of the original, tied tensors become copies. Checksums
        are checked on the way. `progress` is called with the name of each tensor after it; if it
        raises, or on any other error, nothing is left behind.
        """

def manifest(
    plan: Sequence[_Planned], data: Sequence[Sequence[NDArray[np.uint8]]], *, settings: str = "{}"
) -> str:
    """The metadata `birkhoff` of a compressed file that another program writes.

    `plan` is that of `Writer`. `data` has the bytes that the file will hold for each of its items:
    three arrays for a coded tensor (codes, row scales, group exponents), one for a stored one, none
    for a tied one.

    Raises FormatError if the plan is impossible or the data are of other lengths.
    """

@final
class Writer:
    """A compressed file in the making, and a context manager.

    The plan lists every original tensor, in order, as one of

    - `("coded", name, dtype, shape, rows, cols, bits, codec)`
    - `("stored", name, dtype, shape, stored_dtype)`: a float tensor may be stored as another float
    - `("tied", name, dtype, shape, to)`: the same as the tensor `to`, of the same dtype and shape

    The file appears with `finish`. Leaving the context without it removes the temporary file.
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        plan: Sequence[_Planned],
        *,
        settings: str = "{}",
        overwrite: bool = False,
    ) -> Writer:
        """Start a file. `settings` is a JSON object that `File.settings` gives back.

        Raises FormatError if the plan is impossible, FileExistsError if there is a file already.
        """

    def write(
        self, name: str, data: NDArray[np.uint8], factor: NDArray[np.float32] | None = None
    ) -> Distortion:
        """Write a tensor of the plan, given its bytes in its original dtype.

        `factor` is for one that is to be coded, as of `encode`. Tensors may come in any order and
        from several threads. Raises FormatError if the tensor is not in the plan, written already,
        tied, of another size, or to be coded while some of its weights are NaN or infinite.
        """

    def write_coded(
        self,
        name: str,
        codes: NDArray[np.uint8],
        row_scales: NDArray[np.uint8],
        group_exponents: NDArray[np.uint8],
    ) -> None:
        """Write a tensor that is coded already, given the bytes of its parts.

        Raises FormatError if the plan does not say that it is coded, it is written already, or a
        part is of another size.
        """

    def finish(self) -> int:
        """Complete the file; return its bytes. Raises FormatError if tensors are missing."""

    def __enter__(self) -> Writer: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
        /,
    ) -> None: ...

def planned_nbytes(plan: Sequence[_Planned], *, settings: str = "{}") -> int:
    """Bytes of the file that a `Writer` makes of a plan.

    Raises FormatError if the plan is impossible.
    """
