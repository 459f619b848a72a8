"""Which tensor gets how many bits.

``--bits`` is the rate of the bulk: the image encoder's matrices. What is small but sensitive gets 8
bits, which costs little because it is small. The tables below are read from top to bottom and the
last row that matches a tensor's name decides; rules of the user come after them.

The mask decoder, its up-scaling convolutions and the neck decide the masks, so they are protected.
The last up-scaling convolution, 2048 weights, stays in 16 bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from birkhoff import _core
from birkhoff.checkpoint import Tensor

#: A rate that means: not coded, kept in 16 bit.
SIXTEEN = 16

#: Up to this share of all weights, all convolutions of a SAM together get 8 bits.
SMALL_CONVOLUTIONS = 0.05
#: Up to this share of all weights, positional tables get 8 bits.
SMALL_POSITIONS = 0.01
#: From this share of all weights on, only the sensitive part of a mask decoder gets 8 bits.
LARGE_DECODER = 0.25
#: The smallest matrices of an unknown model, up to this share of all weights, get 8 bits.
SMALL_MATRICES = 0.04

_BULK: list[tuple[str, str]] = [("*", "bits")]

_CONVOLUTIONS: list[tuple[str, str]] = [("every convolution", "8")]

_LARGE_POSITIONS: list[tuple[str, str]] = [("*pos_embed*", "bits + 2")]

#: What is small, by the names of Meta's code and of transformers.
_SAM: list[tuple[str, str]] = [
    ("*pos_embed*", "8"),
    ("*rel_pos*", "8"),
    ("*patch_embed*", "8"),
    ("*neck*", "8"),
    ("*shared_image_embedding*", "8"),
    ("*prompt_encoder*", "8"),
    ("*obj_ptr*", "8"),
    ("*object_pointer*", "8"),
]

_DECODER: list[tuple[str, str]] = [
    ("*mask_decoder*", "8"),
]

_LARGE_DECODER: list[tuple[str, str]] = [
    ("*mask_decoder*mlp*", "bits + 1"),
    ("*mask_decoder*q_proj.weight", "8"),
    ("*mask_decoder*k_proj.weight", "8"),
    ("*mask_decoder*upscal*", "8"),
]

_LAST_UPSCALING: list[tuple[str, str]] = [
    ("*mask_decoder.output_upscaling.3.weight", "16"),
    ("*mask_decoder.upscale_conv2.weight", "16"),
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
    rates = _core.rates(codec)
    check_bits(bits, codec)
    weights = {tensor.name: tensor.elements for tensor in tensors if tensor.is_float}
    total = sum(weights.values())

    def share(names: Iterable[str]) -> float:
        return sum(weights[name] for name in names) / total if total else 0.0

    decoder = [name for name in weights if "mask_decoder" in name]
    covered: dict[str, frozenset[str]] = {}
    if decoder:
        model = "Segment Anything"
        table = list(_BULK)
        convolutions = frozenset(
            tensor.name
            for tensor in tensors
            if tensor.name in weights
            and len(tensor.shape) == 4
            and min(tensor.shape) > 0
            and tensor.name.endswith(".weight")
        )
        if share(convolutions) <= SMALL_CONVOLUTIONS:
            table += _CONVOLUTIONS
            covered["every convolution"] = convolutions
        table += _SAM
        if share(name for name in weights if "pos_embed" in name) > SMALL_POSITIONS:
            table += _LARGE_POSITIONS
        if share(decoder) < LARGE_DECODER:
            table += _DECODER
        else:
            model = "Segment Anything, light image encoder"
            table += _LARGE_DECODER
        table += _LAST_UPSCALING
    else:
        model = "unknown"
        table = list(_BULK)
        small = _smallest_matrices(tensors, SMALL_MATRICES * total)
        if small:
            pattern = f"the smallest matrices, {100 * share(small):.1f} % of the weights"
            table.append((pattern, "8"))
            covered[pattern] = small
    rules = [
        Rule(pattern, _resolve(rate, bits, rates), covered.get(pattern)) for pattern, rate in table
    ]
    rules += [Rule(pattern, rate) for pattern, rate in user_rules]
    return Policy(model, codec, tuple(rules))


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


def _smallest_matrices(tensors: Sequence[Tensor], most: float) -> frozenset[str]:
    """The matrices of the smallest sizes; all of one size or none, with ``most`` weights in all."""
    by_size: dict[int, list[str]] = {}
    for tensor in tensors:
        if tensor.is_float and len(tensor.shape) >= 2 and tensor.elements > 0:
            by_size.setdefault(math.prod(tensor.shape), []).append(tensor.name)
    names: list[str] = []
    for size, same in sorted(by_size.items()):
        most -= size * len(same)
        if most < 0:
            break
        names += same
    return frozenset(names)
