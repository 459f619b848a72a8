"""From the operator to the driver: with a driver that runs kernels in the emulator."""

from __future__ import annotations

import ctypes
import itertools
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from birkhoff import ops, torch_decode
from birkhoff.cuda import DeviceWeight, dispatch, driver, launch, program, source
from birkhoff.cuda.nvrtc import Nvrtc, NvrtcError
from birkhoff.cuda.source import Dtype, Variant
from birkhoff.nn import HyperConv2d, HyperLinear
from birkhoff.nn.coded import CodedParameter

HERE = Path(__file__).parent

needs_compiler = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ to emulate the device"
)

#: The stream that torch is said to have as its current one.
STREAM = 0x5EED


class FakeCompiler:
    """Stands for NVRTC: builds emulators, whose paths are what the fake driver loads."""

    version = (0, 0)

    def __init__(self) -> None:
        self.compiled: list[Variant] = []

    def options(self, capability: int) -> list[str]:
        return [f"sm_{capability}"]

    def compile(self, text: str, options: list[str]) -> tuple[bytes, str]:
        for codec, bits, dtype, planes in itertools.product(
            ("shift", "winding"), (2, 3, 4, 5, 6, 8), emulator.DTYPES, (1, 2, 3)
        ):
            if codec == "winding" and bits not in (4, 5, 6):
                continue
            variant = Variant(codec, bits, dtype, planes, int(options[0][3:]))
            if source.source(variant) == text:
                self.compiled.append(variant)
                return b"EMULATOR:" + bytes(emulator.build(variant)) + b"\0", ""
        raise AssertionError("the source is of no variant")


class FakeDevice:
    """Device 1 of a machine whose kernels run on the CPU, where its tensors are."""

    def __init__(self, library: Path) -> None:
        self.compiler = FakeCompiler()
        self.library = ctypes.CDLL(str(library))
        self.library.fake_last_stream.restype = ctypes.c_void_p
        self.capability = 80

    @property
    def launches(self) -> int:
        count: int = self.library.fake_launches()
        return count


@pytest.fixture(scope="session")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    assert emulator.COMPILER is not None
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    library = HERE / "fake_libcuda.cpp"
    subprocess.run([emulator.COMPILER, *options, str(library), "-o", str(path)], check=True)
    return path


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is loaded, logged or forced yet, and nothing stays."""
    monkeypatch.setattr(program, "_programs", {})
    monkeypatch.setattr(program, "_logged", set())
    monkeypatch.delenv("BIRKHOFF_CUDA", raising=False)
    monkeypatch.setenv("BIRKHOFF_CACHE", str(tmp_path / "cache"))
    driver.driver.cache_clear()
    yield
    driver.driver.cache_clear()


@pytest.fixture
def device(fake_libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice(fake_libcuda)
    monkeypatch.setattr(driver, "LIBRARY", str(fake_libcuda))
    monkeypatch.setattr(program, "nvrtc", lambda: fake.compiler)
    monkeypatch.setattr(launch, "device_of", lambda _: (1, fake.capability))
    monkeypatch.setattr(launch, "stream_of", lambda _: STREAM)
    return fake


def make_layer(bits: int = 4, **options: Any) -> HyperLinear:
    torch.manual_seed(bits)
    return HyperLinear.from_linear(nn.Linear(200, 70), bits=bits, **options)


def on_device(layer: HyperLinear) -> DeviceWeight:
    return layer.coded_weight.on_device()


def expected(layer: HyperLinear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    weight = layer.weight.to(x.dtype).double()
    return functional.linear(x.double(), weight, layer.bias.double())


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operator(device: FakeDevice, dtype: torch.dtype, tokens: int) -> None:
    layer = make_layer(precision="highest")
    x = torch.randn(tokens, 200).to(dtype)
    codes, row_scales, exponents = layer.coded_weight.parts()
    settings = (layer.bias, 70, 200, 4, "shift", "highest")
    y = ops._linear_cuda(x, codes, row_scales, exponents, *settings)
    assert (y.dtype, y.shape) == (dtype, (tokens, 70))
    assert relative_error(y, expected(layer, x)) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert device.launches > 0
    assert device.library.fake_last_stream() == STREAM
    assert device.library.fake_last_device() == 1
    assert device.library.fake_depth() == 0  # the context is popped again


@needs_compiler
def test_shapes_and_strides_of_x(device: FakeDevice) -> None:
    layer = make_layer()
    weight = on_device(layer)
    wide = torch.randn(2, 3, 401)
    for x in (wide[..., 1:201], wide[..., ::2][..., :200], wide[0, 0, :200], wide[:, :0, :200]):
        y = weight.linear(x, layer.bias, "highest")
        assert y.shape == (*x.shape[:-1], 70)
        if x.numel() > 0:
            assert relative_error(y, expected(layer, x)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("bits", [3, 8])
def test_decode(device: FakeDevice, bits: int) -> None:
    layer = make_layer(bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(on_device(layer).decode(dtype), layer.weight.to(dtype))
    assert device.launches > 0


@needs_compiler
def test_paths_can_be_forced(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x = torch.randn(1000, 200, dtype=torch.float32)
    kernels: list[str] = []
    monkeypatch.setattr(
        driver.Driver,
        "launch",
        lambda _self, _device, kernel, *_others: kernels.append(kernel.name),
    )
    weight = on_device(layer)
    for path, kernel in ((None, "decode"), ("fused", "gemm_64x64"), ("decode", "decode")):
        kernels.clear()
        if path is not None:
            monkeypatch.setenv("BIRKHOFF_CUDA", path)
        weight.linear(x, None, "high")
        assert kernels == [kernel]
    monkeypatch.setenv("BIRKHOFF_CUDA", "torch")
    kernels.clear()
    y = weight.linear(x, layer.bias, "high")
    assert kernels == []
    assert relative_error(y, expected(layer, x)) < 1e-6
    monkeypatch.setenv("BIRKHOFF_CUDA", "best")
    with pytest.raises(ValueError, match="fused, decode or torch"):
        weight.linear(x, None, "high")


def test_rules_end_and_ascend() -> None:
    for dtype, rules in dispatch.RULES.items():
        limits = [rule.tokens for rule in rules]
        assert limits[-1] is None
        assert limits[:-1] == sorted(limit for limit in limits if limit is not None)
        for capability, planes in ((75, 1), (80, 1), (90, 3)):
            variant = Variant("shift", 4, dtype, planes, capability)
            for tokens, path in itertools.product((1, 8, 9, 512, 10**6), (None, "fused")):
                kernel = dispatch.choose(variant, tokens, path)  # type: ignore[arg-type]
                assert kernel is None or isinstance(kernel, int) or kernel in variant.tiles


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    def nvrtc() -> Nvrtc:
        raise NvrtcError("NVRTC was not found")

    patch.setattr(program, "driver", lambda: None)
    patch.setattr(program, "nvrtc", nvrtc)


def no_driver(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "LIBRARY", "libnone.so")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (no_compiler, "NVRTC was not found"),
        (no_driver, "driver was not found"),
        (lambda patch: patch.setattr(torch.version, "hip", "7.1"), "ROCm"),
        (lambda patch: patch.setattr(launch, "device_of", lambda _: (0, 70)), "capability 7.5"),
        (lambda patch: patch.setattr(launch, "device_of", lambda _: (0, 75)), "bfloat16 needs"),
        (lambda patch: patch.setattr(program, "_is_capturing", lambda: True), "captured"),
    ],
)
def test_fall_back_with_one_line_in_the_log(
    break_it: Callable[[pytest.MonkeyPatch], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launch, "device_of", lambda _: (0, 80))
    break_it(monkeypatch)
    layer = make_layer()
    x = torch.randn(3, 200, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "birkhoff.cuda"):
        for _ in range(2):
            y = on_device(layer).linear(x, layer.bias, "high")
            decoded = on_device(layer).decode(torch.bfloat16)
    assert torch.equal(decoded, layer.weight.bfloat16())
    assert layer.bias is not None
    assert torch.equal(y, functional.linear(x, decoded, layer.bias.bfloat16()))
    assert len(caplog.records) == 1
    assert words in caplog.text


@needs_compiler
def test_driver_that_cannot_load_the_kernels(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device.compiler, "compile", lambda *_: (b"for another device\0", ""))
    layer = make_layer()
    x = torch.randn(3, 200)
    y = on_device(layer).linear(x, layer.bias, "high")
    assert relative_error(y, expected(layer, x)) < 1e-6
    assert "device kernel image is invalid" in caplog.text


@needs_compiler
def test_compiled_kernels_are_kept(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        program._programs.clear()
        on_device(make_layer()).linear(torch.randn(1, 200), None, "high")

    folder = program.cache_folder()
    assert folder is not None
    run()
    run()
    assert len(device.compiler.compiled) == 1
    (kept,) = (folder / "cuda").iterdir()
    kept.write_bytes(b"damaged\0")
    run()
    run()
    assert len(device.compiler.compiled) == 2
    assert list((folder / "cuda").iterdir()) == [kept]
    # A folder that cannot be: a file stands in its place.
    monkeypatch.setenv("BIRKHOFF_CACHE", str(kept))
    run()
    assert len(device.compiler.compiled) == 3
    monkeypatch.setenv("BIRKHOFF_CACHE", "")
    run()
    assert len(device.compiler.compiled) == 4


@needs_compiler
def test_nothing_is_compiled_after_preparation(device: FakeDevice) -> None:
    layer = make_layer()
    weight = on_device(layer)
    weight.prepare(torch.float32, "high")
    prepared = list(device.compiler.compiled)
    for tokens in (1, 100, 1000):
        weight.linear(torch.randn(tokens, 200), None, "high")
    weight.decode()
    assert device.compiler.compiled == prepared == [Variant("shift", 4, "F32", 2, 80)]


@needs_compiler
def test_layers_on_the_device(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules take the way to the device where their codes are on it."""
    monkeypatch.setattr(ops, "linear", lambda *arguments: ops._linear_cuda(*arguments))
    monkeypatch.setattr("birkhoff.nn.coded._is_plain", lambda _: False)
    layer = make_layer()
    conv = HyperConv2d.from_conv2d(nn.Conv2d(3, 24, 4, 4))
    image = torch.randn(1, 3, 8, 12)
    with torch.inference_mode():
        x = torch.randn(2, 200)
        assert relative_error(layer(x), expected(layer, x)) < 1e-4
        reference = functional.conv2d(image, conv.weight, conv.bias, 4)
        assert relative_error(conv(image), reference) < 1e-4
    assert device.launches > 0


@pytest.mark.parametrize("codec", ["shift", "winding"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_decode_with_torch_operations_is_bit_identical(codec: str, bits: int) -> None:
    if codec == "winding" and bits < 4:
        pytest.skip("the codec has no such rate")
    dtypes: list[Dtype] = ["F32", "F16", "BF16"]
    for shape in ((1, 1), (70, 333), (16, 128)):
        weight = emulator.Weight(*shape, codec, bits)
        parameter = CodedParameter.from_matrix(weight.matrix)
        for dtype in dtypes:
            decoded = torch_decode.decode(
                *parameter.parts(), *shape, bits=bits, codec=codec, dtype=emulator.DTYPES[dtype]
            )
            assert torch.equal(decoded, weight.decoded(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(precision="highest")
    moved = make_layer(precision="highest").to("cuda")
    for dtype, tokens in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (1, 8, 9, 300, 1000)
    ):
        x = torch.randn(tokens, 200).to(dtype)
        with torch.inference_mode():
            y = moved(x.cuda()).cpu()
        assert relative_error(y, expected(layer, x)) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(moved.weight.cpu(), layer.weight)
