"""Builds and runs the CUDA kernels on the CPU, and checks what they compute."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import birkhoff
from birkhoff.cuda import source
from birkhoff.cuda.launch import Arguments
from birkhoff.cuda.source import Dtype, Tile, Variant

HERE = Path(__file__).parent

#: Built emulators of this process.
_FOLDER = tempfile.TemporaryDirectory(prefix="birkhoff-emulator-")

DTYPES: dict[Dtype, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: A fault to plant: text of a kernel's source, and what stands there instead.
Fault = tuple[str, str]

COMPILER = shutil.which("g++") if sys.platform == "linux" else None


class EmulationError(RuntimeError):
    """A kernel did what it may not do."""


def build(variant: Variant, fault: Fault | None = None, sanitize: bool = False) -> Path:
    """Compiles the kernels of a variant for the CPU: the path of a shared library."""
    return _build(variant, fault, sanitize)


@functools.cache
def _build(variant: Variant, fault: Fault | None, sanitize: bool) -> Path:
    text = source.source(variant).replace(source.device_source(), "")
    if fault is not None:
        assert text.count(fault[0]) == 1, f"{fault[0]!r} stands {text.count(fault[0])} times"
        text = text.replace(*fault)
    text = f'#include "emulated_device.hpp"\n{text}\n#include "emulated_launch.hpp"\n'
    name = hashlib.sha256(repr((variant, fault, sanitize)).encode()).hexdigest()[:16]
    path = Path(_FOLDER.name) / f"{name}.so"
    path.with_suffix(".cpp").write_text(text)
    headers = _precompiled(sanitize)
    _compile(f"-I{headers}", f"-I{HERE}", path.with_suffix(".cpp"), to=path, sanitize=sanitize)
    return path


@functools.cache
def _precompiled(sanitize: bool) -> Path:
    """The folder of the header that takes most of the time, compiled."""
    header = HERE / "emulated_device.hpp"
    folder = Path(_FOLDER.name) / ("sanitized" if sanitize else "plain")
    folder.mkdir()
    compiled = folder / f"{header.name}.gch"
    _compile("-x", "c++-header", header, to=compiled, sanitize=sanitize)
    return folder


def _compile(*arguments: str | Path, to: Path, sanitize: bool) -> None:
    # Products and sums are rounded each, as in the kernels' decode.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    options += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    if sanitize:
        options += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, *map(str, arguments), "-o", str(to)], check=True)


@dataclass
class Emulator:
    """The kernels of a variant on the CPU."""

    variant: Variant
    fault: Fault | None = None
    sanitize: bool = False

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Arguments,
        order: int,
    ) -> None:
        """Runs a kernel.

        Raises:
            EmulationError: Its threads wait for each other for ever, or lanes of a warp diverge.
        """
        library = ctypes.CDLL(str(build(self.variant, self.fault, self.sanitize)))
        library.emulated_launch.restype = ctypes.c_char_p
        failure: bytes | None = library.emulated_launch(
            kernel.encode(), *grid, threads, shared_bytes, ctypes.byref(arguments), order
        )
        if failure is not None:
            raise EmulationError(failure.decode())


class Guarded:
    """A copy of a tensor that ends where a page begins that may not be touched.

    Attributes:
        data: Its bytes.
        address: Where they start.
    """

    _libc = ctypes.CDLL(None)

    def __init__(self, tensor: Tensor) -> None:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        pages = -(-max(data.size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        whole = np.frombuffer(self._memory, np.uint8)
        start = whole.ctypes.data
        assert self._libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
        offset = pages - data.size
        # What lies before must stay as it is.
        self._before = whole[:offset]
        self._before[:] = 0xA5
        self.data = whole[offset:pages]
        self.data[:] = data
        self._like = tensor
        self.address = start + offset

    def read(self) -> Tensor:
        """What stands there now."""
        assert (self._before == 0xA5).all(), "written before the start"
        return torch.from_numpy(self.data.copy()).view(self._like.dtype).reshape(self._like.shape)


@dataclass
class Weight:
    """A coded matrix of random weights."""

    out_features: int
    in_features: int
    codec: str = "shift"
    bits: int = 4

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.out_features * self.in_features + self.bits)
        weight = rng.standard_normal((self.out_features, self.in_features)).astype(np.float32)
        # Groups and rows of different scales.
        weight *= np.exp2(-rng.integers(0, 4, (self.out_features, 1)))
        weight *= np.exp2(-rng.integers(0, 3, self.in_features))
        self.matrix = birkhoff.encode(weight * 0.01, bits=self.bits, codec=self.codec)
        self.parts = tuple(
            Guarded(torch.from_numpy(part.copy()))
            for part in (self.matrix.codes, self.matrix.row_scales, self.matrix.group_exponents)
        )

    def decoded(self, dtype: Dtype) -> Tensor:
        """As the CPU decodes it, rounded to a dtype."""
        return torch.from_numpy(self.matrix.decode()).to(DTYPES[dtype])

    def arguments(self, x: int | None, bias: int | None, y: int, **others: int) -> Arguments:
        """What a kernel takes."""
        addresses = [x, *(part.address for part in self.parts), bias, y]
        return Arguments(
            *addresses, out_features=self.out_features, in_features=self.in_features, **others
        )


def decode(emulator: Emulator, weight: Weight, *, aligned: bool = False, order: int = 0) -> Tensor:
    """What the decode kernel writes."""
    shape = (weight.out_features, weight.in_features)
    out = Guarded(torch.full(shape, float("nan"), dtype=DTYPES[emulator.variant.dtype]))
    arguments = weight.arguments(None, None, out.address, aligned=aligned)
    strips = -(-weight.out_features // 16)
    shared_bytes = source.TABLE_BYTES
    emulator.launch("decode", (strips, 1), source.STRIP_THREADS, shared_bytes, arguments, order)
    return out.read()


def linear(
    emulator: Emulator,
    kernel: Tile | int,
    weight: Weight,
    x: Tensor,
    bias: Tensor | None,
    *,
    order: int = 0,
) -> Tensor:
    """What a kernel writes as the product; ``x`` may have rows that are further apart."""
    variant = emulator.variant
    tokens, stride = x.shape[0], x.stride(0)
    # The last row of x ends at a page that may not be touched.
    memory = x.as_strided(((tokens - 1) * stride + weight.in_features,), (1,))
    guarded_x = Guarded(memory)
    guarded_bias = None if bias is None else Guarded(bias)
    y = Guarded(torch.full((tokens, weight.out_features), float("nan"), dtype=x.dtype))
    size = x.element_size()
    arguments = weight.arguments(
        guarded_x.address,
        None if guarded_bias is None else guarded_bias.address,
        y.address,
        x_stride=stride,
        tokens=tokens,
        aligned=weight.in_features % 8 == 0
        and stride * size % 16 == 0
        and guarded_x.address % 16 == 0,
    )
    if isinstance(kernel, Tile):
        grid = (-(-tokens // kernel.m), -(-weight.out_features // kernel.n))
        shared_bytes = kernel.shared_bytes(variant.planes)
        emulator.launch(kernel.kernel, grid, kernel.threads, shared_bytes, arguments, order)
    else:
        grid = (-(-weight.out_features // 16), 1)
        shared_bytes = source.gemv_shared_bytes(kernel)
        threads = source.STRIP_THREADS
        emulator.launch(f"gemv_{kernel}", grid, threads, shared_bytes, arguments, order)
    return y.read()
