"""Correctness and speed of HyperLinear on a CUDA device.

Nobody has measured it yet: please send the output.

    python benches/gpu.py [--device cuda:0] [--bits 4] [--quick]

First every variant (codec, bits, dtype) is compared with the CPU: decoded weights must be the same
bits, and products at most twice as far from the exact ones as those of `F.linear` with the decoded
weight in the same dtype. Then each kernel is timed beside `F.linear` for the linear layers of SAM:
the tables of microseconds say from how many tokens on which kernel is the fastest, which is what
`birkhoff/cuda/dispatch.py` is made from. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import birkhoff
from birkhoff import _core
from birkhoff.cuda import DeviceWeight
from birkhoff.cuda.dispatch import choose
from birkhoff.cuda.nvrtc import nvrtc
from birkhoff.cuda.program import Program
from birkhoff.cuda.source import GEMV_TOKENS, LARGE, SMALL, Tile
from birkhoff.nn import HyperLinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: In_features and out_features of SAM-B's and SAM-H's layers, and of the mask decoder's.
SHAPES = [(768, 2304), (768, 3072), (3072, 768), (1280, 5120), (5120, 1280), (256, 2048)]
TOKENS = [1, 7, 16, 64, 196, 512, 1024, 4096]
#: Calls in a timing, and timings.
CALLS, ROUNDS = 20, 7


def rates() -> Iterator[tuple[str, int]]:
    for codec in ("shift", "winding"):
        for bits in _core.rates(codec):
            yield codec, bits


def on_device(weight: np.ndarray, codec: str, bits: int, device: torch.device) -> DeviceWeight:
    matrix = birkhoff.encode(weight, bits=bits, codec=codec)
    return HyperLinear(matrix).to(device).coded_weight.on_device()


def program_of(weight: DeviceWeight, dtype: torch.dtype) -> Program | None:
    """The kernels for products in the highest precision."""
    return weight.program(dtype, 3 if dtype == torch.float32 else 1)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def check(device: torch.device) -> bool:
    """Compares all variants with the CPU; whether all is right."""
    right = True
    rng = np.random.default_rng(0)
    print("\n| codec | bits | dtype | in x out | decode | worst error / F.linear's |")
    print("|---|---|---|---|---|---|")
    for (codec, bits), (in_features, out_features) in itertools.product(
        rates(), [(333, 70), (768, 200)]
    ):
        values = (0.02 * rng.standard_normal((out_features, in_features))).astype(np.float32)
        matrix = birkhoff.encode(values, bits=bits, codec=codec)
        expected = torch.from_numpy(matrix.decode())
        weight = HyperLinear(matrix).to(device).coded_weight.on_device()
        bias = torch.linspace(-1, 1, out_features, device=device)
        for dtype in DTYPES:
            loaded = program_of(weight, dtype)
            if loaded is None:
                print(f"| {codec} | {bits} | {dtype} | | no kernels: see the log | |")
                continue
            decoded = weight.decode_with(dtype, loaded)
            same = torch.equal(decoded.cpu(), expected.to(dtype))
            worst = 0.0
            for tokens, kernel in itertools.product((1, 2, 3, 8, 100, 300), kernels(loaded)):
                if isinstance(kernel, int) and tokens > kernel:
                    continue
                x = torch.randn(tokens, in_features, device=device).to(dtype)
                exact = functional.linear(x.double(), decoded.double(), bias.to(dtype).double())
                y = weight.multiply_with(loaded, kernel, x, bias.to(dtype))
                theirs = functional.linear(x, decoded, bias.to(dtype))
                least = torch.finfo(dtype).eps / 4
                ratio = relative_error(y, exact) / max(relative_error(theirs, exact), least)
                worst = max(worst, ratio) if np.isfinite(ratio) else float("inf")
            right &= same and worst <= 2
            decode = "same" if same else "**DIFFERS**"
            product = f"{worst:.2f}" + ("" if worst <= 2 else " **WRONG**")
            shape = f"{in_features} x {out_features}"
            print(f"| {codec} | {bits} | {dtype} | {shape} | {decode} | {product} |")
    return right


def check_graph(device: torch.device) -> bool:
    """Captures a layer in a CUDA graph and replays it."""
    layer = HyperLinear(birkhoff.encode(np.random.default_rng(0).standard_normal((96, 256))))
    layer.to(device)
    x = torch.randn(5, 256, device=device)
    with torch.inference_mode():
        layer(x)  # warm-up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(5, 256))
        graph.replay()
        right = torch.equal(y, layer(x))
    print(f"\nCUDA graph: {'right' if right else '**WRONG**'}")
    return right


def check_compile(device: torch.device) -> bool:
    """Compiles a layer with torch.compile."""
    layer = HyperLinear(birkhoff.encode(np.random.default_rng(0).standard_normal((96, 256))))
    layer.to(device)
    x = torch.randn(5, 256, device=device)
    with torch.inference_mode():
        right = torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5)
    print(f"torch.compile: {'right' if right else '**WRONG**'}")
    return right


def kernels(loaded: Program) -> list[Tile | int]:
    return [*GEMV_TOKENS, *loaded.variant.tiles]


def microseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(1000 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def timings(weight: DeviceWeight, dtype: torch.dtype, tokens: int) -> list[str]:
    """Microseconds of `F.linear`, `gemv_*`, both tiles, and decode with `F.linear`."""
    device = weight.codes.device
    loaded = program_of(weight, dtype)
    if loaded is None:
        return ["no kernels: see the log"]
    x = torch.randn(tokens, weight.in_features, device=device).to(dtype)
    bias = torch.zeros(weight.out_features, device=device, dtype=dtype)
    dense = weight.decode_with(dtype, loaded)
    gemv = next((limit for limit in GEMV_TOKENS if tokens <= limit), None)
    runs: dict[Tile | int | None, Callable[[], Tensor]] = {
        kernel: lambda kernel=kernel: weight.multiply_with(loaded, kernel, x, bias)
        for kernel in (gemv, *loaded.variant.tiles)
        if kernel is not None
    }
    runs[None] = lambda: functional.linear(x, weight.decode_with(dtype, loaded), bias)
    chosen = choose(loaded.variant, tokens, None)
    cells = [f"{microseconds(lambda: functional.linear(x, dense, bias), device):.1f}"]
    for kernel in (gemv or 0, SMALL, LARGE, None):
        run = runs.get(kernel)
        star = "*" if kernel == chosen else ""
        cells.append("" if run is None else f"{microseconds(run, device):.1f}{star}")
    return cells


def time_all(device: torch.device, bits: int, tokens_of: list[int]) -> None:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        print(f"\nMicroseconds, {bits} bits, {dtype}; the kernel that is chosen has a star\n")
        print("| in x out | tokens | F.linear | gemv | 64x64 | 128x128 | decode + F.linear |")
        print("|---|---|---|---|---|---|---|")
        for in_features, out_features in SHAPES:
            values = (0.02 * rng.standard_normal((out_features, in_features))).astype(np.float32)
            weight = on_device(values, "shift", bits, device)
            for tokens in tokens_of:
                cells = " | ".join(timings(weight, dtype, tokens))
                print(f"| {in_features} x {out_features} | {tokens} | {cells} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bits", type=int, default=4, help="code bits a weight of the timings")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, for a first look")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    version = ".".join(map(str, nvrtc().version))
    print(
        f"birkhoff {birkhoff.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"NVRTC {version}, {torch.cuda.get_device_name(device)} "
        f"({torch.cuda.get_device_capability(device)})"
    )
    # Nothing but float32 in the products to compare with.
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        right = [check(device), check_graph(device), check_compile(device)]
        time_all(device, options.bits, TOKENS[::3] if options.quick else TOKENS)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
