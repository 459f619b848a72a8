"""Which kernel multiplies how many tokens. The tables are meant to be tuned.

Few tokens go to ``gemv_*``, which reads each code once; some to a ``gemm_*`` tile, which decodes W
again for every tile of tokens; many to a decode of the whole W followed by ``F.linear``. The limits
are estimates: none has been measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from birkhoff.cuda.source import GEMV_TOKENS, LARGE, SMALL, Dtype, Tile, Variant

Path = Literal["fused", "decode", "torch"]

#: Forces a path: ``fused`` the kernels that multiply, ``decode`` the decode kernel and
#: ``F.linear``, ``torch`` a decode with torch operations and ``F.linear``.
VARIABLE = "BIRKHOFF_CUDA"


@dataclass(frozen=True)
class Rule:
    """What multiplies up to a number of tokens.

    Attributes:
        tokens: The largest number of tokens; None for any.
        kernel: ``"gemv"``, a tile of ``gemm``, or ``"decode"``.
    """

    tokens: int | None
    kernel: Tile | Literal["gemv", "decode"]


#: In ascending order of tokens, by dtype.
RULES: dict[Dtype, tuple[Rule, ...]] = {
    "F32": (Rule(8, "gemv"), Rule(512, SMALL), Rule(None, "decode")),
    "F16": (Rule(8, "gemv"), Rule(256, SMALL), Rule(512, LARGE), Rule(None, "decode")),
    "BF16": (Rule(8, "gemv"), Rule(256, SMALL), Rule(512, LARGE), Rule(None, "decode")),
}


def choose(variant: Variant, tokens: int, path: Path | None) -> Tile | int | None:
    """The kernel for a product.

    Args:
        variant: Which kernels there are.
        tokens: Rows of x, at least 1.
        path: What is forced, if anything.

    Returns:
        A tile of ``gemm``, the tokens of a ``gemv_*``, or None to decode and call ``F.linear``.
    """
    if path in ("decode", "torch"):
        return None
    rules: Sequence[Rule] = RULES[variant.dtype]
    if path == "fused":
        rules = [rule for rule in rules if rule.kernel != "decode"]
    fitting = (rule.kernel for rule in rules if rule.tokens is None or tokens <= rule.tokens)
    kernel = next(fitting, rules[-1].kernel)
    if kernel == "gemv":
        return next(limit for limit in GEMV_TOKENS if tokens <= limit)
    if isinstance(kernel, Tile) and variant.tiles:
        return kernel if kernel in variant.tiles else variant.tiles[-1]
    return None


def forced_path() -> Path | None:
    """What ``BIRKHOFF_CUDA`` says, if it is set.

    Raises:
        ValueError: It is set to something else than a path.
    """
    path = os.environ.get(VARIABLE) or None
    if path is not None and path not in get_args(Path):
        raise ValueError(f"{VARIABLE} is {path!r}; set it to fused, decode or torch, or unset it")
    return cast("Path | None", path)
