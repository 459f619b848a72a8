"""The operator ``torch.ops.birkhoff.linear``: decode and multiply in one.

``linear(x, codes, row_scales, group_exponents, bias, out_features, in_features, bits, codec,
precision)`` gives ``x @ W.T + bias`` in the dtype of ``x``, for ``x`` of shape
``(..., in_features)`` in float32, float16 or bfloat16. On a CUDA device, :mod:`birkhoff.cuda` does
it. It is for inference: it has no gradient, and says so where one is asked for.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from birkhoff import _core
from birkhoff.cuda import DeviceWeight

if TYPE_CHECKING:
    from collections.abc import Callable

_SCHEMA = (
    "linear(Tensor x, Tensor codes, Tensor row_scales, Tensor group_exponents, Tensor? bias, "
    "int out_features, int in_features, int bits, str codec, str precision) -> Tensor"
)

_PARTS = ("codes", "row_scales", "group_exponents")

#: Names of the dtypes that operators take.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_library = torch.library.Library("birkhoff", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,)
)


class CodedWeight:
    """A coded matrix in the memory of three CPU tensors, ready to be multiplied with.

    Args:
        codes: uint8 of shape (strips, blocks, 64 * bits).
        row_scales: bfloat16 of shape (16 * strips,).
        group_exponents: uint8 of shape (strips, groups, 8).
        out_features: Rows of the matrix.
        in_features: Columns of the matrix.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.

    Raises:
        ValueError: A tensor is not on the CPU or not of the dtype or size that the matrix needs.
    """

    __slots__ = ("_matrix", "addresses", "in_features", "out_features")

    def __init__(
        self,
        codes: Tensor,
        row_scales: Tensor,
        group_exponents: Tensor,
        out_features: int,
        in_features: int,
        bits: int,
        codec: str,
    ) -> None:
        parts = (codes, row_scales, group_exponents)
        _check_parts(parts, out_features, in_features, bits)
        for name, tensor in zip(_PARTS, parts, strict=True):
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}, not on the CPU")
        tensors = [tensor.contiguous() for tensor in parts]
        self.addresses = (codes.data_ptr(), row_scales.data_ptr(), group_exponents.data_ptr())
        self.out_features = out_features
        self.in_features = in_features
        self._matrix = _core.BorrowedMatrix(
            tensors,
            tensors[0].data_ptr(),
            tensors[1].data_ptr(),
            tensors[2].data_ptr(),
            (out_features, in_features),
            bits=bits,
            codec=codec,
        )

    def is_of(self, codes: Tensor, row_scales: Tensor, group_exponents: Tensor) -> bool:
        """Whether it still lies in the memory of these tensors."""
        return self.addresses == (
            codes.data_ptr(),
            row_scales.data_ptr(),
            group_exponents.data_ptr(),
        )

    def decode(self) -> Tensor:
        """The decoded weight: float32 of shape (out_features, in_features)."""
        return torch.from_numpy(self._matrix.decode())

    def linear(self, x: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        """``x @ W.T + bias``; see the module for shapes, dtypes and errors."""
        # A product of one token takes few microseconds: what is asked of tensors here is cheap.
        shape, in_features, out_features = x.shape, self.in_features, self.out_features
        if (
            not x.is_cpu
            or x.dtype not in DTYPES
            or not shape
            or shape[-1] != in_features
            or x.requires_grad
            or (bias is not None and bias.numel() != out_features)
        ):
            _check(x, bias, out_features, in_features)
            if not x.is_cpu:
                raise ValueError(
                    f"x is on {x.device} and the weight on the CPU; move both to the same device"
                )
        out = torch.empty((*shape[:-1], out_features), dtype=x.dtype)
        if x.is_contiguous():
            rows, row_stride = math.prod(shape[:-1]), in_features
        else:
            x = x.reshape(-1, in_features)
            if x.stride(1) != 1:
                x = x.contiguous()
            rows, row_stride = x.shape[0], x.stride(0)
        if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
            bias = bias.float().contiguous()
        self._matrix.linear(
            x.data_ptr(),
            DTYPES[x.dtype],
            rows,
            row_stride,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            precision,
            num_threads(),
        )
        return out


# As everywhere in birkhoff, the variable wins over what is set at run time.
_THREADS = int(os.environ.get("BIRKHOFF_NUM_THREADS") or 0) and _core.get_num_threads()


def num_threads() -> int:
    """How many threads an operator uses: as many as torch."""
    return _THREADS or torch.get_num_threads()


def _check_parts(
    parts: tuple[Tensor, Tensor, Tensor], out_features: int, in_features: int, bits: int
) -> None:
    """Refuses parts that are not those of the matrix, on any device."""
    strips = -(-out_features // 16)
    expected = (
        (torch.uint8, strips * -(-in_features // 32) * bits * 64),
        (torch.bfloat16, strips * 16),
        (torch.uint8, strips * -(-in_features // 128) * 8),
    )
    for name, tensor, (dtype, numel) in zip(_PARTS, parts, expected, strict=True):
        if tensor.dtype != dtype or tensor.numel() != numel:
            raise ValueError(
                f"{name} of a weight of shape ({out_features}, {in_features}) at {bits} bits "
                f"must be {numel} x {dtype}, not {tensor.numel()} x {tensor.dtype}"
            )


def _check(x: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> None:
    """Refuses what the operator cannot take, on any device."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"HyperLinear takes float32, float16 or bfloat16, not {x.dtype}; convert x first"
        )
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape ({out_features}, "
            f"{in_features}): its last dimension must be {in_features}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(
            f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape ({out_features}, "
            f"{in_features}): it must be of shape ({out_features},)"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "HyperLinear is an inference operator and has no gradient; call it under "
            "torch.inference_mode() or torch.no_grad()"
        )


def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    group_exponents: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    codec: str,
    precision: str,
) -> Tensor:
    weight = CodedWeight(codes, row_scales, group_exponents, out_features, in_features, bits, codec)
    return weight.linear(x, bias, precision)


def _linear_cuda(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    group_exponents: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    codec: str,
    precision: str,
) -> Tensor:
    _check(x, bias, out_features, in_features)
    parts = (codes, row_scales, group_exponents)
    _check_parts(parts, out_features, in_features, bits)
    for name, tensor in zip((*_PARTS, "bias"), (*parts, bias), strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device} and {name} of the weight on {tensor.device}; move both to the "
                "same device"
            )
    weight = DeviceWeight.of(parts, (out_features, in_features), bits=bits, codec=codec)
    return weight.linear(x, bias, precision)


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    group_exponents: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    codec: str,
    precision: str,
) -> Tensor:
    _check(x, bias, out_features, in_features)
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("linear", _linear_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("birkhoff::linear", _linear_fake, lib=_library)

linear = cast("Callable[..., Tensor]", torch.ops.birkhoff.linear)
