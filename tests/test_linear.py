"""HyperLinear on the CPU: numpy, the torch operator and the module."""

import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import birkhoff
from birkhoff import _core
from birkhoff.nn import HyperLinear

PRECISIONS = ["highest", "high", "medium"]
#: Largest relative L2 error on Gaussian tokens, against float64 with the decoded weight.
TOLERANCE = {"highest": 1e-6, "high": 1e-4, "medium": 1.2e-2}
#: What rounding the output to the dtype adds.
ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_layer(
    in_features: int = 200, out_features: int = 70, bits: int = 4, **options: Any
) -> HyperLinear:
    torch.manual_seed(in_features * out_features + bits)
    linear = nn.Linear(in_features, out_features)
    return HyperLinear.from_linear(linear, bits=bits, **options)


def expected(layer: HyperLinear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    in_features=st.integers(1, 300) | st.sampled_from([128, 256, 512]),
    out_features=st.integers(1, 80),
    lead=st.lists(st.integers(0, 5), max_size=3),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    precision=st.sampled_from(PRECISIONS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    stride=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_product_is_that_of_the_decoded_weight(
    in_features: int,
    out_features: int,
    lead: list[int],
    bits: int,
    precision: Any,
    dtype: torch.dtype,
    stride: int,
    seed: int,
) -> None:
    layer = make_layer(in_features, out_features, bits, precision=precision)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((*lead, stride * in_features), generator=generator)[..., ::stride].to(dtype)
    with torch.inference_mode():
        y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (*lead, out_features)
    reference = expected(layer, x)
    # Beside a typical output: one alone may happen to be next to nothing.
    typical = float(x.double().norm() * layer.weight.double().norm()) / in_features**0.5
    # Few inputs have no typical token: one large value sets the step of the others.
    tolerance = TOLERANCE[precision] * (1 if in_features >= 64 else 4)
    # The bound is one of the root mean square; few outputs scatter round it.
    tolerance *= 1 + 4 / max(y.numel(), 1) ** 0.5
    rounding = ROUNDING[dtype] * float(reference.norm())
    assert float((y.double() - reference).norm()) <= tolerance * typical + rounding + 1e-30


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 100, 1500])
def test_every_number_of_tokens_gives_each_token_the_same(rows: int) -> None:
    layer = make_layer(256, 96)
    x = torch.randn(1500, 256)
    with torch.inference_mode():
        assert torch.equal(layer(x[:rows]), layer(x)[:rows])


def test_numpy_and_torch_agree() -> None:
    layer = make_layer()
    x = torch.randn(5, 200)
    weight = birkhoff.encode(nn.Linear(200, 70).weight)
    layer = HyperLinear(weight, torch.randn(70))
    assert layer.bias is not None
    with torch.inference_mode():
        y = layer(x).numpy()
    np.testing.assert_array_equal(weight.linear(x.numpy(), layer.bias.numpy()), y)


@pytest.mark.parametrize(
    ("x", "bias", "precision", "words"),
    [
        (np.zeros((3, 5), np.float32), None, "high", ["(70, 200)", "[3, 5]"]),
        (np.zeros((3, 200)), None, "high", ["float64", "float32"]),
        (np.zeros((3, 200), np.float32), np.zeros(3), "high", ["70 x 200", "3 values"]),
        (np.zeros((3, 200), np.float32), None, "best", ["best", "highest"]),
    ],
)
def test_numpy_arguments_that_do_not_fit(
    x: Any, bias: Any, precision: str, words: list[str]
) -> None:
    weight = birkhoff.encode(np.ones((70, 200), np.float32))
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        weight.linear(x, bias, precision)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 5), ValueError, ["(3, 5)", "(70, 200)"]),
        (torch.zeros(()), ValueError, ["()", "(70, 200)"]),
        (torch.zeros(3, 200, dtype=torch.float64), TypeError, ["float64", "float32"]),
        (torch.zeros(3, 200, dtype=torch.int64), TypeError, ["int64"]),
        (torch.zeros(3, 200, device="meta"), ValueError, ["meta", "CPU"]),
        (torch.zeros(3, 200, requires_grad=True), RuntimeError, ["inference", "no_grad"]),
    ],
)
def test_tensors_that_do_not_fit(x: Tensor, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        make_layer()(x)
    assert all(word in str(raised.value) for word in words), raised.value


def test_bias_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(70, 200\)"):
        HyperLinear(birkhoff.encode(np.ones((70, 200), np.float32)), torch.zeros(3))


def test_parts_that_do_not_fit() -> None:
    layer = make_layer()
    codes, row_scales, group_exponents = layer.coded_weight.parts()
    arguments = (70, 200, 4, "shift", "high")
    linear = torch.ops.birkhoff.linear
    with pytest.raises(ValueError, match="codes"):
        linear(torch.zeros(1, 200), codes[1:], row_scales, group_exponents, None, *arguments)
    with pytest.raises(ValueError, match="row_scales"):
        linear(torch.zeros(1, 200), codes, row_scales.float(), group_exponents, None, *arguments)


def test_tokens_that_are_not_finite_spoil_only_themselves() -> None:
    layer = make_layer()
    x = torch.randn(12, 200)
    with torch.inference_mode():
        clean = layer(x)
        x[3, 7], x[5, 0], x[11, 199] = float("nan"), float("inf"), float("-inf")
        y = layer(x)
    spoiled = torch.tensor([3, 5, 11])
    kept = torch.tensor([i for i in range(12) if i not in spoiled.tolist()])
    assert y[spoiled].isnan().all()
    assert torch.equal(y[kept], clean[kept])


def test_a_hundred_thousand_tokens() -> None:
    layer = make_layer(40, 20)
    x = torch.randn(100_000, 40)
    with torch.inference_mode():
        y = layer(x)
        assert torch.equal(y[-3:], layer(x[-3:]))
    assert relative_error(y, expected(layer, x)) < 1e-4


THREADS = """
import pathlib, sys, time, torch
from torch import nn
from birkhoff.nn import HyperLinear

def ours():
    time.sleep(0.5)  # a new thread names itself
    names = (task / "comm" for task in pathlib.Path("/proc/self/task").iterdir())
    return sum(name.read_text().startswith("birkhoff") for name in names)

layer = HyperLinear.from_linear(nn.Linear(256, 256))
before = ours()
torch.set_num_threads(int(sys.argv[1]))
with torch.inference_mode():
    layer(torch.randn(2000, 256))
print(ours() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("torch_threads", "variable", "started"), [("1", None, 0), ("3", None, 2), ("3", "1", 0)]
)
def test_as_many_threads_as_torch_unless_the_variable_says(
    torch_threads: str, variable: str | None, started: int
) -> None:
    # Encoding has a pool of its own, started before.
    environment = dict(os.environ)
    environment.pop("BIRKHOFF_NUM_THREADS", None)
    if variable is not None:
        environment["BIRKHOFF_NUM_THREADS"] = variable
    command = [sys.executable, "-c", THREADS, torch_threads]
    assert int(subprocess.check_output(command, env=environment, text=True)) == started


def test_token_of_zeros_gives_the_bias() -> None:
    layer = make_layer()
    assert layer.bias is not None
    for precision in PRECISIONS:
        layer.precision = precision  # type: ignore[assignment]
        assert torch.equal(layer(torch.zeros(1, 200))[0], layer.bias)


def test_operator_passes_opcheck() -> None:
    layer = make_layer()
    parts, tail = layer.coded_weight.parts(), (70, 200, 4, "shift", "high")
    for x in (torch.randn(3, 200), torch.randn(2, 3, 200), torch.zeros(0, 200)):
        for bias in (None, torch.randn(70)):
            torch.library.opcheck(torch.ops.birkhoff.linear.default, (x, *parts, bias, *tail))


@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph() -> None:
    layer = make_layer()
    model = nn.Sequential(layer, nn.GELU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (1, 5, 12):
            x = torch.randn(rows, 200)
            torch.testing.assert_close(compiled(x), model(x))


def test_module_passes_through_copies_and_state() -> None:
    layer = make_layer()
    x = torch.randn(4, 200)
    with torch.inference_mode():
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        other = HyperLinear.from_linear(nn.Linear(200, 70))
        other(x)  # what it has prepared is of the old state
        other.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(other(x), y)
        other.load_state_dict(make_layer(200, 70, 4).state_dict(), assign=True)
        assert torch.equal(other(x), y)
    assert set(layer.state_dict()) == {
        "bias",
        "weight.codes",
        "weight.row_scales",
        "weight.group_exponents",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_changing_the_dtype_leaves_the_codes(dtype: torch.dtype) -> None:
    layer = make_layer()
    weight = layer.weight
    converted = layer.to(dtype)
    assert torch.equal(converted.weight, weight.to(dtype))
    assert converted.bias is not None
    assert converted.bias.dtype == dtype
    with torch.inference_mode():
        assert converted(torch.randn(3, 200, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_its_dtype(dtype: torch.dtype) -> None:
    layer = make_layer()
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        assert layer(torch.randn(3, 200)).dtype == dtype


def test_sharing_memory_moves_what_is_multiplied_with() -> None:
    layer = make_layer()
    x = torch.randn(3, 200)
    with torch.inference_mode():
        y = layer(x)
        layer.share_memory()
        assert torch.equal(layer(x), y)


def test_precision_per_process_module_and_call() -> None:
    layer = make_layer()
    x = torch.randn(3, 200)
    reference = expected(layer, x)
    assert birkhoff.get_precision() == "high"
    try:
        with torch.inference_mode():
            birkhoff.set_precision("medium")
            assert relative_error(layer(x), reference) > 1e-3
            layer.precision = "highest"
            assert relative_error(layer(x), reference) < 1e-6
    finally:
        birkhoff.set_precision("high")
    with pytest.raises(ValueError, match="best"):
        birkhoff.set_precision("best")  # type: ignore[arg-type]


def test_threads_agree_with_one_another() -> None:
    layer = make_layer(512, 640)
    inputs = [torch.randn(rows, 512) for rows in (1, 3, 17, 65, 300, 8, 2, 1100)]
    with torch.inference_mode():
        alone = [layer(x) for x in inputs]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(layer(inputs[i]), alone[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


OUTPUTS = """
import hashlib, sys, torch, birkhoff
from torch import nn
from birkhoff.nn import HyperLinear
digest = hashlib.sha256()
for bits in (2, 3, 4, 5, 6, 8):
    for precision in ("high", "medium"):
        generator = torch.Generator().manual_seed(bits)
        linear = nn.Linear(300, 100)
        weight = torch.randn(100, 300, generator=generator)
        bias = torch.randn(100, generator=generator)
        layer = HyperLinear(birkhoff.encode(weight, bits=bits), bias, precision)
        for rows in (1, 2, 5, 8, 9, 50, 1100):
            x = torch.randn(rows, 300, generator=generator)
            with torch.inference_mode():
                digest.update(layer(x).numpy().tobytes())
print(digest.hexdigest())
"""


def test_outputs_are_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    digests = set()
    for isa in _core.available_isas():
        for threads in ("1", "2", "3"):
            environment = {"BIRKHOFF_ISA": isa, "BIRKHOFF_NUM_THREADS": threads}
            digests.add(
                subprocess.check_output(
                    [sys.executable, "-c", OUTPUTS],
                    env=os.environ | environment,
                    text=True,
                )
            )
    assert len(digests) == 1
