"""A linear layer whose weight stays coded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from birkhoff import _core, ops
from birkhoff.arrays import encode
from birkhoff.precision import Precision, checked, get_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self


class CodedParameter(nn.Module):
    """The three parts of a coded matrix, as buffers.

    As a child module named ``weight`` it gives the state dict the names that compressed files use:
    ``weight.codes``, ``weight.row_scales`` and ``weight.group_exponents``. Moving it moves the
    parts; changing its dtype does not touch them.
    """

    codes: Tensor
    row_scales: Tensor
    group_exponents: Tensor

    def __init__(self, matrix: _core.HyperMatrix) -> None:
        super().__init__()
        self.register_buffer("codes", _owned(matrix.codes))
        self.register_buffer("row_scales", _owned(matrix.row_scales).view(torch.bfloat16))
        self.register_buffer("group_exponents", _owned(matrix.group_exponents))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                applied = fn(buffer)
                kept = applied if applied.dtype == buffer.dtype else buffer.to(applied.device)
                self._buffers[name] = kept
        return self


def _owned(array: Any) -> Tensor:
    """A copy of a read-only numpy array."""
    return torch.from_numpy(array.copy())


class HyperLinear(nn.Module):
    """``y = x W^T + b`` with W coded: decoded and multiplied in one operator.

    Takes ``x`` of shape ``(..., in_features)`` in float32, float16 or bfloat16 and gives
    ``(..., out_features)`` in the same dtype, or in autocast's. For inference: it has no gradient.

    Attributes:
        in_features: Size of each input.
        out_features: Size of each output.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
        bias: A parameter of shape ``(out_features,)`` that takes no gradient, or None.
        precision: ``"highest"``, ``"high"``, ``"medium"``, or None for what
            :func:`birkhoff.set_precision` has set.

    Args:
        matrix: The coded weight of out_features x in_features.
        bias: Of shape ``(out_features,)``, or None.
        precision: As the attribute.

    Raises:
        ValueError: The bias has another length, or there is no such precision.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        matrix: _core.HyperMatrix,
        bias: Tensor | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.bits = matrix.bits
        self.codec = matrix.codec
        self.precision = None if precision is None else checked(precision)
        # Not an attribute: `weight` gives the decoded tensor.
        self._modules["weight"] = CodedParameter(matrix)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape "
                f"{matrix.shape}: it must be of shape ({self.out_features},)"
            )
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", parameter)
        self._coded: ops.CodedWeight | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        codec: str = "shift",
        precision: Precision | None = None,
    ) -> Self:
        """Encodes a linear layer on the CPU; its bias is shared, not copied.

        Raises:
            ValueError: The weight is not on the CPU, holds NaN or infinity, or the codec lacks the
                rate.
        """
        layer = cls(encode(linear.weight, bits=bits, codec=codec), linear.bias, precision)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32 of shape (out_features, in_features): made anew each time."""
        return self._coded_weight().decode()

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``.

        Raises:
            ValueError: ``x`` has another last dimension or is on another device than the weight.
            TypeError: ``x`` is not float32, float16 or bfloat16.
            RuntimeError: ``x`` requires a gradient.
        """
        device = "cpu" if x.is_cpu else x.device.type
        if (device == "cpu" or torch.amp.is_autocast_available(device)) and (
            torch.is_autocast_enabled(device)
        ):
            x = x.to(torch.get_autocast_dtype(device))
        precision = self.precision or get_precision()
        bias = self._parameters["bias"]
        if torch.compiler.is_compiling() or not _is_plain(x):
            parts = self._parts()
            shape = (self.out_features, self.in_features)
            return ops.linear(x, *parts, bias, *shape, self.bits, self.codec, precision)
        # The same as the operator, without the way through the dispatcher.
        return self._coded_weight().linear(x, bias, precision)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, codec={self.codec!r}"
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        buffers = self._modules["weight"]._buffers  # type: ignore[union-attr]
        codes, row_scales = buffers["codes"], buffers["row_scales"]
        group_exponents = buffers["group_exponents"]
        assert codes is not None
        assert row_scales is not None
        assert group_exponents is not None
        return codes, row_scales, group_exponents

    def _coded_weight(self) -> ops.CodedWeight:
        parts = self._parts()
        if self._coded is None or not self._coded.is_of(*parts):
            self._coded = ops.CodedWeight(
                *parts, self.out_features, self.in_features, self.bits, self.codec
            )
        return self._coded

    def __getstate__(self) -> dict[str, Any]:
        # What lies in this process's memory stays here.
        return self.__dict__ | {"_coded": None}


def _is_plain(x: Tensor) -> bool:
    """Whether nothing watches over ``x``: no subclass, no mode, no trace, no transform."""
    return (
        type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )
