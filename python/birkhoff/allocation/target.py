"""Bits for each tensor that reach a given quality or size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from birkhoff import _core
from birkhoff.allocation.choices import (
    Choice,
    cheapest,
    choices_of,
    fewest_bits,
)
from birkhoff.checkpoint import Tensor
from birkhoff.dtypes import FLOATS, NUMPY_DTYPES
from birkhoff.plan import (
    Item,
    Tied,
    could_be_coded,
    entry_of,
    make_plan,
    matches_any,
    rules_in_use,
)
from birkhoff.policy import allocated_policy

#: How often the allocation is corrected for the length of the header that it leads to.
ROUNDS = 4

#: Measures what the error of tensors does to the outputs of their model, by the tensors' names.
Measure = Callable[[Sequence[str]], Mapping[str, float]]
#: Called after every tensor with its name, how many are done, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """What the bits of each tensor are chosen for: one of the first two, or the size of a policy.

    Without an SQNR, the error of the whole model is made small for the size of its file. The
    error is the sum of the relative errors of the tensors, each weighed by its effect.
    """

    #: SQNR in dB that every coded tensor must reach.
    sqnr: float | None = None
    #: How many times smaller than the original tensors the file is to be.
    ratio: float | None = None
    #: What measures the effects; if None, all tensors have the same.
    measure: Measure | None = None

    def to_json(self) -> dict[str, Any]:
        """What the compressed file says about it."""
        if self.sqnr is not None:
            return {"sqnr_db": self.sqnr}
        errors = "all tensors alike" if self.measure is None else "by effect on the outputs"
        return {"ratio": self.ratio, "errors": errors}


def check_target(
    bits: int | None, target_sqnr: float | None, target_ratio: float | None, auto: object
) -> bool:
    """Whether bits are to be chosen for each tensor.

    Raises:
        ValueError: The arguments exclude each other, or are out of range.
    """
    if target_sqnr is not None and (target_ratio is not None or auto):
        raise ValueError("--target-sqnr goes without --target-ratio and --auto; choose one")
    if bits is not None and (target_sqnr is not None or target_ratio is not None):
        raise ValueError("--bits goes without --target-sqnr and --target-ratio; choose one")
    if target_sqnr is not None and not 0 < target_sqnr <= 200:
        raise ValueError(f"--target-sqnr {target_sqnr:g}: an SQNR is between 0 and 200 dB")
    if target_ratio is not None and not 1 <= target_ratio <= 1000:
        raise ValueError(f"--target-ratio {target_ratio:g}: a ratio is between 1 and 1000")
    return target_sqnr is not None or target_ratio is not None or bool(auto)


def allocate(
    target: Target,
    plan: Sequence[Item],
    settings: Mapping[str, Any],
    *,
    user_rules: Sequence[tuple[str, int]],
    skip: Sequence[str],
    progress: Progress | None = None,
) -> tuple[list[Item], dict[str, Any]]:
    """Replaces the bits of a plan by those that a target asks for.

    Args:
        target: The target.
        plan: The plan of the policy. Its size is the budget if the target names none.
        settings: The settings that led to it.
        user_rules: Name patterns and bits that the user gave: those tensors are left alone.
        skip: Name patterns of tensors that are left alone.
        progress: Called after every tensor that was measured.

    Raises:
        ValueError: The target cannot be reached, or weights are not finite.
    """
    fixed = [*skip, *(pattern for pattern, _ in user_rules)]
    free = [
        item.tensor
        for item in plan
        if could_be_coded(item.tensor)
        and not isinstance(item, Tied)
        and not matches_any(item.tensor.name, fixed)
    ]
    codec = settings["codec"]

    def planned(bits_of: Mapping[str, int]) -> tuple[list[Item], dict[str, Any]]:
        policy = allocated_policy(settings["model"], codec, bits_of, user_rules)
        planned = make_plan([item.tensor for item in plan], policy, skip=skip)
        rules = [[rule.pattern, rule.bits] for rule in rules_in_use(policy, planned)]
        own = target.sqnr is not None or target.ratio is not None
        bits = None if own else settings["bits"]
        return planned, {**settings, "bits": bits, "rules": rules, "allocation": target.to_json()}

    if target.sqnr is not None:
        bits_of = {}
        for done, tensor in enumerate(free, start=1):
            bits_of[tensor.name] = fewest_bits(tensor, codec, target.sqnr)
            if progress is not None:
                progress(tensor.name, done, len(free))
        return planned(bits_of)

    original_nbytes = sum(_original_nbytes(item) for item in plan)
    if target.ratio is None:
        limit = _file_nbytes(plan, settings)
    else:
        limit = math.floor(original_nbytes / target.ratio)
    choices = _weighed(free, codec, target.measure, progress)
    lowest = {name: options[0] for name, options in choices.items()}
    smallest, others = _sizes(*planned(_bits(lowest)), lowest)
    if target.ratio is None:
        # The policy may have the lowest rates already, and a shorter header.
        limit = max(limit, smallest)
    if smallest > limit:
        raise ValueError(
            f"the file cannot be {original_nbytes / limit:.4g} times smaller: at the lowest rates "
            f"it is {original_nbytes / smallest:.4g} times; ask for less, or drop rules and skips"
        )
    best = planned(_bits(lowest))
    least = sum(choice.nbytes for choice in lowest.values())
    # What is beside the tensors, such as the header, depends a little on the choice.
    for _ in range(ROUNDS):
        chosen = cheapest(choices, max(limit - others, least))
        result = planned(_bits(chosen))
        nbytes, others = _sizes(*result, chosen)
        if nbytes <= limit:
            best = result
    return best


def _bits(chosen: Mapping[str, Choice]) -> dict[str, int]:
    return {name: choice.bits for name, choice in chosen.items()}


def _sizes(
    plan: Sequence[Item], settings: Mapping[str, Any], chosen: Mapping[str, Choice]
) -> tuple[int, int]:
    """Bytes of the file, and those of it beside the tensors that were chosen for."""
    nbytes = _file_nbytes(plan, settings)
    return nbytes, nbytes - sum(choice.nbytes for choice in chosen.values())


def _weighed(
    tensors: Sequence[Tensor], codec: str, measure: Measure | None, progress: Progress | None
) -> dict[str, list[Choice]]:
    """The choices of each tensor, their errors weighed by its effect."""
    effects: Mapping[str, float] = {}
    if measure is not None:
        effects = measure([tensor.name for tensor in tensors])
    usual = median(effects.values()) if effects else 1.0
    return {
        tensor.name: [
            replace(choice, noise=choice.noise * effects.get(tensor.name, usual))
            for choice in choices_of(tensor, codec)
        ]
        for tensor in tensors
    }


def _file_nbytes(plan: Sequence[Item], settings: Mapping[str, Any]) -> int:
    entries: Any = [entry_of(item, settings["codec"]) for item in plan]
    return _core.planned_nbytes(entries, settings=json.dumps(settings))


def _original_nbytes(item: Item) -> int:
    if isinstance(item, Tied):
        return 0
    tensor = item.tensor
    if tensor.dtype in FLOATS:
        return tensor.elements * FLOATS[tensor.dtype]
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    return tensor.elements * (dtype.itemsize if dtype is not None else 1)
