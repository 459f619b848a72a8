"""Speed of HyperLinear beside other linear layers on the CPU, all in one process, in turn.

    python benches/linear.py [--json] [--shapes 768x3072,...] [--tokens 1,196] [--threads 1,2]

Every layer computes the same product, M tokens of in_features by in_features x out_features, with
a bias. A round times each layer once, over enough calls to last a few milliseconds; the table has
the medians of the rounds: GFLOP/s (two operations a multiply-add), the ratio to torch fp32, and the
share of the peak of as many threads, measured in the same run (needs cargo): of float32 FMA for
float32 layers, of int8 dot products for the others; a product in `high` takes two of those, in
`highest` three.

Peers come from the `bench` extra; one that is missing or fails is said, with why.
With several threads, those of other libraries that spin while idle take cores from the next layer;
`cargo bench -p birkhoff-core --bench linear` shows how ours scale on their own.
`BIRKHOFF_ISA=avx2 python benches/linear.py` forces another instruction set of ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_name
from torch import nn

from birkhoff import _core
from birkhoff.nn import HyperLinear

#: Computes the product once.
Run = Callable[[], Any]
#: A layer: runs it, and gives what it last computed.
Layer = tuple[Run, Callable[[], Any]]

SHAPES = [
    (768, 768),
    (768, 2304),
    (768, 3072),
    (3072, 768),
    (1280, 5120),
    (5120, 1280),
    (256, 2048),
    (256, 256),
]
TOKENS = [1, 7, 64, 196, 4096]
#: Seconds that a timing lasts at least, and rounds.
LEAST, ROUNDS = 0.004, 7
#: Seconds in which the idle threads of the layer before stop spinning on the cores.
SETTLE = 0.02


class Missing(Exception):
    """A peer that cannot run here."""


def of_torch(run: Run) -> Layer:
    return run, lambda: run().float().numpy()


def torch_fp32(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    return of_torch(lambda: linear(x))


def torch_bf16(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    layer = nn.Linear(linear.in_features, linear.out_features, dtype=torch.bfloat16)
    layer.load_state_dict(linear.state_dict())
    x = x.bfloat16()
    return of_torch(lambda: layer(x))


def torch_int8(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    try:
        scale = linear.weight.detach().abs().amax(1) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(
                linear.weight.detach(), scale, torch.zeros(len(scale)), 0, torch.qint8
            )
            packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        operator = torch.ops.quantized.linear_dynamic
        operator(x, packed)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise Missing(f"torch has no dynamic int8 here: {str(error).splitlines()[0]}") from error
    return of_torch(lambda: operator(x, packed))


def _onnx_session(model: Any, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _onnx_model(nodes: list[Any], constants: dict[str, Any], x: Any, y: tuple[int, int]) -> Any:
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Missing("onnx is not installed") from error
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _onnx(
    nodes: list[Any], constants: dict[str, Any], x: torch.Tensor, out: int, threads: int
) -> Layer:
    values = x.numpy()
    model = _onnx_model(nodes, constants, values, (len(values), out))
    try:
        session = _onnx_session(model, threads)
    except ImportError as error:
        raise Missing("onnxruntime is not installed") from error
    binding = session.io_binding()
    binding.bind_cpu_input("x", values)
    binding.bind_output("y")
    run = lambda: session.run_with_iobinding(binding)  # noqa: E731
    return run, lambda: (run(), binding.copy_outputs_to_cpu()[0])[1]


def _weight(linear: nn.Linear) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(linear.weight.detach().numpy().T)


def onnx_fp32(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    from onnx import helper

    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    constants = {"w": _weight(linear), "b": linear.bias.detach().numpy()}
    return _onnx(nodes, constants, x, linear.out_features, threads)


def onnx_int8(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    from onnx import helper

    weight = _weight(linear)
    scale = (np.abs(weight).max(0) / 127).astype(np.float32)
    constants = {
        "w": np.round(weight / scale).astype(np.int8),
        "s": scale,
        "z": np.zeros(len(scale), np.int8),
        "b": linear.bias.detach().numpy(),
    }
    inputs = ["x", "w", "s", "z", "b"]
    nodes = [helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")]
    return _onnx(nodes, constants, x, linear.out_features, threads)


def onnx_int4(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    """4-bit MatMulNBits in blocks of 32, with its fastest (int8) arithmetic."""
    from onnx import helper

    block, rows, cols = 32, linear.out_features, linear.in_features
    weight = linear.weight.detach().numpy().reshape(rows, cols // block, block)
    scale = np.abs(weight).max(2, keepdims=True) / 7
    codes = np.clip(np.round(weight / scale) + 8, 0, 15).astype(np.uint8)
    constants = {
        "w": codes[..., 0::2] | codes[..., 1::2] << 4,
        "s": scale.reshape(-1).astype(np.float32),
        "b": linear.bias.detach().numpy(),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s", "", "", "b"],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=4,
        block_size=block,
        accuracy_level=4,
    )
    return _onnx([node], constants, x, rows, threads)


def _openvino(weight: Any, linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    import openvino
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), np.float32)
    product = ops.matmul(parameter, weight, False, True)
    model = openvino.Model([ops.add(product, linear.bias.detach().numpy())], [parameter])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    return request.infer, lambda: request.infer()[0]


def openvino_fp32(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    from openvino import opset13 as ops

    return _openvino(ops.constant(linear.weight.detach().numpy()), linear, x, threads)


def openvino_int8(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
    """int8 weights with a scale a row, as its weight compression stores them."""
    from openvino import opset13 as ops

    weight = linear.weight.detach().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    codes = ops.constant(np.round(weight / scale).astype(np.int8))
    decoded = ops.multiply(ops.convert(codes, np.float32), ops.constant(scale))
    return _openvino(decoded, linear, x, threads)


def ours(bits: int, precision: Any) -> Callable[[nn.Linear, torch.Tensor, int], Layer]:
    def make(linear: nn.Linear, x: torch.Tensor, threads: int) -> Layer:
        layer = HyperLinear.from_linear(linear, bits=bits, precision=precision)
        return of_torch(lambda: layer(x))

    return make


LAYERS: dict[str, Callable[[nn.Linear, torch.Tensor, int], Layer]] = {
    "torch fp32": torch_fp32,
    "torch bf16": torch_bf16,
    "torch int8": torch_int8,
    "onnx fp32": onnx_fp32,
    "onnx int8": onnx_int8,
    "onnx int4": onnx_int4,
    "openvino fp32": openvino_fp32,
    "openvino int8": openvino_int8,
} | {
    f"birkhoff {bits} {precision}": ours(bits, precision)
    for bits in (4, 8)
    for precision in ("highest", "high", "medium")
}


def make_layers(
    in_features: int, out_features: int, tokens: int, threads: int, missing: dict[str, str]
) -> dict[str, Run]:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    x = torch.randn(tokens, in_features)
    expected = linear(x).numpy()
    runs = {}
    for name, make in LAYERS.items():
        try:
            run, result = make(linear, x, threads)
            error = float(np.abs(result() - expected).mean() / np.abs(expected).mean())
            if not error < 0.2:
                raise Missing(f"its result is wrong at M = {tokens}: relative error {error:.2g}")
            runs[name] = run
        except (Missing, ImportError) as error:
            missing[name] = str(error)
    return runs


def repeat(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def seconds(runs: dict[str, Run], rounds: int, threads: int) -> dict[str, float]:
    """Median seconds a call, the layers taking turns."""
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = max(1, round(LEAST / max(repeat(run, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if threads > 1:
                time.sleep(SETTLE)
            if calls[name] > 1:
                run()  # back into the cache
            times[name].append(repeat(run, calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def peaks() -> dict[str, float]:
    """GFLOP/s of one thread at most, by instruction; empty without cargo."""
    command = [
        "cargo",
        "bench",
        "--quiet",
        "-p",
        "birkhoff-core",
        "--bench",
        "linear",
        "--",
        "peaks",
    ]
    try:
        output = subprocess.check_output(command, cwd=Path(__file__).parent, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    measured: dict[str, float] = json.loads(output)
    return measured


def peak_of(name: str, measured: dict[str, float]) -> float | None:
    """The peak that bounds a layer."""
    if "fp32" in name:
        return max((v for key, v in measured.items() if key.startswith("fma")), default=None)
    return measured.get("vpdpbusd zmm") if "bf16" not in name else None


def main() -> None:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", help="in x out, e.g. 768x3072,256x256")
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    shapes = SHAPES
    if arguments.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]

    torch.set_grad_enabled(False)
    measured = peaks()
    missing: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for in_features, out_features in shapes:
            for tokens in arguments.tokens:
                runs = make_layers(in_features, out_features, tokens, threads, missing)
                times = seconds(runs, arguments.rounds, threads)
                operations = 2 * tokens * in_features * out_features
                row = {
                    "threads": threads,
                    "in": in_features,
                    "out": out_features,
                    "tokens": tokens,
                    "gflops": {name: round(operations / t / 1e9, 1) for name, t in times.items()},
                    "microseconds": {name: round(t * 1e6, 2) for name, t in times.items()},
                    "ratio_to_torch_fp32": {
                        name: round(times["torch fp32"] / t, 2) for name, t in times.items()
                    },
                    "share_of_peak": {
                        name: round(operations / t / 1e9 / threads / peak, 3)
                        for name, t in times.items()
                        if (peak := peak_of(name, measured)) is not None
                    },
                }
                rows.append(row)
                if not arguments.json:
                    if len(rows) == 1:
                        print(f"{cpu_name()}, birkhoff on {_core.isa()}, torch {torch.__version__}")
                        print("peaks of a thread:", measured or "not measured: no cargo")
                        print("GFLOP/s, ratio to torch fp32, share of peak")
                    print(f"\n{threads} threads, {in_features} -> {out_features}, M = {tokens}")
                    for name in runs:
                        share = row["share_of_peak"].get(name)
                        print(
                            f"  {name:20} {row['gflops'][name]:8.1f}"
                            f"  {row['ratio_to_torch_fp32'][name]:6.2f}x"
                            f"  {'' if share is None else f'{share:5.0%}'}"
                        )
    if arguments.json:
        report = {
            "cpu": cpu_name(),
            "isa": _core.isa(),
            "torch": torch.__version__,
            "peaks": measured,
            "missing": missing,
            "rows": rows,
        }
        print(json.dumps(report, indent=1))
    else:
        for name, why in missing.items():
            print(f"not measured: {name}: {why}")


if __name__ == "__main__":
    main()
