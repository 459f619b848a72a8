"""How close each coded tensor of a model is to the original's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from birkhoff._core import BirkhoffError

if TYPE_CHECKING:
    from torch import nn


def layer_sqnr(original: nn.Module, compressed: nn.Module) -> dict[str, float]:
    """The SQNR of each coded tensor in dB, in the order of the model; infinite where it is exact.

    Raises:
        BirkhoffError: The models do not have the same tensors.
    """
    from birkhoff.nn.placement import coded_parameters

    originals = original.state_dict()
    ratios = {}
    for name, parameter in coded_parameters(compressed).items():
        weight = originals.get(name)
        if weight is None or tuple(weight.shape) != tuple(parameter.shape):
            problem = "is not in it" if weight is None else f"has shape {tuple(weight.shape)} there"
            raise BirkhoffError(
                f"the compressed model was not made from this original: its tensor {name!r} of "
                f"shape {tuple(parameter.shape)} {problem}"
            )
        exact = weight.double()
        noise = float((exact - parameter.decode().double()).square().sum())
        signal = float(exact.square().sum())
        ratios[name] = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return ratios
