"""Speed of a SAM image encoder on the CPU, end to end, beside torch and OpenVINO, in turn.

    python benches/encoder.py [--json] [--profile] [--threads 1] [--rounds 5] [--bits 4]
        [--config sam-vit-base] [--openvino]

The model is transformers' SamVisionModel at true size with random weights. Those of torch and
OpenVINO hold the decoded weights of the compressed one, so that errors are those of the arithmetic
alone. A round encodes one image with each; the table has medians of the rounds, in seconds of the
clock and of the CPU (all threads together: what a busy machine changes less), the ratio of both to
torch fp32, and the relative error (L2) of the embedding.

--profile prints which operators take the time of torch fp32 and of ours, as torch.profiler sees it.
--openvino converts the model, which takes a minute and some gigabytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import cpu_name
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import SamVisionConfig, SamVisionModel

import birkhoff
from birkhoff import _core
from birkhoff.nn import HyperConv2d, HyperLinear
from birkhoff.nn.placement import coded_parameters

#: Encodes the image.
Encode = Callable[[], Tensor]

#: Hidden size, layers, heads, and the layers of global attention.
CONFIGS = {
    "sam-vit-base": (768, 12, 12, [2, 5, 8, 11]),
    "sam-vit-large": (1024, 24, 16, [5, 11, 17, 23]),
    "sam-vit-huge": (1280, 32, 16, [7, 15, 23, 31]),
}
#: Operators with a smaller share of the time are summed up.
LEAST_SHARE = 0.01


def make_model(name: str) -> nn.Module:
    """The encoder at random; tables of relative positions, which start as zeros, too."""
    hidden_size, layers, heads, global_attention = CONFIGS[name]
    config = SamVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        global_attn_indexes=global_attention,
    )
    model: nn.Module = SamVisionModel(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "rel_pos" in parameter_name or "pos_embed" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model


def hold_decoded(model: nn.Module, compressed: nn.Module) -> None:
    """Gives a model the weights of a compressed one."""
    coded = coded_parameters(compressed)
    state = {name: tensor for name, tensor in compressed.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.copy_(coded[name].decode() if name in coded else state[name])


def with_precision(model: nn.Module, precision: Any, image: Tensor) -> Encode:
    def encode() -> Tensor:
        for layer in model.modules():
            if isinstance(layer, HyperLinear | HyperConv2d):
                layer.precision = precision
        output: Tensor = model(image)[0]
        return output

    return encode


def with_bf16_autocast(model: nn.Module, image: Tensor) -> Encode:
    def encode() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = model(image)[0]
        return output

    return encode


def with_openvino(model: nn.Module, image: Tensor, precision: str, threads: int) -> Encode:
    import openvino

    converted = openvino.convert_model(model, example_input=image)
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    return lambda: torch.from_numpy(compiled(image.numpy())[0])


def measure(encoders: dict[str, Encode], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of clock and CPU, and the error against the first."""
    clock: dict[str, list[float]] = {name: [] for name in encoders}
    cpu: dict[str, list[float]] = {name: [] for name in encoders}
    errors: dict[str, float] = {}
    expected = None
    for turn in range(rounds + 1):
        for name, encode in encoders.items():
            start = time.perf_counter(), time.process_time()
            output = encode()
            if turn == 0:  # warm-up
                expected = output.double() if expected is None else expected
                errors[name] = float((output.double() - expected).norm() / expected.norm())
                continue
            clock[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    first = next(iter(encoders))
    seconds = {name: statistics.median(clock[name]) for name in encoders}
    cpu_seconds = {name: statistics.median(cpu[name]) for name in encoders}
    return {
        name: {
            "seconds": round(seconds[name], 3),
            "cpu_seconds": round(cpu_seconds[name], 3),
            "speedup": round(seconds[first] / seconds[name], 2),
            "cpu_speedup": round(cpu_seconds[first] / cpu_seconds[name], 2),
            "error": float(f"{errors[name]:.2g}"),
        }
        for name in encoders
    }


def shares(encode: Encode, model: nn.Module) -> dict[str, float]:
    """The operators' shares of the time, largest first.

    Layers on coded weights do not go through torch's dispatcher: their calls are marked here.
    """
    running: list[Any] = []

    def enter(_layer: nn.Module, _inputs: Any) -> None:
        running.append(record_function("birkhoff::linear"))
        running[-1].__enter__()

    def leave(_layer: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks: list[Any] = []
    for layer in model.modules():
        if isinstance(layer, HyperLinear | HyperConv2d):
            hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        encode()
    for hook in hooks:
        hook.remove()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    found = {
        name: round(share / total, 3)
        for name, share in sorted(times.items(), key=lambda item: -item[1])
        if share >= LEAST_SHARE * total
    }
    return found | {"others": round(1 - sum(found.values()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--config", choices=CONFIGS, default="sam-vit-base")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 1024, 1024)
    model = make_model(arguments.config)
    compressed = birkhoff.compress(copy.deepcopy(model), bits=arguments.bits)
    hold_decoded(model, compressed)
    encoders: dict[str, Encode] = {
        "torch fp32": lambda: model(image)[0],
        "torch bf16 autocast": with_bf16_autocast(model, image),
    } | {
        f"birkhoff {precision}": with_precision(compressed, precision, image)
        for precision in ("highest", "high", "medium")
    }
    if arguments.openvino:
        for precision in ("f32", "bf16"):
            encoders[f"openvino {precision}"] = with_openvino(
                model, image, precision, arguments.threads
            )
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "isa": _core.isa(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "model": arguments.config,
        "bits": arguments.bits,
        "encoders": measure(encoders, arguments.rounds),
    }
    if arguments.profile:
        report["shares"] = {
            name: shares(encoders[name], compressed if "birkhoff" in name else model)
            for name in ("torch fp32", "birkhoff high", "birkhoff medium")
        }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['cpu']}, {arguments.threads} threads, birkhoff on {report['isa']}, ", end="")
    print(f"torch {torch.__version__}; {arguments.config} at {arguments.bits} bits, 1024 x 1024")
    print(f"{'':20} {'seconds':>8} {'CPU':>8} {'speedup':>8} {'of CPU':>8} {'error':>8}")
    for name, row in report["encoders"].items():
        print(
            f"{name:20} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} {row['speedup']:7.2f}x"
            f" {row['cpu_speedup']:7.2f}x {row['error']:8.1e}"
        )
    for name, found in report.get("shares", {}).items():
        print(f"\n{name}:")
        for operator, share in found.items():
            print(f"  {share:6.1%}  {operator}")


if __name__ == "__main__":
    main()
