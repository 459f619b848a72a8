"""The rates that a tensor can take: what each costs in bytes, and in error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from birkhoff import _core
from birkhoff.checkpoint import Tensor
from birkhoff.dtypes import FLOATS
from birkhoff.plan import CODED_SHARE, Stored, best_matrix_view, plan_stored
from birkhoff.policy import SIXTEEN

#: Weights whose coding tells the error of a whole tensor.
SAMPLE = 1 << 16
#: Rows of a strip, which are coded together.
STRIP = 16


@dataclass(frozen=True)
class Choice:
    """A tensor at one rate."""

    #: Code bits a weight, 16 for not coded.
    bits: int
    nbytes: int
    #: Energy of the error as a share of the tensor's own.
    noise: float


def choices_of(tensor: Tensor, codec: str) -> list[Choice]:
    """The rates at which a tensor can be kept, by rising size.

    Their errors are those of a sample of its rows.

    Raises:
        ValueError: Weights of the sample are not finite; the tensor is named.
    """
    choices = []
    data = tensor.read()
    for bits in _core.rates(codec):
        nbytes, rows, cols = best_matrix_view(tensor.shape, bits, codec)
        if nbytes <= CODED_SHARE * 2 * tensor.elements:
            sample, sampled_rows = _sample_rows(data, rows, cols)
            distortion = encode(tensor, sample, sampled_rows, cols, bits, codec)
            choices.append(Choice(bits, nbytes, relative_noise(distortion)))
    choices.append(Choice(SIXTEEN, stored_nbytes(plan_stored(tensor)), 0.0))
    return choices


def encode(
    tensor: Tensor, data: NDArray[np.uint8], rows: int, cols: int, bits: int, codec: str
) -> _core.Distortion:
    """What coding rows of a tensor costs.

    Raises:
        ValueError: Weights are not finite; the tensor is named.
    """
    try:
        _, distortion = _core.encode(data, tensor.dtype, rows, cols, bits=bits, codec=codec)
    except ValueError as error:
        raise ValueError(f"tensor {tensor.name!r}: {error}") from error
    return distortion


def fewest_bits(tensor: Tensor, codec: str, sqnr: float) -> int:
    """The fewest bits at which a tensor as a whole reaches an SQNR in dB; 16 if none does."""
    data = tensor.read()
    wanted = 10 ** (-sqnr / 10)
    for choice in choices_of(tensor, codec):
        # The sample tells which rates are worth a try; 0.5 dB is more than it can be wrong by.
        if choice.bits == SIXTEEN or choice.noise > wanted * 10**0.05:
            continue
        _, rows, cols = best_matrix_view(tensor.shape, choice.bits, codec)
        if encode(tensor, data, rows, cols, choice.bits, codec).sqnr >= sqnr:
            return choice.bits
    return SIXTEEN


def stored_nbytes(item: Stored) -> int:
    """Bytes of a tensor that is not coded."""
    return item.tensor.elements * FLOATS[item.dtype]


def relative_noise(distortion: _core.Distortion) -> float:
    """Energy of the error as a share of that of the weights."""
    return distortion.noise / distortion.signal if distortion.signal else 0.0


def cheapest(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """For each tensor a choice, so that the sum of the errors is small and the bytes fit.

    A Lagrangian allocation: from the smallest choices on, the step that takes off the most error
    for its bytes comes first, among those on the lower convex hull of each tensor's choices. What
    the last steps leave of the budget goes to the next ones that still fit.

    Args:
        choices: The choices of each tensor, by its name; ``noise`` is what is to be small.
        budget: Bytes of all of them together.

    Raises:
        ValueError: Even the smallest choices do not fit.
    """
    hulls = {name: _lower_hull(options) for name, options in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.nbytes for choice in chosen.values())
    if left < 0:
        raise ValueError("the budget is too small for the lowest rates")
    steps = [
        (_gain(before, after), name, after)
        for name, hull in hulls.items()
        for before, after in pairwise(hull)
    ]
    # On a hull the gains of one tensor fall, so its steps keep their order.
    steps.sort(key=lambda step: -step[0])
    stopped = set()
    for _, name, after in steps:
        more = after.nbytes - chosen[name].nbytes
        if name in stopped or more > left:
            stopped.add(name)
            continue
        chosen[name] = after
        left -= more
    return chosen


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that are the best for some price of a byte, by rising size."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.noise)):
        if hull and choice.noise >= hull[-1].noise:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        if hull and choice.nbytes == hull[-1].nbytes:
            hull.pop()
        hull.append(choice)
    return hull


def _gain(before: Choice, after: Choice) -> float:
    """Error taken off by a byte."""
    more = after.nbytes - before.nbytes
    return (before.noise - after.noise) / more if more else np.inf


def _sample_rows(data: NDArray[np.uint8], rows: int, cols: int) -> tuple[NDArray[np.uint8], int]:
    """Strips of rows, spread over a matrix, and how many rows they are."""
    strips = max(1, SAMPLE // (STRIP * cols))
    if rows <= strips * STRIP:
        return data, rows
    matrix = data.reshape(rows, -1)
    starts = np.linspace(0, rows - STRIP, strips).astype(np.int64)
    sample = np.concatenate([matrix[start : start + STRIP].ravel() for start in starts])
    return sample, strips * STRIP
