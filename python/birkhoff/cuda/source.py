"""The source of the kernels for one variant: the files of ``kernels/`` behind its constants.

Codec, bits and dtype are constants of the source: shifts and multipliers then stand in the
instructions, and there is no matrix of variants to build ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from birkhoff import _core

KERNELS = Path(__file__).with_name("kernels")

#: In the order of inclusion.
FILES = ("device.cuh", "weights.cuh", "decode.cuh", "gemv.cuh", "gemm.cuh")

#: Shared memory that the look-up tables take, in bytes.
TABLE_BYTES = 256 * 32 * 4 + 128

#: Threads of the kernels ``decode`` and ``gemv_*``.
STRIP_THREADS = 256

#: The largest numbers of tokens of the kernels ``gemv_*``.
GEMV_TOKENS = (1, 2, 4, 8)

#: Compute capability at which mma.m16n8k16 and bfloat16 arrive.
AMPERE = 80

Dtype = Literal["F32", "F16", "BF16"]


@dataclass(frozen=True)
class Tile:
    """What a thread block of a ``gemm_*`` kernel computes.

    Attributes:
        m: Tokens.
        n: Outputs.
        warps_m: Warps along the tokens.
        warps_n: Warps along the outputs.
    """

    m: int
    n: int
    warps_m: int
    warps_n: int

    @property
    def kernel(self) -> str:
        """The name of its kernel."""
        return f"gemm_{self.m}x{self.n}"

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return self.warps_m * self.warps_n * 32

    def shared_bytes(self, planes: int) -> int:
        """Shared memory: the tables and two stages of x and W, 32 columns of 2 bytes each."""
        return TABLE_BYTES + 2 * 64 * (planes * self.m + self.n)


SMALL = Tile(64, 64, 2, 2)
LARGE = Tile(128, 128, 2, 4)


def gemv_shared_bytes(tokens: int) -> int:
    """Shared memory of ``gemv_*``: the tables, and 32 columns of x for each of 8 warps."""
    return TABLE_BYTES + 8 * 32 * 4 * tokens


@dataclass(frozen=True)
class Variant:
    """What the source is compiled for.

    Attributes:
        codec: ``"shift"`` or ``"winding"``.
        bits: Code bits a weight.
        dtype: That of x and y, as safetensors names it.
        planes: Into how many bfloat16 planes float32 x is cut; 1 for other dtypes.
        capability: Compute capability of the device: 80 for 8.0.
    """

    codec: str
    bits: int
    dtype: Dtype
    planes: int
    capability: int

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Those of its ``gemm_*`` kernels."""
        if self.capability < AMPERE:
            # Without bfloat16, and with 64 KB of shared memory.
            return (SMALL,) if self.dtype == "F16" else ()
        # Two accumulators of a large tile do not fit the registers.
        return (SMALL,) if self.dtype == "F32" else (SMALL, LARGE)


def constants(variant: Variant) -> str:
    """The constants that the kernels are compiled with, as C++."""
    taps = _core.taps(variant.codec, variant.bits)
    gemv = (f"KERNEL({tokens}, {gemv_shared_bytes(tokens)})" for tokens in GEMV_TOKENS)
    gemm = (
        f"KERNEL({tile.m}, {tile.n}, {tile.warps_m}, {tile.warps_n}, "
        f"{tile.shared_bytes(variant.planes)})"
        for tile in variant.tiles
    )
    scales = [f"{scale!r}f" for scale in _core.group_scales()]
    return f"""
enum Dtype {{ F32, F16, BF16 }};
static constexpr Dtype DTYPE = {variant.dtype};
static constexpr int PLANES = {variant.planes};
static constexpr int BITS = {variant.bits};
static constexpr int WINDOW_END[16] = {{{_listed(end for end, _ in taps)}}};
static constexpr unsigned MULTIPLIER[16] = {{{_listed(multiplier for _, multiplier in taps)}}};
__constant__ signed char CURVE[256] = {{{_listed(_core.curve())}}};
__constant__ float GROUP_SCALE[16] = {{{_listed(scales)}}};
#define GEMV_VARIANTS(KERNEL) {" ".join(gemv)}
#define GEMM_VARIANTS(KERNEL) {" ".join(gemm)}
"""


def source(variant: Variant) -> str:
    """All that is compiled, as one text; messages of the compiler name the files."""
    device, *kernels = map(_text, FILES)
    return "".join([device, constants(variant), *kernels])


def device_source() -> str:
    """The part of :func:`source` that another one may stand for, to run the kernels elsewhere."""
    return _text(FILES[0])


@functools.cache
def _text(name: str) -> str:
    return f'#line 1 "{name}"\n{(KERNELS / name).read_text()}'


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
