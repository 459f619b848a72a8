"""Convolutions that are a product of matrices, with the weight coded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from birkhoff.arrays import encode
from birkhoff.nn.coded import CodedLayer, CodedParameter
from birkhoff.precision import Precision

if TYPE_CHECKING:
    from typing_extensions import Self


class HyperConv2d(CodedLayer):
    """A 2-D convolution whose windows do not overlap, with the weight coded.

    That is a kernel of 1x1 with any stride, or a kernel as large as the stride (a patch embedding),
    without padding and in one group: each window is a token of ``HyperLinear``.

    Takes ``x`` of shape ``(N, in_channels, H, W)`` or ``(in_channels, H, W)`` in float32, float16
    or bfloat16 and gives what ``nn.Conv2d`` gives, in the same dtype and memory format. For
    inference: it has no gradient.

    Attributes:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: As the kernel, or anything if that is 1x1.
        padding: (0, 0).
        dilation: (1, 1).
        groups: 1.
        weight: The decoded weight of shape ``(out_channels, in_channels, *kernel_size)``, made anew
            each time.
        bias: A parameter of shape ``(out_channels,)`` that takes no gradient, or None.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
        precision: ``"highest"``, ``"high"``, ``"medium"``, or None for what
            :func:`birkhoff.set_precision` has set.

    Args:
        weight: The coded weight of shape ``(out_channels, in_channels, *kernel_size)``, as a matrix
            of out_channels rows.
        bias: Of shape ``(out_channels,)``, or None.
        stride: As the attribute.
        precision: As the attribute.

    Raises:
        ValueError: The weight or the bias has another shape, windows of the stride overlap or leave
            gaps, or there is no such precision.
    """

    padding = (0, 0)
    dilation = (1, 1)
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self,
        weight: CodedParameter,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        precision: Precision | None = None,
    ) -> None:
        if len(weight.shape) != 4 or weight.matrix_shape[0] != weight.shape[0]:
            raise ValueError(
                f"a weight of shape {weight.shape}, coded as a matrix of {weight.matrix_shape}, is "
                "no weight of a 2-D convolution with a row for each output channel"
            )
        super().__init__(weight, bias, precision)
        self.out_channels, self.in_channels, height, width = weight.shape
        self.kernel_size = (height, width)
        self.stride = stride
        if self.kernel_size not in ((1, 1), stride):
            raise ValueError(
                f"HyperConv2d takes a kernel of 1x1, or one as large as the stride, not a kernel "
                f"of {self.kernel_size} with a stride of {stride}; use nn.Conv2d"
            )

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a convolution is one that this layer can do."""
        return (
            conv.groups == 1
            and conv.padding in ((0, 0), "valid")
            and (
                conv.kernel_size == (1, 1)
                or (conv.kernel_size == conv.stride and conv.dilation == (1, 1))
            )
        )

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        bits: int = 4,
        codec: str = "shift",
        precision: Precision | None = None,
    ) -> Self:
        """Encodes a convolution on the CPU; its bias is shared, not copied.

        Raises:
            ValueError: Its windows overlap, the weight is not on the CPU, holds NaN or infinity, or
                the codec lacks the rate.
        """
        if not cls.fits(conv):
            raise ValueError(
                f"HyperConv2d cannot do {conv}: it takes a kernel of 1x1, or one as large as the "
                "stride, without padding, dilation and groups"
            )
        matrix = encode(conv.weight.flatten(1), bits=bits, codec=codec)
        weight = CodedParameter.from_matrix(matrix, conv.weight.shape, conv.weight.dtype)
        stride = (conv.stride[0], conv.stride[1])
        return cls(weight, conv.bias, stride, precision).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``x``.

        Raises:
            ValueError: ``x`` has another shape or is on another device than the weight.
            TypeError: ``x`` is not float32, float16 or bfloat16.
            RuntimeError: ``x`` requires a gradient.
        """
        kernel_height, kernel_width = self.kernel_size
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a weight of shape "
                f"{self.coded_weight.shape}: it must be of shape (N, {self.in_channels}, H, W) or "
                f"({self.in_channels}, H, W)"
            )
        if x.shape[-2] < kernel_height or x.shape[-1] < kernel_width:
            raise ValueError(
                f"x of shape {tuple(x.shape)} is smaller than the kernel of {self.kernel_size}"
            )
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if self.kernel_size == (1, 1):
            tokens = x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)
        else:
            height, width = x.shape[-2] // kernel_height, x.shape[-1] // kernel_width
            x = x[..., : height * kernel_height, : width * kernel_width]
            # (..., channel, patch row, row, patch column, column)
            patches = x.reshape(*x.shape[:-2], height, kernel_height, width, kernel_width)
            tokens = patches.movedim((-4, -2), (-5, -4)).flatten(-3)
        y = self._multiply(tokens).movedim(-1, -3)
        # Code that calls `view` on the output relies on its memory format.
        return y if channels_last else y.contiguous()

    def extra_repr(self) -> str:
        """What ``repr`` shows of the layer."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, bias={self.bias is not None}, bits={self.bits}, "
            f"codec={self.codec!r}"
        )
