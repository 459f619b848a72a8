"""How finely HyperLinear represents activations, for the whole process."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["highest", "high", "medium"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_precision: Precision = "high"


def set_precision(precision: Precision) -> None:
    """Sets the precision of every HyperLinear that has none of its own.

    Args:
        precision: ``"highest"``: 24-bit fixed point for each token, as accurate as float32.
            ``"high"`` (the default): 16-bit, relative error about 3e-5. ``"medium"``: 8-bit,
            relative error about 1e-2.

    Raises:
        ValueError: There is no such precision.
    """
    global _precision
    _precision = checked(precision)


def get_precision() -> Precision:
    """The precision that :func:`set_precision` has set."""
    return _precision


def checked(precision: str) -> Precision:
    """``precision``, if there is one of that name.

    Raises:
        ValueError: There is not.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f'there is no precision {precision!r}; choose "highest", "high" or "medium"'
        )
    return precision
