"""One array or tensor at a time: encode it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from birkhoff import _core
from birkhoff.dtypes import FLOATS, NUMPY_DTYPES, TORCH_DTYPES

if TYPE_CHECKING:
    import torch

    from birkhoff._core import HyperMatrix

_FLOATS_OF_NUMPY = {dtype: name for name, dtype in NUMPY_DTYPES.items() if name in FLOATS}


def encode(
    array: NDArray[Any] | torch.Tensor,
    bits: int = 4,
    codec: str = "shift",
    scale: Literal["unbiased", "least-squares"] = "unbiased",
) -> HyperMatrix:
    """Encodes a matrix of out_features x in_features.

    Args:
        array: A 2-D numpy array or CPU torch tensor of float64, float32, float16 or bfloat16, with
            any strides.
        bits: Code bits a weight: 2, 3, 4, 5, 6 or 8 (4, 5, 6 or 8 with the winding codec).
        codec: ``"shift"``, or ``"winding"``, the trajectory of the paper (arXiv 2507.08765).
        scale: How the row scales are refitted after the search: ``"unbiased"`` keeps the size of
            the products with the weights, ``"least-squares"`` makes the squared error smallest.

    Raises:
        TypeError: ``array`` is neither a numpy array nor a torch tensor.
        ValueError: It is no CPU matrix of floats, holds NaN or infinity, or the codec lacks the
            rate.
    """
    data, dtype, shape = _raw_matrix(array)
    matrix, _ = _core.encode(data, dtype, *shape, bits=bits, codec=codec, scale=scale)
    return matrix


def _raw_matrix(
    array: NDArray[Any] | torch.Tensor,
) -> tuple[NDArray[np.uint8], str, tuple[int, int]]:
    """The little-endian bytes of a matrix, row by row, its dtype and its shape."""
    # A tensor is known by its class's module, so that torch is not imported to ask.
    is_tensor = not isinstance(array, np.ndarray) and any(
        cls.__module__ == "torch" and cls.__name__ == "Tensor" for cls in type(array).__mro__
    )
    if not (is_tensor or isinstance(array, np.ndarray)):
        raise TypeError(
            f"encode takes a numpy array or a torch tensor, not {type(array).__name__}; "
            "convert it with numpy.asarray first"
        )
    if array.ndim != 2:
        raise ValueError(
            f"encode takes a matrix of 2 dimensions, not shape {tuple(array.shape)}; "
            "reshape it to (out_features, in_features) first"
        )
    rows, cols = (int(size) for size in array.shape)
    if isinstance(array, np.ndarray):
        dtype = _FLOATS_OF_NUMPY.get(array.dtype.newbyteorder("<"))
        if dtype is None and array.dtype.name == "bfloat16":  # of the ml_dtypes package
            dtype = "BF16"
        if dtype is None:
            raise _not_a_float(str(array.dtype))
        little_endian = array if dtype == "BF16" else array.astype(NUMPY_DTYPES[dtype], copy=False)
        data = np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8)
    else:
        dtype = TORCH_DTYPES.get(str(array.dtype))
        if dtype not in FLOATS:
            raise _not_a_float(str(array.dtype))
        if array.device.type != "cpu":
            raise ValueError(
                f"encode takes tensors on the CPU, not on {array.device}; call .cpu() first"
            )
        data = tensor_bytes(array)
    return data, dtype, (rows, cols)


def _not_a_float(dtype: str) -> ValueError:
    return ValueError(
        f"encode takes float64, float32, float16 or bfloat16, not {dtype}; convert it first"
    )


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a dense CPU tensor in row-major order: a view where it is contiguous."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 0:
        return np.empty(0, dtype=np.uint8)
    view: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return view
