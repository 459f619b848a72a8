"""Decodes and multiplies with weights that lie on a CUDA device."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from birkhoff import torch_decode
from birkhoff.cuda import program
from birkhoff.cuda.dispatch import choose, forced_path
from birkhoff.cuda.driver import Kernel
from birkhoff.cuda.program import Program
from birkhoff.cuda.source import Dtype, Tile, Variant
from birkhoff.precision import get_precision

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class Arguments(ctypes.Structure):
    """What kernels take: ``Arguments`` of ``weights.cuh``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("group_exponents", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("tokens", ctypes.c_int),
        ("out_features", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("aligned", ctypes.c_int),
    )


@dataclass(frozen=True)
class DeviceWeight:
    """A coded matrix on a device.

    Attributes:
        codes: uint8 of shape (strips, blocks, 64 * bits).
        row_scales: bfloat16 of shape (16 * strips,).
        group_exponents: uint8 of shape (strips, groups, 8).
        out_features: Rows of the matrix.
        in_features: Columns of the matrix.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
    """

    codes: Tensor
    row_scales: Tensor
    group_exponents: Tensor
    out_features: int
    in_features: int
    bits: int
    codec: str

    @classmethod
    def of(
        cls,
        parts: tuple[Tensor, Tensor, Tensor],
        shape: tuple[int, int],
        *,
        bits: int,
        codec: str,
    ) -> DeviceWeight:
        """One of these parts, copied where kernels could not read them in place.

        Args:
            parts: Codes, row scales and group exponents.
            shape: Out_features and in_features.
            bits: As the attribute.
            codec: As the attribute.
        """
        codes, row_scales, group_exponents = (part.contiguous() for part in parts)
        if codes.data_ptr() % 4 != 0:
            codes = codes.clone()
        return cls(codes, row_scales, group_exponents, *shape, bits, codec)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight, of shape (out_features, in_features)."""
        of_kernel = dtype if dtype in _DTYPES else torch.float32
        # The program that products use too.
        planes = _planes(of_kernel, get_precision())
        loaded = self.program(of_kernel, planes) if forced_path() != "torch" else None
        return self.decode_with(of_kernel, loaded).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        """``x @ W.T + bias`` in the dtype of x, with W rounded to that dtype.

        Args:
            x: Of shape (..., in_features), on the device of the weight.
            bias: Of shape (out_features,), or None.
            precision: In how many planes the tensor cores see float32 x.
        """
        bias = None if bias is None else bias.to(x.dtype)
        tokens = x.numel() // max(self.in_features, 1)
        path = forced_path()
        loaded = kernel = None
        if path != "torch" and tokens > 0 and self.out_features > 0:
            loaded = self.program(x.dtype, _planes(x.dtype, precision))
            kernel = None if loaded is None else choose(loaded.variant, tokens, path)
        if loaded is None or kernel is None:
            return functional.linear(x, self.decode_with(x.dtype, loaded), bias)
        return self.multiply_with(loaded, kernel, x, bias)

    def prepare(self, dtype: torch.dtype, precision: str) -> None:
        """Compiles what :meth:`linear` needs for x of a dtype, and loads it."""
        if dtype in _DTYPES and self.codes.numel() > 0 and forced_path() != "torch":
            self.program(dtype, _planes(dtype, precision))

    def program(self, dtype: torch.dtype, planes: int) -> Program | None:
        """The kernels for x of a dtype, if the device can have any."""
        index, capability = device_of(self.codes)
        codec = "shift" if self.bits == 8 else self.codec  # the same codes
        return program.load(Variant(codec, self.bits, _DTYPES[dtype], planes, capability), index)

    def decode_with(self, dtype: torch.dtype, loaded: Program | None) -> Tensor:
        """The decoded weight in the dtype of a program, or with torch operations if None."""
        shape = (self.out_features, self.in_features)
        if loaded is None:
            parts = (self.codes, self.row_scales, self.group_exponents)
            return torch_decode.decode(
                *parts, *shape, bits=self.bits, codec=self.codec, dtype=dtype
            )
        weight = torch.empty(shape, dtype=dtype, device=self.codes.device)
        if weight.numel() > 0:
            aligned = _is_aligned(weight)
            arguments = self._arguments(loaded, None, None, weight, tokens=0, aligned=aligned)
            _launch(loaded, loaded.decode, (self._strips, 1), arguments, weight)
        return weight

    def multiply_with(
        self, loaded: Program, kernel: Tile | int, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The product, by a tile of ``gemm`` or, up to as many tokens, a ``gemv_*``."""
        y = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        x = x.reshape(-1, self.in_features)
        if x.stride(1) != 1:
            x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        tokens = x.shape[0]
        arguments = self._arguments(loaded, x, bias, y, tokens=tokens, aligned=_is_aligned(x))
        if isinstance(kernel, Tile):
            grid = (-(-tokens // kernel.m), -(-self.out_features // kernel.n))
            _launch(loaded, loaded.gemm[kernel], grid, arguments, y)
        else:
            _launch(loaded, loaded.gemv[kernel], (self._strips, 1), arguments, y)
        return y

    @property
    def _strips(self) -> int:
        return -(-self.out_features // 16)

    def _arguments(
        self,
        loaded: Program,
        x: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        *,
        tokens: int,
        aligned: bool,
    ) -> Arguments:
        return Arguments(
            None if x is None else x.data_ptr(),
            self.codes.data_ptr(),
            self.row_scales.data_ptr(),
            self.group_exponents.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            0 if x is None else x.stride(0),
            tokens,
            self.out_features,
            self.in_features,
            aligned,
        )


def _planes(dtype: torch.dtype, precision: str) -> int:
    """Into how many bfloat16 planes tensor cores get x."""
    # As torch.set_float32_matmul_precision has it.
    return {"highest": 3, "high": 2, "medium": 1}[precision] if dtype == torch.float32 else 1


def _is_aligned(matrix: Tensor) -> bool:
    """Whether 8 elements that follow each other may be moved 16 bytes at a time."""
    size = matrix.element_size()
    return (
        matrix.shape[1] % 8 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * size % 16 == 0
    )


def _launch(
    loaded: Program, kernel: Kernel, grid: tuple[int, int], arguments: Arguments, out: Tensor
) -> None:
    loaded.driver.launch(loaded.device, kernel, grid, arguments, stream_of(out))


def device_of(tensor: Tensor) -> tuple[int, int]:
    """Index and compute capability of a tensor's device: 80 for 8.0."""
    index = tensor.get_device()
    return index, _capability(index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def stream_of(tensor: Tensor) -> int:
    """The current stream of a tensor's device."""
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
