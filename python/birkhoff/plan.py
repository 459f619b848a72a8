"""How each tensor of a checkpoint will lie in the compressed file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from birkhoff import _core
from birkhoff.checkpoint import Tensor
from birkhoff.dtypes import FLOATS, NUMPY_DTYPES
from birkhoff.policy import SIXTEEN, Policy, Rule

#: A matrix is coded if that takes at most this share of its bytes in 16 bit.
CODED_SHARE = 0.75
#: A small float tensor is rounded to float16 if that keeps at least this SQNR, in dB.
FLOAT16_SQNR = 60.0
#: Elements that are looked at in one go.
CHUNK = 1 << 20


@dataclass(frozen=True)
class Coded:
    """A tensor that is encoded, as a matrix of rows x cols."""

    tensor: Tensor
    rows: int
    cols: int
    bits: int


@dataclass(frozen=True)
class Stored:
    """A tensor that is kept as it is, or rounded to another float dtype."""

    tensor: Tensor
    dtype: str


@dataclass(frozen=True)
class Tied:
    """A tensor that shares the data of an earlier one."""

    tensor: Tensor
    to: str


Item = Coded | Stored | Tied


def make_plan(
    tensors: Sequence[Tensor],
    policy: Policy,
    *,
    user_patterns: Iterable[str] = (),
    skip: Sequence[str] = (),
) -> list[Item]:
    """Decides for every tensor whether and how it is encoded.

    Args:
        tensors: All tensors of the checkpoint.
        policy: Which tensor gets how many bits.
        user_patterns: Name patterns of rules that the user gave: each must decide something.
        skip: Name patterns of tensors to keep exactly as they are.

    Raises:
        ValueError: A pattern matches no tensor that it could apply to.
    """
    for pattern in skip:
        if not any(matches_any(tensor.name, [pattern]) for tensor in tensors):
            raise ValueError(f"--skip {pattern}: no tensor has such a name; {_list_names()}")
    plan = [_plan_tensor(tensor, policy, skip) for tensor in tensors]
    for pattern in user_patterns:
        matching = [item for item in plan if matches_any(item.tensor.name, [pattern])]
        if not matching:
            raise ValueError(f"--rule {pattern}: no tensor has such a name; {_list_names()}")
        if not any(could_be_coded(item.tensor) for item in matching):
            raise ValueError(
                f"--rule {pattern}: it matches only tensors that are not encoded, such as "
                f"{matching[0].tensor.name!r}; a rule is for float tensors of 2 or more dimensions"
            )
    return plan


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _list_names() -> str:
    return "`birkhoff inspect` lists the names of a safetensors file"


def could_be_coded(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind that is coded, if that pays."""
    return tensor.is_float and len(tensor.shape) >= 2 and tensor.elements > 0


def rules_in_use(policy: Policy, plan: Sequence[Item]) -> list[Rule]:
    """The rules that decided on a tensor that is coded, or would be but for its rule."""
    deciding = [
        (item, policy.rule_for(item.tensor.name)) for item in plan if could_be_coded(item.tensor)
    ]
    used = {rule for item, rule in deciding if isinstance(item, Coded) or rule.bits == SIXTEEN}
    return [rule for rule in policy.rules if rule in used]


def _plan_tensor(tensor: Tensor, policy: Policy, skip: Sequence[str]) -> Item:
    skipped = matches_any(tensor.name, skip)
    if tensor.tied_to is not None and skipped == matches_any(tensor.tied_to, skip):
        return Tied(tensor, tensor.tied_to)
    if skipped or not tensor.is_float:
        return Stored(tensor, tensor.dtype)
    if could_be_coded(tensor):
        bits = policy.rule_for(tensor.name).bits
        if bits < SIXTEEN:
            nbytes, rows, cols = best_matrix_view(tensor.shape, bits, policy.codec)
            if nbytes <= CODED_SHARE * 2 * tensor.elements:
                return Coded(tensor, rows, cols, bits)
    return plan_stored(tensor)


def plan_stored(tensor: Tensor) -> Stored:
    """How a tensor that is not encoded, nor to be kept exactly, is stored."""
    rounded = tensor.is_float and _float16_keeps(tensor)
    return Stored(tensor, "F16" if rounded else tensor.dtype)


def best_matrix_view(shape: Sequence[int], bits: int, codec: str) -> tuple[int, int, int]:
    """Bytes, rows and cols of the smaller matrix of a tensor of 2 or more dimensions.

    The matrix is (first dimension, all others) or (all but the last, last).
    """
    views = [(shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1])]
    sizes = [
        (_core.coded_nbytes(rows, cols, bits=bits, codec=codec), rows, cols) for rows, cols in views
    ]
    return min(sizes, key=lambda size: size[0])


def entry_of(item: Item, codec: str) -> tuple[Any, ...]:
    """The item as the writer takes it."""
    tensor = item.tensor
    what = (tensor.name, tensor.dtype, tensor.shape)
    match item:
        case Coded(_, rows, cols, bits):
            return ("coded", *what, rows, cols, bits, codec)
        case Stored(_, dtype):
            return ("stored", *what, dtype)
        case _:
            return ("tied", *what, item.to)


def _float16_keeps(tensor: Tensor) -> bool:
    """Whether float16 keeps every element finite and the tensor's SQNR high."""
    if FLOATS[tensor.dtype] <= 2:
        return False
    values = tensor.read().view(NUMPY_DTYPES[tensor.dtype])
    signal = noise = 0.0
    for start in range(0, values.size, CHUNK):
        original = values[start : start + CHUNK].astype(np.float64)
        if not np.all(np.abs(original) <= np.finfo(np.float16).max):  # NaN compares as false
            return False
        rounded = original.astype(np.float16).astype(np.float64)
        signal += float(np.sum(original**2))
        noise += float(np.sum((original - rounded) ** 2))
    return noise <= signal * 10 ** (-FLOAT16_SQNR / 10)
