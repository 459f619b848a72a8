"""The CUDA kernels, run on the CPU by an emulation of the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator import COMPILER, DTYPES, EmulationError, Emulator, Fault, Weight, decode, linear
from torch import Tensor
from torch.nn import functional

from birkhoff import _core
from birkhoff.cuda.source import GEMV_TOKENS, LARGE, SMALL, Dtype, Tile, Variant

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to emulate the device")

TRAJECTORIES = [("shift", bits) for bits in _core.rates("shift")]
TRAJECTORIES += [("winding", bits) for bits in _core.rates("winding") if bits != 8]


def variant(dtype: Dtype, codec: str = "shift", bits: int = 4, planes: int = 3) -> Variant:
    return Variant(codec, bits, dtype, planes if dtype == "F32" else 1, 80)


def inputs(weight: Weight, tokens: int, dtype: Dtype, stride: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, stride or weight.in_features, generator=generator)
    return x.to(DTYPES[dtype])[:, : weight.in_features]


def check_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """At most twice as far from the exact product as torch's in the same dtype."""
    exact = functional.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    theirs = functional.linear(x, weight, bias)
    assert y.isfinite().all()
    error, typical = (y.double() - exact).norm(), (theirs.double() - exact).norm()
    # Torch's may be lucky where there are few outputs: half a step of the dtype is allowed to all.
    least = torch.finfo(y.dtype).eps * exact.norm() / 2
    assert error <= 2 * typical + least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("codec", "bits"), TRAJECTORIES)
def test_every_variant_decodes_and_multiplies(codec: str, bits: int, dtype: Dtype) -> None:
    emulator = Emulator(variant(dtype, codec, bits))
    for aligned, shape in ((False, (37, 333)), (True, (16, 200))):
        weight = Weight(*shape, codec, bits)
        assert torch.equal(decode(emulator, weight, aligned=aligned), weight.decoded(dtype))
    x = inputs(weight, 3, dtype)
    check_product(linear(emulator, 4, weight, x, None), x, weight.decoded(dtype), None)
    check_product(linear(emulator, SMALL, weight, x, None), x, weight.decoded(dtype), None)


#: Out_features, in_features, tokens, and elements between rows of x.
SHAPES = [
    (1, 1, 1, None),
    (5, 8, 2, None),
    (16, 32, 64, None),
    (48, 128, 7, None),
    (64, 160, 65, None),
    (70, 131, 9, None),
    (66, 136, 33, 144),  # aligned rows with something between them
    (33, 264, 3, 265),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features", "tokens", "stride"), SHAPES)
def test_ragged_shapes(
    out_features: int, in_features: int, tokens: int, stride: int | None, dtype: Dtype
) -> None:
    emulator = Emulator(variant(dtype))
    weight = Weight(out_features, in_features)
    x = inputs(weight, tokens, dtype, stride)
    bias = torch.linspace(-1, 1, out_features).to(DTYPES[dtype])
    decoded = weight.decoded(dtype)
    assert torch.equal(decode(emulator, weight), decoded)
    kernels: list[Tile | int] = [tile for tile in emulator.variant.tiles if tile is SMALL]
    kernels += [limit for limit in GEMV_TOKENS if tokens <= limit]
    for kernel in kernels:
        check_product(linear(emulator, kernel, weight, x, bias), x, decoded, bias)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_large_tile(dtype: Dtype) -> None:
    emulator = Emulator(variant(dtype))
    weight = Weight(145, 232)
    x = inputs(weight, 130, dtype)
    bias = torch.linspace(-1, 1, 145).to(DTYPES[dtype])
    check_product(linear(emulator, LARGE, weight, x, bias), x, weight.decoded(dtype), bias)


@pytest.mark.parametrize(("planes", "error"), [(3, 1e-6), (2, 3e-5), (1, 1e-2)])
def test_planes_of_float32(planes: int, error: float) -> None:
    emulator = Emulator(variant("F32", planes=planes))
    weight = Weight(40, 300)
    x = inputs(weight, 20, "F32")
    y = linear(emulator, SMALL, weight, x, None)
    exact = functional.linear(x.double(), weight.decoded("F32").double())
    assert (y - exact).norm() / exact.norm() < error


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_threads_does_not_matter(order: int) -> None:
    emulator = Emulator(variant("BF16"))
    weight = Weight(70, 328)
    x = inputs(weight, 70, "BF16")
    assert torch.equal(decode(emulator, weight, order=order), decode(emulator, weight))
    for kernel, tokens in ((SMALL, 70), (LARGE, 70), (8, 6)):
        y = linear(emulator, kernel, weight, x[:tokens], None)
        assert torch.equal(linear(emulator, kernel, weight, x[:tokens], None, order=order), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_spoil_only_themselves(dtype: Dtype) -> None:
    emulator = Emulator(variant(dtype))
    weight = Weight(40, 133)
    x = inputs(weight, 8, dtype)
    for kernel in (SMALL, 8):
        clean = linear(emulator, kernel, weight, x, None)
        spoiled = x.clone()
        spoiled[3, 7], spoiled[5, 132] = float("nan"), float("inf")
        y = linear(emulator, kernel, weight, spoiled, None)
        kept = [0, 1, 2, 4, 6, 7]
        assert torch.equal(y[kept], clean[kept])
        assert not y[[3, 5]].isfinite().any()


def test_padding_whose_weights_are_infinite_does_not_matter() -> None:
    # Codes of padding are arbitrary; in float16 the weights there may overflow, and infinity times
    # the zeros of x would be NaN.
    weight = Weight(16, 17, bits=8)
    codes, row_scales, group_exponents = (part.data for part in weight.parts)
    quads = codes.reshape(8, 16, 4)  # columns 2i, 2i + 1, 16 + 2i, 17 + 2i
    quads[...] = 127
    quads[:, :, :2] = quads[0, :, 2] = 0
    row_scales[:] = torch.full((16,), 1000, dtype=torch.bfloat16).view(torch.uint8).numpy()
    group_exponents[:] = 0
    emulator = Emulator(variant("F16", bits=8))
    for kernel in (SMALL, 4):
        y = linear(emulator, kernel, weight, torch.ones(3, 17, dtype=torch.float16), None)
        assert torch.equal(y, torch.zeros(3, 16, dtype=torch.float16))


FAULTS: dict[str, Fault] = {
    "no barrier between the steps": (
        "                store(step + 1);\n                sync_block();",
        "                store(step + 1);",
    ),
    "no barrier behind the tables": (
        "        fill_tables(THREADS);\n        sync_block();\n        load(0);",
        "        load(0);",
    ),
    "one stage for all steps": (
        "char* const stage = stages + step % 2 * STAGE_BYTES;\n#pragma unroll",
        "char* const stage = stages;\n#pragma unroll",
    ),
    "chunks in other places than they are read": (
        "tile_offset(line, 2 * stream + i))",
        "tile_offset(line ^ i, 2 * stream + i))",
    ),
    "swapped fragments": ("b[n][1] = matrices[1];", "b[n][1] = matrices[2];"),
    "exponents of other rows": (
        "unsigned exponent = exponents >> row / 8 * 4 & 15;",
        "unsigned exponent = exponents & 15;",
    ),
    "streams that are not closed": (
        "int before = (block == 0 ? row.blocks : block) - 1;",
        "int before = block == 0 ? 0 : block - 1;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    # The checks of above, on one shape.
    emulator = Emulator(variant("F16"), FAULTS[fault])
    weight = Weight(70, 328)
    x = inputs(weight, 70, "F16")
    with pytest.raises((AssertionError, EmulationError)):  # noqa: PT012
        for order in (0, 1, 2):
            for kernel, tokens in ((SMALL, 70), (8, 8)):
                y = linear(emulator, kernel, weight, x[:tokens], None, order=order)
                check_product(y, x[:tokens], weight.decoded("F16"), None)


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, with all names of this file."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"from test_kernels import *\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_touch_of_memory_beyond_a_tensor_is_found() -> None:
    code = """
fault = ("output >= arguments.out_features) return;", "false) return;")
weight = Weight(70, 32)
linear(Emulator(variant("F16"), fault), SMALL, weight, inputs(weight, 70, "F16"), None)
"""
    assert run_apart(code).returncode < 0


def test_no_undefined_behaviour() -> None:
    code = """
for dtype, bits in (("F32", 3), ("F16", 8)):
    emulator = Emulator(variant(dtype, bits=bits), sanitize=True)
    for weight, tokens in ((Weight(37, 333, bits=bits), 9), (Weight(16, 64, bits=bits), 8)):
        assert torch.equal(decode(emulator, weight), weight.decoded(dtype))
        x = inputs(weight, tokens, dtype)
        for kernel in (SMALL, 8):
            linear(emulator, kernel, weight, x[:8], None)
"""
    done = run_apart(code)
    assert done.returncode == 0, done.stderr
