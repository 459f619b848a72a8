"""What the layers on coded weights have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from birkhoff import _core, ops
from birkhoff.cuda import DeviceWeight
from birkhoff.precision import Precision, checked, get_precision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self


#: The buffers of a coded parameter.
PARTS = ("codes", "row_scales", "group_exponents")


class CodedParameter(nn.Module):
    """A coded tensor: the three parts of its matrix, as buffers.

    In the state dict of a model they have the names that compressed files use, those of the tensor
    with ``.codes``, ``.row_scales`` and ``.group_exponents`` behind. Moving it moves the parts;
    changing its dtype changes that of the decoded tensor, not the parts.

    Attributes:
        shape: Shape of the decoded tensor.
        matrix_shape: Rows and columns of the coded matrix, which holds it in row-major order.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
        dtype: Dtype of the decoded tensor.

    Args:
        codes: uint8 of shape (strips, blocks, 64 * bits).
        row_scales: bfloat16 of shape (16 * strips,).
        group_exponents: uint8 of shape (strips, groups, 8).
        matrix_shape: As the attribute.
        bits: As the attribute.
        codec: As the attribute.
        shape: As the attribute; ``matrix_shape`` if None.
        dtype: As the attribute.
    """

    codes: Tensor
    row_scales: Tensor
    group_exponents: Tensor

    def __init__(
        self,
        codes: Tensor,
        row_scales: Tensor,
        group_exponents: Tensor,
        matrix_shape: tuple[int, int],
        *,
        bits: int,
        codec: str,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape = matrix_shape if shape is None else tuple(shape)
        self.matrix_shape = matrix_shape
        assert math.prod(self.shape) == math.prod(matrix_shape)
        self.bits = bits
        self.codec = codec
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("row_scales", row_scales)
        self.register_buffer("group_exponents", group_exponents)
        self._prepared: ops.CodedWeight | None = None

    @classmethod
    def from_matrix(
        cls,
        matrix: _core.HyperMatrix,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A copy of a coded matrix."""
        return cls(
            torch.from_numpy(matrix.codes.copy()),
            torch.from_numpy(matrix.row_scales.copy()).view(torch.bfloat16),
            torch.from_numpy(matrix.group_exponents.copy()),
            matrix.shape,
            bits=matrix.bits,
            codec=matrix.codec,
            shape=shape,
            dtype=dtype,
        )

    @classmethod
    def empty(
        cls,
        matrix_shape: tuple[int, int],
        *,
        bits: int,
        codec: str,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Self:
        """One whose parts are still to be loaded."""
        rows, cols = matrix_shape
        strips, blocks, groups = -(-rows // 16), -(-cols // 32), -(-cols // 128)
        return cls(
            torch.empty(strips, blocks, bits * 64, dtype=torch.uint8, device=device),
            torch.empty(strips * 16, dtype=torch.bfloat16, device=device),
            torch.empty(strips, groups, 8, dtype=torch.uint8, device=device),
            matrix_shape,
            bits=bits,
            codec=codec,
            shape=shape,
            dtype=dtype,
        )

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, row scales and group exponents."""
        buffers = self._buffers
        codes, row_scales = buffers["codes"], buffers["row_scales"]
        group_exponents = buffers["group_exponents"]
        assert codes is not None
        assert row_scales is not None
        assert group_exponents is not None
        return codes, row_scales, group_exponents

    def prepared(self) -> ops.CodedWeight:
        """The matrix, ready to be multiplied with. It is made again where the parts were replaced.

        Raises:
            ValueError: A part is not on the CPU.
        """
        parts = self.parts()
        if self._prepared is None or not self._prepared.is_of(*parts):
            rows, cols = self.matrix_shape
            self._prepared = ops.CodedWeight(*parts, rows, cols, self.bits, self.codec)
        return self._prepared

    def on_device(self) -> DeviceWeight:
        """The matrix where it is, on a CUDA device: to be decoded or multiplied with there."""
        return DeviceWeight.of(self.parts(), self.matrix_shape, bits=self.bits, codec=self.codec)

    def decode(self) -> Tensor:
        """The decoded tensor, made anew where the parts are."""
        if self.codes.is_cuda:
            return self.on_device().decode(self.dtype).reshape(self.shape)
        return self.prepared().decode().reshape(self.shape).to(self.dtype)

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"{self.shape}, bits={self.bits}, codec={self.codec!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What a cast does to the weights, it does to this one.
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                applied = fn(buffer)
                kept = applied if applied.dtype == buffer.dtype else buffer.to(applied.device)
                self._buffers[name] = kept
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What lies in this process's memory stays here.
        return self.__dict__ | {"_prepared": None}


class CodedLayer(nn.Module):
    """A layer that multiplies with a coded weight. For inference: it has no gradient.

    Attributes:
        coded_weight: The weight as it is kept.
        bias: A parameter of one value for each row of the weight's matrix that takes no gradient,
            or None.
        precision: ``"highest"``, ``"high"``, ``"medium"``, or None for what
            :func:`birkhoff.set_precision` has set.

    Raises:
        ValueError: The bias has another length, or there is no such precision.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: CodedParameter, bias: Tensor | None, precision: Precision | None
    ) -> None:
        super().__init__()
        self.precision = None if precision is None else checked(precision)
        # Under another name than in the state dict: `weight` is the decoded tensor, and torch finds
        # buffers by the names of attributes.
        self.coded_weight = weight
        self._register_state_dict_hook(_to_file_names)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _from_file_names, with_module=True
        )
        self.register_load_state_dict_post_hook(_report_file_names)  # type: ignore[no-untyped-call]
        rows = weight.matrix_shape[0]
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(
                f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape "
                f"{weight.shape}: it must be of shape ({rows},)"
            )
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", parameter)

    @property
    def weight(self) -> Tensor:
        """The decoded weight: made anew each time."""
        return self.coded_weight.decode()

    @property
    def bits(self) -> int:
        """Code bits a weight."""
        return self.coded_weight.bits

    @property
    def codec(self) -> str:
        """``"shift"`` or ``"winding"``."""
        return self.coded_weight.codec

    def _multiply(self, x: Tensor) -> Tensor:
        """``x W^T + b``, with W the matrix of the weight."""
        device = "cpu" if x.is_cpu else x.device.type
        if (device == "cpu" or torch.amp.is_autocast_available(device)) and (
            torch.is_autocast_enabled(device)
        ):
            x = x.to(torch.get_autocast_dtype(device))
        precision = self.precision or get_precision()
        weight: CodedParameter = self._modules["coded_weight"]  # type: ignore[assignment]
        bias = self._parameters["bias"]
        if torch.compiler.is_compiling() or not _is_plain(x) or x.is_cuda:
            settings = (*weight.matrix_shape, weight.bits, weight.codec, precision)
            return ops.linear(x, *weight.parts(), bias, *settings)
        # The same as the operator, without the way through the dispatcher.
        return weight.prepared().linear(x, bias, precision)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.coded_weight
        if weight.codes.is_cuda and type(weight.codes) is Tensor:
            # Kernels are compiled here, not in the first call: that may be the capture of a graph.
            precision = self.precision or get_precision()
            weight.on_device().prepare(weight.dtype, precision)
        return self


def _to_file_names(
    _layer: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """Names the parts of the weight in a state dict as files do."""
    for part in PARTS:
        state_dict[f"{prefix}weight.{part}"] = state_dict.pop(f"{prefix}coded_weight.{part}")


def _from_file_names(
    _layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_others: Any
) -> None:
    """Names the parts of the weight in a state dict as the module does."""
    for part in PARTS:
        if f"{prefix}weight.{part}" in state_dict:
            state_dict[f"{prefix}coded_weight.{part}"] = state_dict.pop(f"{prefix}weight.{part}")


def _report_file_names(_layer: nn.Module, incompatible_keys: Any) -> None:
    """Names the parts that a state dict lacks as it would have named them."""
    missing = incompatible_keys.missing_keys
    for i, key in enumerate(missing):
        path, _, part = key.rpartition(".")
        if part in PARTS and path.endswith("coded_weight"):
            missing[i] = f"{path.removesuffix('coded_weight')}weight.{part}"


def _is_plain(x: Tensor) -> bool:
    """Whether nothing watches over ``x``: no subclass, no mode, no trace, no transform."""
    return (
        type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )
