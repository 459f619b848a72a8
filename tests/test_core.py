"""The extension module: argument translation, zero-copy views, error types, threads."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from birkhoff import _core

Raw = NDArray[np.uint8]


def raw(array: NDArray[Any]) -> Raw:
    """The bytes of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the tests write their file; nothing else may be in its folder at the end."""
    return tmp_path / "model.safetensors"


LINEAR, BIAS, STEP = weights(40, 70), weights(40, seed=1), np.array(7, dtype=np.int64)


def write(path: Path, **options: Any) -> int:
    with _core.Writer(
        path,
        [
            ("coded", "linear.weight", "F32", (40, 70), 40, 70, 4, "shift"),
            ("stored", "linear.bias", "F32", (40,), "F16"),
            ("stored", "step", "I64", (), "I64"),
            ("tied", "head.weight", "F32", (40, 70), "linear.weight"),
        ],
        **options,
    ) as writer:
        arrays: dict[str, NDArray[Any]] = {
            "step": STEP,
            "linear.weight": LINEAR,
            "linear.bias": BIAS,
        }
        for name, array in arrays.items():
            writer.write(name, raw(array))
        return writer.finish()


@pytest.fixture
def file(path: Path) -> _core.File:
    write(path, settings='{"bits": 4}')
    return _core.File(path)


class TestHyperMatrix:
    @pytest.mark.parametrize("codec", ["shift", "winding"])
    def test_properties(self, codec: str) -> None:
        for bits in _core.rates(codec):
            matrix, _ = _core.encode(raw(LINEAR), "F32", 40, 70, bits=bits, codec=codec)
            assert (matrix.shape, matrix.bits, matrix.codec) == ((40, 70), bits, codec)
            assert matrix.codes.shape == (3, 3, bits * 64)
            assert matrix.row_scales.shape == (48,)
            assert matrix.group_exponents.shape == (3, 1, 8)
            assert matrix.nbytes == _core.coded_nbytes(40, 70, bits=bits, codec=codec)
            parts = (matrix.codes, matrix.row_scales, matrix.group_exponents)
            assert matrix.nbytes == sum(part.nbytes for part in parts)
            assert matrix.bits_per_weight == matrix.nbytes * 8 / (40 * 70)
            assert repr(matrix) == f"HyperMatrix(40 x 70, {codec}, {bits} bits)"

    def test_distortion_is_that_of_the_decoded_weights(self) -> None:
        matrix, distortion = _core.encode(raw(LINEAR), "F32", 40, 70)
        error = LINEAR.astype(np.float64) - matrix.decode()
        assert distortion.noise == pytest.approx(float((error**2).sum()))
        assert distortion.signal == pytest.approx(float((LINEAR.astype(np.float64) ** 2).sum()))
        assert distortion.max_error == pytest.approx(float(abs(error).max()))
        assert distortion.sqnr == pytest.approx(10 * np.log10(distortion.signal / distortion.noise))
        both = distortion + distortion
        assert both.noise == 2 * distortion.noise
        assert both.sqnr == pytest.approx(distortion.sqnr)
        assert _core.encode(raw(np.zeros(4, "f4")), "F32", 2, 2)[1].sqnr == float("inf")

    def test_least_squares_has_the_least_error(self) -> None:
        noise = {
            scale: _core.encode(raw(LINEAR), "F32", 40, 70, bits=2, scale=scale)[1].noise
            for scale in ("unbiased", "least-squares")
        }
        assert noise["least-squares"] < noise["unbiased"]

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("F64", torch.float64), ("F16", torch.float16), ("BF16", torch.bfloat16)],
    )
    def test_dtypes_are_read_as_float32(self, name: str, dtype: torch.dtype) -> None:
        tensor = torch.from_numpy(LINEAR).to(dtype)
        bytes_ = tensor.view(torch.uint8).reshape(-1).numpy()
        matrix, _ = _core.encode(bytes_, name, 40, 70)
        same, _ = _core.encode(raw(tensor.float().numpy()), "F32", 40, 70)
        assert np.array_equal(matrix.codes, same.codes)
        assert np.array_equal(matrix.decode(), same.decode())

    def test_parts_are_views_that_keep_the_matrix_alive(self) -> None:
        matrix, _ = _core.encode(raw(LINEAR), "F32", 40, 70)
        assert np.shares_memory(matrix.codes, matrix.codes)
        parts: list[NDArray[Any]] = [matrix.codes, matrix.row_scales, matrix.group_exponents]
        copies = [part.copy() for part in parts]
        del matrix
        for part, copied in zip(parts, copies, strict=True):
            assert np.array_equal(part, copied)
            with pytest.raises(ValueError, match="read-only"):
                part[...] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                part.setflags(write=True)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle(self, protocol: int) -> None:
        matrix, _ = _core.encode(raw(LINEAR), "F32", 40, 70, bits=8, codec="winding")
        for other in (pickle.loads(pickle.dumps(matrix, protocol)), copy.deepcopy(matrix)):
            assert repr(other) == repr(matrix)
            assert np.array_equal(other.decode(), matrix.decode())

    def test_parts_by_hand_are_copied(self) -> None:
        matrix, _ = _core.encode(raw(LINEAR), "F32", 40, 70)
        codes = matrix.codes.copy()
        other = _core.HyperMatrix(
            codes, matrix.row_scales, matrix.group_exponents, (40, 70), bits=4
        )
        codes[...] = 0
        assert np.array_equal(other.decode(), matrix.decode())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shape": (40, 97)}, "codes of a 40 x 97 matrix at 4 bits take 3072 bytes, not 2304"),
            ({"shape": (400, 70)}, "codes of a 400 x 70 matrix at 4 bits take"),
            ({"bits": 5}, "codes"),
            ({"bits": 7}, 'codec "shift" has no 7-bit rate; choose 2, 3'),
            ({"codec": "zip"}, 'no codec "zip"'),
            ({"shape": (1 << 40, 1 << 40)}, "does not fit in memory"),
            ({"codes": np.zeros((8, 2304), np.uint8)[:, ::2]}, "C-contiguous"),
        ],
    )
    def test_wrong_parts(self, change: dict[str, Any], message: str) -> None:
        matrix, _ = _core.encode(raw(LINEAR), "F32", 40, 70)
        arguments: dict[str, Any] = {
            "codes": matrix.codes,
            "row_scales": matrix.row_scales,
            "group_exponents": matrix.group_exponents,
            "shape": (40, 70),
            "bits": 4,
            **change,
        }
        with pytest.raises(ValueError, match=message):
            _core.HyperMatrix(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((raw(LINEAR), "F32", 40, 71), {}, "2840 weights, not 2800"),
            ((raw(LINEAR)[:-1], "F32", 40, 70), {}, "no whole number of F32"),
            ((raw(LINEAR), "I32", 40, 70), {}, "cannot encode dtype I32"),
            ((raw(LINEAR), "F32", 40, 70), {"scale": "best"}, "choose .*least-squares"),
            ((raw(LINEAR)[::4], "F32", 10, 70), {}, "data must be C-contiguous"),
            ((raw(np.full(9, np.nan, "f4")), "F32", 3, 3), {}, "9 of 9 weights are NaN"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: tuple[Raw, str, int, int], options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            _core.encode(*arguments, **options)

    def test_wrong_types(self) -> None:
        with pytest.raises(TypeError):
            _core.encode(LINEAR, "F32", 40, 70)  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            _core.encode(raw(LINEAR), "F32", -40, -70)

    @given(st.integers(0, 40), st.integers(0, 300), st.sampled_from([2, 3, 4, 5, 6, 8]))
    @settings(deadline=None, max_examples=40)
    def test_any_shape(self, rows: int, cols: int, bits: int) -> None:
        matrix, _ = _core.encode(raw(weights(rows, cols)), "F32", rows, cols, bits=bits)
        decoded = matrix.decode()
        assert decoded.shape == (rows, cols)
        assert decoded.dtype == np.float32


class TestFile:
    def test_entries(self, file: _core.File, path: Path) -> None:
        assert (file.path, file.compressed, file.nbytes) == (str(path), True, path.stat().st_size)
        assert json.loads(file.settings) == {"bits": 4}
        assert file.metadata["format"] == "pt"
        linear, bias, step, head = file.entries()
        assert (linear.name, linear.dtype, linear.shape) == ("linear.weight", "F32", (40, 70))
        assert (linear.coding, linear.bits, linear.codec) == ("coded", 4, "shift")
        assert (linear.matrix_shape, linear.stored_dtype) == ((40, 70), None)
        assert linear.nbytes == _core.coded_nbytes(40, 70, bits=4)
        assert linear.original_nbytes == LINEAR.nbytes
        assert (bias.coding, bias.dtype, bias.stored_dtype) == ("stored", "F32", "F16")
        assert (bias.nbytes, bias.original_nbytes, bias.bits) == (80, 160, None)
        assert (step.dtype, step.shape, step.stored_dtype) == ("I64", (), "I64")
        assert (head.coding, head.tied_to, head.nbytes) == ("tied", "linear.weight", 0)

    def test_tensors(self, file: _core.File) -> None:
        matrix, distortion = _core.encode(raw(LINEAR), "F32", 40, 70)
        assert np.array_equal(file.matrix("head.weight").codes, matrix.codes)
        assert np.array_equal(file.float32("head.weight"), matrix.decode())
        assert np.array_equal(file.raw("linear.bias").view("f2"), BIAS.astype("f2"))
        assert np.array_equal(file.float32("linear.bias"), BIAS.astype("f2").astype("f4"))
        assert file.raw("step").view(np.int64)[0] == 7
        assert file.compare("linear.weight", raw(LINEAR), "F32").noise == distortion.noise
        assert file.compare("step", raw(STEP), "I64").sqnr == float("inf")
        for entry in file.entries():
            file.check(entry.name)

    def test_views_share_the_map_and_outlive_file_and_name(
        self, file: _core.File, path: Path
    ) -> None:
        assert np.shares_memory(file.raw("linear.bias"), file.raw("linear.bias"))
        matrix = file.matrix("linear.weight")
        assert np.shares_memory(matrix.codes, file.matrix("linear.weight").codes)
        assert matrix.codes.ctypes.data % 64 == 0
        bias, decoded = file.raw("linear.bias"), matrix.decode()
        del file
        path.unlink()
        assert np.array_equal(bias.view("f2"), BIAS.astype("f2"))
        assert np.array_equal(matrix.decode(), decoded)
        with pytest.raises(ValueError, match="read-only"):
            bias[0] = 1

    def test_safetensors_and_torch_read_the_file(self, file: _core.File) -> None:
        with safe_open(file.path, "pt") as other:
            assert other.metadata() == file.metadata
            codes = other.get_tensor("linear.weight.codes")
            scales = other.get_tensor("linear.weight.row_scales")
        matrix = file.matrix("linear.weight")
        assert np.array_equal(codes.numpy(), matrix.codes)
        assert scales.dtype == torch.bfloat16
        assert np.array_equal(scales.view(torch.uint16).numpy(), matrix.row_scales)

    def test_a_plain_file_is_read(self, path: Path) -> None:
        save_file({"a": LINEAR, "b": np.ones(3, np.bool_)}, path)
        file = _core.File(path)
        assert (file.compressed, file.settings, file.metadata) == (False, "{}", {})
        assert {entry.name: entry.coding for entry in file.entries()} == {
            "a": "stored",
            "b": "stored",
        }
        assert np.array_equal(file.float32("a"), LINEAR)
        with pytest.raises(_core.FormatError, match="not a compressed file"):
            file.decompress(path.with_name("out"))

    def test_decompress(self, file: _core.File, path: Path) -> None:
        out, seen = path.with_name("out.safetensors"), list[str]()
        assert file.decompress(out, progress=seen.append) == out.stat().st_size
        assert seen == [entry.name for entry in file.entries()]
        plain = load_file(out)
        assert set(plain) == set(seen)
        assert np.array_equal(plain["head.weight"], file.float32("linear.weight"))
        assert np.array_equal(plain["linear.bias"], BIAS.astype("f2").astype("f4"))
        assert plain["step"].shape == ()
        with pytest.raises(FileExistsError):
            file.decompress(out)
        file.decompress(out, overwrite=True)

    def test_an_error_in_progress_stops_and_cleans_up(self, file: _core.File, path: Path) -> None:
        def stop(name: str) -> None:
            raise KeyboardInterrupt(name)

        with pytest.raises(KeyboardInterrupt, match=r"linear\.weight"):
            file.decompress(path.with_name("out"), progress=stop)
        assert list(path.parent.iterdir()) == [path]

    def test_wrong_requests(self, file: _core.File) -> None:
        calls: list[tuple[Callable[[], object], str]] = [
            (lambda: file.raw("nothing"), "nothing"),
            (lambda: file.raw("linear.weight"), "coded"),
            (lambda: file.matrix("step"), "not coded"),
            (lambda: file.float32("step"), "I64"),
            (lambda: file.compare("step", raw(STEP + 1), "I64"), "differ"),
            (lambda: file.compare("linear.weight", raw(BIAS), "F32"), "160 bytes of F32"),
            (lambda: file.compare("linear.weight", raw(LINEAR), "I32"), "of I32"),
        ]
        for call, message in calls:
            with pytest.raises(_core.FormatError, match=message):
                call()
        with pytest.raises(ValueError, match="Q4"):
            file.compare("step", raw(STEP), "Q4")

    def test_error_classes(self, tmp_path: Path, path: Path) -> None:
        assert issubclass(_core.FormatError, _core.BirkhoffError)
        assert issubclass(_core.FormatError, ValueError)
        assert pickle.loads(pickle.dumps(_core.FormatError("x"))).args == ("x",)
        with pytest.raises(FileNotFoundError) as missing:
            _core.File(path)
        assert missing.value.filename == str(path)
        with pytest.raises(IsADirectoryError):
            _core.File(tmp_path)
        path.write_bytes(b"PK\x03\x04 not a safetensors file")
        with pytest.raises(_core.FormatError, match="not a safetensors file"):
            _core.File(path)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(_core.FormatError, match="not a regular file"):
            _core.File(tmp_path / "fifo")

    def test_damage_is_named(self, file: _core.File, path: Path) -> None:
        contents = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(contents[:8], "little")
        contents[start] ^= 1
        path.with_name("damaged").write_bytes(contents)
        damaged = _core.File(path.with_name("damaged"))
        damaged.check("linear.bias")
        for call in (
            lambda: damaged.check("linear.weight"),
            lambda: damaged.check("head.weight"),
            lambda: damaged.decompress(path.with_name("out")),
        ):
            with pytest.raises(_core.FormatError, match=r"linear\.weight\.codes.*checksum"):
                call()
        assert not path.with_name("out").exists()


class TestManifest:
    def test_data_of_other_lengths_and_wrong_settings(self) -> None:
        plan = [("stored", "a", "F32", (3,), "F16")]
        six, five = np.zeros(6, np.uint8), np.zeros(5, np.uint8)
        manifest = json.loads(_core.manifest(plan, [[six]], settings='{"bits": 4}'))  # type: ignore[arg-type]
        assert manifest["settings"] == {"bits": 4}
        assert manifest["tensors"][0]["name"] == "a"
        wrong: list[list[list[Any]]] = [[[five]], [[]], [[six, six]]]
        for data in wrong:
            with pytest.raises(_core.FormatError, match="6"):
                _core.manifest(plan, data)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="1 items, but data of 2"):
            _core.manifest(plan, [[six], [six]])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="JSON object"):
            _core.manifest([], [], settings="[]")


class TestWriter:
    def test_leaving_without_finish_leaves_nothing(self, path: Path) -> None:
        with pytest.raises(RuntimeError, match="stop"), _core.Writer(path, []):
            raise RuntimeError("stop")
        assert list(path.parent.iterdir()) == []

    def test_an_existing_file_is_kept(self, path: Path) -> None:
        path.write_text("precious")
        with pytest.raises(FileExistsError, match="exists already"):
            write(path)
        assert path.read_text() == "precious"
        assert write(path, overwrite=True) == path.stat().st_size

    def test_the_file_gets_ordinary_permissions(self, path: Path) -> None:
        write(path)
        plain = path.with_name("plain")
        plain.touch()
        assert path.stat().st_mode == plain.stat().st_mode

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_devices_are_not_replaced(self) -> None:
        with pytest.raises(OSError, match="not a regular file"):
            _core.Writer("/dev/full", [], overwrite=True)

    def test_a_full_disk_is_an_error_and_leaves_nothing(self, path: Path) -> None:
        # A limit on the size of files stands in for a full disk: both fail in the same call.
        script = f"""
import resource, signal
import numpy as np
from birkhoff import _core
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
data = np.zeros(1_000_000, np.uint8)
try:
    with _core.Writer({str(path)!r}, [("stored", "a", "U8", (1_000_000,), "U8")]) as writer:
        writer.write("a", data)
except OSError as error:
    print(type(error).__name__, error)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert "File too large" in done.stdout
        assert path.name in done.stdout
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            ([("coded", "a", "F32", (2, 3), 3, 3, 4, "shift")], "no matrix of 3 x 3"),
            ([("coded", "a", "F32", (2, 3), 2, 3, 4)], "expected tuple of length 8"),
            ([("coded", "a", "I32", (2, 3), 2, 3, 4, "shift")], "I32 tensors cannot be coded"),
            ([("coded", "a", "F32", (2, 3), 2, 3, 3, "winding")], "no 3-bit rate"),
            ([("stored", "a", "F32", (2, -3), "F32")], "negative"),
            ([("stored", "a", "Q4", (2, 3), "F32")], "Q4"),
            ([("tied", "a", "F32", (2, 3), "b")], 'tied to "b", which does not exist'),
            ([("zipped", "a")], "neither coded, stored nor tied"),
            ([()], "malformed"),
        ],
    )
    def test_impossible_plans(self, path: Path, plan: list[Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _core.Writer(path, plan)
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("text", ["", "[]", "{", "1"])
    def test_settings_must_be_an_object(self, path: Path, text: str) -> None:
        with pytest.raises(ValueError, match="settings are no JSON object"):
            _core.Writer(path, [], settings=text)

    def test_wrong_data(self, path: Path) -> None:
        plan = [
            ("coded", "a", "F32", (2, 3), 2, 3, 4, "shift"),
            ("stored", "b", "F32", (2,), "F16"),
        ]
        with _core.Writer(path, plan) as writer:  # type: ignore[arg-type]
            for name, array, message in [
                ("a", np.full((2, 3), np.nan, "f4"), '"a": 6 of 6 weights are NaN.*--skip'),
                ("a", np.zeros(5, "f4"), "24 bytes, not 20"),
                ("b", np.full(2, 1e6, "f4"), "2 of 2 values are too large for F16"),
                ("c", np.zeros(1, "f4"), "not in the plan"),
            ]:
                with pytest.raises(_core.FormatError, match=message):
                    writer.write(name, raw(array))
            with pytest.raises(_core.FormatError, match="2 tensors were not written"):
                writer.finish()
            with pytest.raises(ValueError, match="finished"):
                writer.write("b", raw(np.zeros(2, "f4")))
            with pytest.raises(ValueError, match="finished"):
                writer.finish()
        assert list(path.parent.iterdir()) == []

    def test_threads_may_write_at_once(self, path: Path) -> None:
        names = [f"layer{i}" for i in range(16)]
        arrays = {name: weights(64, 256, seed=i) for i, name in enumerate(names)}
        plan = [("coded", name, "F32", (64, 256), 64, 256, 4, "shift") for name in names]
        with ThreadPoolExecutor(8) as pool, _core.Writer(path, plan) as writer:  # type: ignore[arg-type]
            list(pool.map(lambda name: writer.write(name, raw(arrays[name])), names))
            writer.finish()
        file = _core.File(path)
        for name in names:
            file.check(name)
            expected, _ = _core.encode(raw(arrays[name]), "F32", 64, 256)
            assert np.array_equal(file.matrix(name).codes, expected.codes)

    def test_coded_tensors_are_written_as_they_are(self, path: Path) -> None:
        array = weights(70, 300)
        matrix, _ = _core.encode(raw(array), "F32", 70, 300)
        parts = (raw(matrix.codes), raw(matrix.row_scales), raw(matrix.group_exponents))
        plan = [
            ("coded", "a", "F32", (70, 300), 70, 300, 4, "shift"),
            ("coded", "b", "F32", (70, 300), 70, 300, 4, "shift"),
            ("stored", "c", "U8", (4,), "U8"),
        ]
        with _core.Writer(path, plan) as writer:  # type: ignore[arg-type]
            with pytest.raises(_core.FormatError, match=r'"a".* bytes'):
                writer.write_coded("a", parts[0][:-1], parts[1], parts[2])
            writer.write_coded("a", *parts)
            with pytest.raises(_core.FormatError, match=r'"a".*before'):
                writer.write_coded("a", *parts)
            with pytest.raises(_core.FormatError, match=r'"c".*coded'):
                writer.write_coded("c", *parts)
            writer.write("b", raw(array))
            writer.write("c", np.zeros(4, np.uint8))
            writer.finish()
        file = _core.File(path)
        for name in "abc":
            file.check(name)
        assert np.array_equal(file.matrix("a").codes, file.matrix("b").codes)
        assert np.array_equal(file.float32("a"), matrix.decode())


class TestEnvironment:
    def test_isas(self) -> None:
        assert _core.available_isas()[0] == "portable"
        assert _core.isa() in _core.available_isas()

    def test_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BIRKHOFF_NUM_THREADS", raising=False)
        before = _core.get_num_threads()
        try:
            _core.set_num_threads(3)
            assert _core.get_num_threads() == 3
            monkeypatch.setenv("BIRKHOFF_NUM_THREADS", "2")
            assert _core.get_num_threads() == _core.default_threads() == 2
            monkeypatch.setenv("BIRKHOFF_NUM_THREADS", "many")
            with pytest.raises(ValueError, match="BIRKHOFF_NUM_THREADS"):
                _core.encode(raw(LINEAR), "F32", 40, 70)
        finally:
            _core.set_num_threads(before)
        for threads in (0, 1025):
            with pytest.raises(ValueError, match="1 to 1024"):
                _core.set_num_threads(threads)

    def test_results_do_not_depend_on_isa_or_threads(self) -> None:
        script = """
import hashlib, numpy as np
from birkhoff import _core
w = np.random.default_rng(0).standard_normal((100, 300), dtype=np.float32)
digest = hashlib.sha256()
for bits in (2, 4, 8):
    matrix, _ = _core.encode(w.reshape(-1).view(np.uint8), "F32", 100, 300, bits=bits)
    for part in (matrix.codes, matrix.row_scales, matrix.group_exponents, matrix.decode()):
        digest.update(part.tobytes())
print(digest.hexdigest())
"""
        digests = {
            subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, "BIRKHOFF_ISA": isa, "BIRKHOFF_NUM_THREADS": threads},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for isa in _core.available_isas()
            for threads in ("1", "3")
        }
        assert len(digests) == 1

    def test_an_unknown_isa_is_refused(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "from birkhoff import _core; _core.isa()"],
            env={**os.environ, "BIRKHOFF_ISA": "sse9"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "ValueError: environment variable BIRKHOFF_ISA" in done.stderr

    def test_the_gil_is_released(self) -> None:
        """While one thread encodes, another one runs Python code."""
        data = raw(weights(512, 4096))
        stop, count = threading.Event(), 0

        def run() -> None:
            nonlocal count
            while not stop.is_set():
                count += 1
                time.sleep(0)  # gives up the GIL

        thread = threading.Thread(target=run)
        thread.start()
        interval = sys.getswitchinterval()
        try:
            # The clock makes nobody give up the GIL.
            sys.setswitchinterval(1000)
            before = count
            _core.encode(data, "F32", 512, 4096)
            assert count > before
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            thread.join()
