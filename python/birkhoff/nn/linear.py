"""A linear layer whose weight stays coded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from birkhoff import _core
from birkhoff.arrays import encode
from birkhoff.nn.coded import CodedLayer, CodedParameter
from birkhoff.precision import Precision

if TYPE_CHECKING:
    from typing_extensions import Self


class HyperLinear(CodedLayer):
    """``y = x W^T + b`` with W coded: decoded and multiplied in one operator.

    Takes ``x`` of shape ``(..., in_features)`` in float32, float16 or bfloat16 and gives
    ``(..., out_features)`` in the same dtype, or in autocast's. For inference: it has no gradient.

    Attributes:
        in_features: Size of each input.
        out_features: Size of each output.
        weight: The decoded weight of shape ``(out_features, in_features)``, made anew each time.
        bias: A parameter of shape ``(out_features,)`` that takes no gradient, or None.
        bits: Code bits a weight.
        codec: ``"shift"`` or ``"winding"``.
        precision: ``"highest"``, ``"high"``, ``"medium"``, or None for what
            :func:`birkhoff.set_precision` has set.

    Args:
        weight: The coded weight of out_features x in_features; a matrix is copied.
        bias: Of shape ``(out_features,)``, or None.
        precision: As the attribute.

    Raises:
        ValueError: The bias has another length, or there is no such precision.
    """

    def __init__(
        self,
        weight: _core.HyperMatrix | CodedParameter,
        bias: Tensor | None = None,
        precision: Precision | None = None,
    ) -> None:
        if isinstance(weight, _core.HyperMatrix):
            weight = CodedParameter.from_matrix(weight)
        super().__init__(weight, bias, precision)
        self.out_features, self.in_features = weight.matrix_shape

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
        matrix = encode(linear.weight, bits=bits, codec=codec)
        weight = CodedParameter.from_matrix(matrix, dtype=linear.weight.dtype)
        return cls(weight, linear.bias, precision).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``.

        Raises:
            ValueError: ``x`` has another last dimension or is on another device than the weight.
            TypeError: ``x`` is not float32, float16 or bfloat16.
            RuntimeError: ``x`` requires a gradient.
        """
        return self._multiply(x)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, codec={self.codec!r}"
        )
