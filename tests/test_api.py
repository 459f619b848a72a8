"""``birkhoff.encode`` and what the package does when it is imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import birkhoff
from birkhoff import _core
from conftest import sqnr

RATES = [(codec, bits) for codec in ("shift", "winding") for bits in _core.rates(codec)]
#: At least this SQNR in dB on Gaussian weights, by bits a weight.
GAUSSIAN_SQNR = {
    "shift": {2: 10.5, 3: 17.0, 4: 23.0, 5: 28.8, 6: 34.2, 8: 43.0},
    "winding": {4: 19.8, 5: 25.5, 6: 31.0, 8: 43.0},
}


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_gaussian_weights_keep_the_sqnr_of_their_rate(codec: str, bits: int) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    matrix = birkhoff.encode(weights, bits=bits, codec=codec)
    assert matrix.shape == (64, 512)
    assert matrix.bits == bits
    assert matrix.codec == codec
    assert bits < matrix.bits_per_weight <= bits + 0.07
    assert matrix.nbytes == _core.coded_nbytes(64, 512, bits=bits, codec=codec)
    assert sqnr(weights, matrix.decode()) > GAUSSIAN_SQNR[codec][bits]


weights_strategy = hnp.arrays(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    shape=hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70),
    elements=st.floats(-1000, 1000, width=16),
)


@settings(max_examples=80, deadline=None)
@given(
    weights=weights_strategy,
    rate=st.sampled_from(RATES),
    scale=st.sampled_from(["unbiased", "least-squares"]),
)
def test_any_matrix_round_trips(weights: NDArray[Any], rate: tuple[str, int], scale: Any) -> None:
    codec, bits = rate
    matrix = birkhoff.encode(weights, bits=bits, codec=codec, scale=scale)
    decoded = matrix.decode()
    assert decoded.dtype == np.float32
    assert decoded.shape == weights.shape == matrix.shape
    assert np.isfinite(decoded).all()
    # Zero rows stay zero, and no weight leaves the range of its row by much.
    largest = np.abs(weights.astype(np.float64)).max(axis=1, initial=0)
    assert (np.abs(decoded).max(axis=1, initial=0) <= 4 * largest).all()
    rebuilt = _core.HyperMatrix(
        matrix.codes,
        matrix.row_scales,
        matrix.group_exponents,
        matrix.shape,
        bits=bits,
        codec=codec,
    )
    np.testing.assert_array_equal(rebuilt.decode(), decoded)


@settings(max_examples=40, deadline=None)
@given(weights=weights_strategy, data=st.data())
def test_strides_and_byte_order_do_not_matter(weights: NDArray[Any], data: st.DataObject) -> None:
    view = data.draw(
        st.sampled_from(
            [weights.T, weights[::-1], weights[:, ::2], weights[1:, 1:], np.asfortranarray(weights)]
        )
    )
    expected = birkhoff.encode(np.ascontiguousarray(view)).decode()
    np.testing.assert_array_equal(birkhoff.encode(view).decode(), expected)
    swapped = view.astype(view.dtype.newbyteorder(">"))
    np.testing.assert_array_equal(birkhoff.encode(swapped).decode(), expected)


@pytest.mark.parametrize("codec", ["shift", "winding"])
@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((40, 100), np.float32),
        np.full((40, 100), 0.5, np.float32),
        np.full((1, 1), -2.0, np.float32),
        np.full((20, 40), 1e-40, np.float32),
        np.full((20, 40), 1e-10, np.float32),
        np.full((20, 40), 3e38, np.float32),
    ],
    ids=["zeros", "constant", "one element", "subnormal", "tiny", "huge"],
)
def test_unusual_matrices_survive(weights: NDArray[np.float32], codec: str) -> None:
    decoded = birkhoff.encode(weights, bits=4, codec=codec).decode()
    assert np.isfinite(decoded).all()
    error = np.abs(decoded.astype(np.float64) - weights).max()
    # Rows of weights below 1e-33 are stored as zeros.
    assert error <= max(0.5 * np.abs(weights).max(), 1e-33)


def test_a_zero_row_stays_zero_beside_others() -> None:
    weights = np.random.default_rng(2).standard_normal((48, 96)).astype(np.float32)
    weights[7] = 0
    assert not birkhoff.encode(weights).decode()[7].any()


def test_torch_tensors_encode_as_their_arrays() -> None:
    torch = pytest.importorskip("torch")
    weights = np.random.default_rng(3).standard_normal((32, 64)).astype(np.float32)
    tensor = torch.from_numpy(weights)
    for view in (tensor, tensor.double(), torch.nn.Parameter(tensor), tensor.T.contiguous().T):
        np.testing.assert_array_equal(
            birkhoff.encode(view).decode(), birkhoff.encode(weights).decode()
        )
    rounded = tensor.bfloat16()
    np.testing.assert_array_equal(
        birkhoff.encode(rounded).decode(), birkhoff.encode(rounded.float().numpy()).decode()
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), r"2 dimensions, not shape \(3,\)"),
        (np.zeros((2, 2, 2), np.float32), r"not shape \(2, 2, 2\)"),
        (np.zeros((2, 2), np.int32), "not int32"),
        (np.zeros((2, 2), np.complex64), "not complex64"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, -np.inf]]), "infinite"),
        (np.array([[1e300]]), "weights"),
    ],
)
def test_arrays_that_cannot_be_encoded_are_refused(array: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        birkhoff.encode(array)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(TypeError, match="not list"):
        birkhoff.encode([[1.0]])  # type: ignore[arg-type]


def test_a_meta_tensor_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="not on meta"):
        birkhoff.encode(torch.empty(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "7"),
        ({"bits": 2, "codec": "winding"}, "winding"),
        ({"codec": "zigzag"}, "zigzag"),
        ({"scale": "biased"}, "biased"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        birkhoff.encode(np.ones((2, 2)), **options)


def test_damaged_parts_are_refused() -> None:
    matrix = birkhoff.encode(np.ones((4, 4)))
    with pytest.raises(ValueError, match="codes"):
        _core.HyperMatrix(
            matrix.codes[:-1], matrix.row_scales, matrix.group_exponents, (4, 4), bits=4
        )


DIGEST = """
import hashlib, numpy, birkhoff
weights = numpy.random.default_rng(4).standard_t(4, (100, 300)).astype("f4")
digest = hashlib.sha256()
for codec, bits in {rates}:
    matrix = birkhoff.encode(weights, bits=bits, codec=codec)
    for part in (matrix.codes, matrix.row_scales, matrix.group_exponents, matrix.decode()):
        digest.update(part.tobytes())
print(digest.hexdigest())
"""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_codes_are_the_same_for_every_thread_count_and_instruction_set() -> None:
    code = DIGEST.format(rates=RATES)
    digests = {
        run_python(code, BIRKHOFF_ISA=isa, BIRKHOFF_NUM_THREADS=threads)
        for isa, threads in [
            *((isa, "1") for isa in _core.available_isas()),
            ("auto", "2"),
            ("auto", "5"),
        ]
    }
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest()}


def test_importing_birkhoff_imports_neither_torch_nor_the_terminal_libraries() -> None:
    code = (
        "import sys, birkhoff; print([m for m in ('torch', 'typer', 'rich') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_threads_can_be_set() -> None:
    threads = birkhoff.get_num_threads()
    try:
        birkhoff.set_num_threads(1)
        assert birkhoff.get_num_threads() == 1
        with pytest.raises(ValueError, match="0"):
            birkhoff.set_num_threads(0)
    finally:
        birkhoff.set_num_threads(threads)
