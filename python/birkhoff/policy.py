"""Which tensor gets how many bits.

``--bits`` is the rate of the bulk: the image encoder's matrices. What is small but sensitive gets 8
bits, which costs little because it is small. The tables below are read from top to bottom and the
last row that matches a tensor's name decides; rules of the user come after them.

The mask decoder, its up-scaling convolutions and the neck decide the masks, so they are protected.
The last up-scaling convolution, 2048 weights, stays in 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

from birkhoff import _core
from birkhoff.checkpoint import Tensor

#: A rate that means: not coded, kept in 16 bit.
SIXTEEN = 16

#: Up to this share of all weights, all convolutions of a SAM together get 8 bits.
CONVOLUTIONS_SHARE = 0.05
#: Up to this share of all weights, the positional tables of a SAM get 8 bits.
POSITIONS_SHARE = 0.01
#: Up to this share of all weights, the whole mask decoder of a SAM gets 8 bits.
DECODER_SHARE = 0.25
#: The smallest matrices of an unknown model, up to this share of all weights, get 8 bits.
SMALLEST_SHARE = 0.04


class Row(NamedTuple):
    """A row of a table: tensors whose name matches ``pattern`` get ``rate``.

    A rate is a number of bits, or ``bits``, what the user asked for, plus a number.
    """

    pattern: str
    rate: str
    #: The names it covers, where that follows from sizes and ``pattern`` only describes them.
    names: frozenset[str] | None = None


BULK = [Row("*", "bits")]

#: What is small in a SAM, by the names of Meta's code and of transformers.
SMALL_PARTS = [
    Row("*pos_embed*", "8"),
    Row("*rel_pos*", "8"),
    Row("*patch_embed*", "8"),
    Row("*neck*", "8"),
    Row("*shared_image_embedding*", "8"),
    Row("*prompt_encoder*", "8"),
    Row("*obj_ptr*", "8"),
    Row("*object_pointer*", "8"),
]

LARGE_POSITIONS = [Row("*pos_embed*", "bits + 2")]

DECODER = [Row("*mask_decoder*", "8")]

#: A decoder beside a light image encoder: the rest of it is part of the bulk.
LARGE_DECODER = [
    Row("*mask_decoder*mlp*", "bits + 1"),
    Row("*mask_decoder*self_attn.[qk]_proj.weight", "bits + 1"),
    # The attention between tokens and image, where the masks are made.
    Row("*mask_decoder*image*.[qk]_proj.weight", "8"),
    Row("*mask_decoder*upscal*", "8"),
]

LAST_UPSCALING = [
    Row("*mask_decoder.output_upscaling.3.weight", "16"),
    Row("*mask_decoder.upscale_conv2.weight", "16"),
]


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches ``pattern`` get ``bits`` bits a weight, or stay in 16 bit."""

    pattern: str
    bits: int
    #: The names it covers, where that follows from sizes and ``pattern`` only describes them.
    names: frozenset[str] | None = None

    def matches(self, name: str) -> bool:
        """Whether the rule covers the tensor of that name."""
        return fnmatchcase(name, self.pattern) if self.names is None else name in self.names


@dataclass(frozen=True)
class Policy:
    """Rules in the order in which they are read; the last one that matches decides."""

    model: str
    codec: str
    rules: tuple[Rule, ...]

    def rule_for(self, name: str) -> Rule:
        """The rule that decides on the tensor of that name."""
        return next(rule for rule in reversed(self.rules) if rule.matches(name))


def choose_policy(
    tensors: Sequence[Tensor], *, bits: int, codec: str, user_rules: Iterable[tuple[str, int]] = ()
) -> Policy:
    """The policy for a model with these tensors.

    Args:
        tensors: All tensors of the checkpoint.
        bits: The rate of the bulk.
        codec: The codec of all coded tensors.
        user_rules: Pairs of a name pattern and its bits, which overrule the table.

    Raises:
        ValueError: The codec has no such rate.
    """
    check_bits(bits, codec)
    floats = [tensor for tensor in tensors if tensor.is_float]
    if any("mask_decoder" in tensor.name for tensor in floats):
        model, table = _segment_anything(floats)
    else:
        model, table = "unknown", BULK + _smallest_matrices(floats)
    rates = _core.rates(codec)
    rules = [Rule(row.pattern, _resolve(row.rate, bits, rates), row.names) for row in table]
    rules += [Rule(pattern, rate) for pattern, rate in user_rules]
    return Policy(model, codec, tuple(rules))


def allocated_policy(
    model: str,
    codec: str,
    bits_of: Mapping[str, int],
    user_rules: Iterable[tuple[str, int]] = (),
) -> Policy:
    """A policy of bits chosen for single tensors; what was not chosen for stays in 16 bit.

    Args:
        model: What the model is called.
        codec: The codec of all coded tensors.
        bits_of: Bits of each tensor by its name.
        user_rules: Pairs of a name pattern and its bits, which overrule the choice.
    """
    rules = [Rule("*", SIXTEEN)]
    for bits in sorted(set(bits_of.values()), reverse=True):
        names = frozenset(name for name, chosen in bits_of.items() if chosen == bits)
        rules.append(Rule(f"{len(names)} tensors by allocation", bits, names))
    rules += [Rule(pattern, rate) for pattern, rate in user_rules]
    return Policy(model, codec, tuple(rules))


def _segment_anything(tensors: Sequence[Tensor]) -> tuple[str, list[Row]]:
    """What a model of the Segment Anything family is called, and its table."""
    total = sum(tensor.elements for tensor in tensors)

    def small(part: Iterable[Tensor], share: float) -> bool:
        return sum(tensor.elements for tensor in part) <= share * total

    def named(text: str) -> list[Tensor]:
        return [tensor for tensor in tensors if text in tensor.name]

    model = "Segment Anything"
    table = list(BULK)
    convolutions = [tensor for tensor in named(".weight") if len(tensor.shape) == 4]
    if small(convolutions, CONVOLUTIONS_SHARE):
        names = frozenset(tensor.name for tensor in convolutions)
        table.append(Row("every convolution", "8", names))
    table += SMALL_PARTS
    if not small(named("pos_embed"), POSITIONS_SHARE):
        table += LARGE_POSITIONS
    if small(named("mask_decoder"), DECODER_SHARE):
        table += DECODER
    else:
        model += ", light image encoder"
        table += LARGE_DECODER
    return model, table + LAST_UPSCALING


def _smallest_matrices(tensors: Sequence[Tensor]) -> list[Row]:
    """A row for the matrices of the smallest sizes; of one size, all of them or none."""
    total = sum(tensor.elements for tensor in tensors)
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
    taken = 0
    names: list[str] = []
    for _, group in groupby(sorted(matrices, key=_elements), key=_elements):
        same = list(group)
        if taken + sum(map(_elements, same)) > SMALLEST_SHARE * total:
            break
        taken += sum(map(_elements, same))
        names += [tensor.name for tensor in same]
    if not taken:
        return []
    pattern = f"the smallest matrices, {100 * taken / total:.1f} % of the weights"
    return [Row(pattern, "8", frozenset(names))]


def _elements(tensor: Tensor) -> int:
    return tensor.elements


def check_bits(bits: int, codec: str) -> None:
    """Raises ValueError if the codec does not exist or lacks the rate."""
    _core.coded_nbytes(0, 0, bits=bits, codec=codec)


def _resolve(rate: str, bits: int, rates: Sequence[int]) -> int:
    """A rate of a table, for a bulk of ``bits`` bits, as the nearest rate up that the codec has."""
    base, _, more = rate.partition(" + ")
    wanted = (bits if base == "bits" else int(base)) + int(more or 0)
    if wanted == SIXTEEN:
        return SIXTEEN
    return min((rate for rate in rates if rate >= wanted), default=max(rates))
