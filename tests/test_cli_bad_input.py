"""Bad input: one clear sentence, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conftest import Arrays, Run

Refused = Callable[..., str]

GOOD = (0.02 * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.fixture
def compressed(birkhoff: Run, model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "compressed.safetensors"
    done = birkhoff("compress", model, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("command", ["compress", "inspect", "decompress", "verify"])
@pytest.mark.parametrize("size", [0, 4, 8, 9, 100, -1])
def test_truncated_files(
    refused: Refused, compressed: Path, model: Path, output: Path, command: str, size: int
) -> None:
    path = model if command == "compress" else compressed
    path.write_bytes(path.read_bytes()[:size])
    arguments = ["-o", output] if command in ("compress", "decompress") else []
    assert path.name in refused(command, path, *arguments)


@pytest.mark.parametrize("content", [b"hello, this is a text", b"\x00" * 64, b"\xff" * 64])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_files_of_another_format(
    refused: Refused, tmp_path: Path, output: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused("compress", tmp_path / name, "-o", output)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{}trailing",
        b"[]",
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=str,
)
def test_damaged_headers(refused: Refused, tmp_path: Path, output: Path, header: Any) -> None:
    path = tmp_path / "bad.safetensors"
    write_header(path, header, b"\x00" * 4)
    assert "bad.safetensors" in refused("compress", path, "-o", output)
    assert "bad.safetensors" in refused("inspect", path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite(
    refused: Refused, run_json: Callable[..., Any], tmp_path: Path, output: Path, value: float,
    dtype: Any,
) -> None:  # fmt: skip
    bad = GOOD.astype(dtype)
    bad[3, 5] = bad[60, 1] = value
    path = tmp_path / "model.safetensors"
    save_file({"good.weight": GOOD, "layer.bad.weight": bad}, path)
    message = refused("compress", path, "-o", output)
    assert "layer.bad.weight" in message
    assert "2 of 4096 weights are NaN or infinite" in message
    assert "--skip" in message
    summary = run_json("compress", path, "-o", output, "--skip", "layer.bad.*")
    assert [tensor["bits"] for tensor in summary["tensors"]].count(None) == 1
    with safe_open(output, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("layer.bad.weight"), bad)


@pytest.mark.parametrize(
    "array",
    [
        np.empty((0, 64), np.float32),
        np.empty((64, 0), np.float32),
        np.ones((1, 1), np.float32),
        np.array(2.5, np.float32),
        np.zeros((64, 64), np.float32),
        np.full((64, 64), 0.125, np.float32),
        np.full((64, 64), 1e-40, np.float32),
        np.full((64, 64), 5e-324, np.float64),
        GOOD.astype(np.float64),
        GOOD.reshape(2, 2, 4, 16, 16),
        np.full((64, 64), 3e38, np.float32),
        np.vstack([GOOD, np.zeros((1, 64), np.float32)]),
    ],
    ids=[
        "no rows", "no columns", "one element", "scalar", "zeros", "constant", "subnormal",
        "subnormal f64", "f64", "5-d", "huge", "zero row",
    ],
)  # fmt: skip
def test_unusual_tensors_survive(
    birkhoff: Run, tmp_path: Path, output: Path, array: NDArray[Any]
) -> None:
    path, restored = tmp_path / "model.safetensors", tmp_path / "restored.safetensors"
    save_file({"a.weight": array, "b.weight": GOOD}, path)
    for arguments in (
        ["compress", path, "-o", output],
        ["verify", output, "--against", path],
        ["decompress", output, "-o", restored],
    ):
        done = birkhoff(*arguments)
        assert done.returncode == 0, done.stderr
    decoded = load_file(restored)["a.weight"]
    assert decoded.dtype == array.dtype
    assert decoded.shape == array.shape
    assert np.isfinite(decoded).all()
    # Rows of weights below 1e-33 are stored as zeros.
    assert np.abs(decoded - array).max(initial=0) <= max(0.5 * np.abs(array).max(initial=0), 1e-33)


def test_a_checkpoint_without_tensors(refused: Refused, tmp_path: Path, output: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, {})
    assert "no tensors" in refused("compress", path, "-o", output)


def test_a_missing_file(refused: Refused, tmp_path: Path, output: Path) -> None:
    missing = tmp_path / "nowhere.pth"
    for arguments in (
        ["compress", missing, "-o", output],
        ["inspect", missing],
        ["decompress", missing, "-o", output],
        ["verify", missing, "--against", missing],
    ):
        message = refused(*arguments)
        assert "nowhere.pth" in message
        assert "No such file" in message


def test_a_folder_without_safetensors(refused: Refused, tmp_path: Path, output: Path) -> None:
    assert "no .safetensors file" in refused("compress", tmp_path, "-o", output)


def test_a_folder_where_a_file_is_wanted(refused: Refused, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("inspect", tmp_path)


def test_an_index_that_names_a_missing_shard(
    refused: Refused, tmp_path: Path, output: Path
) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused("compress", tmp_path, "-o", output)
    assert "'model-00001-of-00001.safetensors' is missing" in message


def test_an_existing_output(refused: Refused, model: Path, compressed: Path, output: Path) -> None:
    output.write_text("precious")
    for command, path in (("compress", model), ("decompress", compressed)):
        message = refused(command, path, "-o", output)
        assert "out.safetensors" in message
        assert "--force" in message
    assert output.read_text() == "precious"


def test_the_output_is_the_input(
    refused: Refused, model: Path, compressed: Path, tmp_path: Path
) -> None:
    before = model.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(model)
    for arguments in (
        ["compress", model, "-o", model, "--force"],
        ["compress", model, "-o", link, "--force"],
        ["compress", tmp_path / "only", "-o", tmp_path / "only" / "a.safetensors", "--force"],
        ["decompress", compressed, "-o", compressed, "--force"],
    ):
        if "only" in str(arguments[1]):
            (tmp_path / "only").mkdir()
            shutil.copy(model, tmp_path / "only" / "a.safetensors")
        assert "the output is the input" in refused(*arguments)
    assert model.read_bytes() == before


def test_an_output_in_a_missing_folder(refused: Refused, model: Path, tmp_path: Path) -> None:
    message = refused("compress", model, "-o", tmp_path / "nowhere" / "out.safetensors")
    assert "nowhere" in message
    assert "No such file" in message


def test_an_output_that_is_a_folder(refused: Refused, model: Path, tmp_path: Path) -> None:
    assert "folder" in refused("compress", model, "-o", tmp_path, "--force")


def test_an_input_that_is_compressed_already(
    refused: Refused, compressed: Path, output: Path
) -> None:
    message = refused("compress", compressed, "-o", output)
    assert "compressed already" in message
    assert "birkhoff decompress" in message


def test_files_that_are_not_compressed(refused: Refused, model: Path, output: Path) -> None:
    for arguments in (["decompress", model, "-o", output], ["verify", model]):
        assert "not written by birkhoff" in refused(*arguments)


def test_a_pickled_module(refused: Refused, tmp_path: Path, output: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    message = refused("compress", path, "-o", output)
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), 'weights.pth')" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "7"),
        (["--bits", "many"], "many"),
        (["--codec", "zigzag"], "zigzag"),
        (["--codec", "winding", "--bits", "3"], "winding"),
        (["--rule", "no-equals-sign"], "PATTERN=BITS"),
        (["--rule", "*=x"], "PATTERN=BITS"),
        (["--unknown"], "--unknown"),
    ],
)
def test_wrong_options(
    refused: Refused, model: Path, output: Path, options: list[str], message: str
) -> None:
    assert message in refused("compress", model, "-o", output, *options, code=2)


def test_wrong_usage(refused: Refused, model: Path) -> None:
    refused("compress", code=2)
    refused("compress", model, code=2)
    refused("shrink", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "decoder.*=8"], "--rule decoder.*: no tensor has such a name"),
        (["--rule", "norm.*=8"], "--rule norm.*: it matches only tensors that are not encoded"),
        (["--rule", "pos_embed=7"], "--rule pos_embed=7"),
        (["--skip", "decoder.*"], "--skip decoder.*: no tensor has such a name"),
    ],
)
def test_patterns_without_effect(
    refused: Refused, model: Path, output: Path, options: list[str], message: str
) -> None:
    assert message in refused("compress", model, "-o", output, *options)


@pytest.mark.parametrize(
    ("variable", "value"), [("BIRKHOFF_ISA", "sse9"), ("BIRKHOFF_NUM_THREADS", "none")]
)
def test_wrong_environment_variables(
    refused: Refused, model: Path, output: Path, variable: str, value: str
) -> None:
    message = refused("compress", model, "-o", output, env={variable: value})
    assert variable in message
    assert value in message


def verify_fails(birkhoff: Run, compressed: Path, original: Path) -> str:
    done = birkhoff("verify", compressed, "--against", original, "--json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert not result["ok"]
    assert len(result["problems"]) == 1, result["problems"]
    problem = str(result["problems"][0])
    assert done.stderr == f"birkhoff: error: {compressed}: {problem}\n"
    return problem


def test_verify_names_a_corrupt_tensor(birkhoff: Run, compressed: Path, model: Path) -> None:
    data = bytearray(compressed.read_bytes())
    header_len = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + header_len])
    start, end = header["pos_embed.codes"]["data_offsets"]
    data[8 + header_len + (start + end) // 2] ^= 1
    compressed.write_bytes(data)
    assert "pos_embed" in verify_fails(birkhoff, compressed, model)
    done = birkhoff("decompress", compressed, "-o", compressed.parent / "restored.safetensors")
    assert done.returncode == 1
    assert "pos_embed" in done.stderr
    assert not (compressed.parent / "restored.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("pos_embed", None, "tensor 'pos_embed' is not in the original"),
        ("new.weight", GOOD, "tensor 'new.weight' of the original is missing"),
        ("half.weight", GOOD[:32].astype(np.float16), "(64, 64), but (32, 64) in the original"),
        ("half.weight", GOOD, "has dtype F16, but F32 in the original"),
        ("mask", np.array([True, True, True]), "tensor 'mask' is stored unchanged, but differs"),
        ("half.weight", GOOD.T.astype(np.float16), "does not resemble the original"),
    ],
)
def test_verify_names_what_differs(
    birkhoff: Run,
    compressed: Path,
    arrays: Arrays,
    tmp_path: Path,
    name: str,
    change: NDArray[Any] | None,
    problem: str,
) -> None:
    if change is None:
        del arrays[name]
    else:
        arrays[name] = np.ascontiguousarray(change)
    original = tmp_path / "original.safetensors"
    save_file(arrays, original)
    assert problem in verify_fails(birkhoff, compressed, original)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_file_size_limit(
    refused: Refused, model: Path, compressed: Path, output: Path, command: str
) -> None:
    path = model if command == "compress" else compressed
    message = refused(command, path, "-o", output, preexec_fn=limit_file_size)
    assert "out.safetensors" in message
    assert "too large" in message


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A file system of 64 kB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes rights that this process lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_full_disk(
    refused: Refused, model: Path, compressed: Path, full_disk: Path, command: str
) -> None:
    path = model if command == "compress" else compressed
    message = refused(command, path, "-o", full_disk / "out.safetensors")
    assert "No space left" in message
    assert list(full_disk.iterdir()) == []


def test_a_folder_that_may_not_be_written(refused: Refused, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "Permission denied" in refused("compress", model, "-o", folder / "out.safetensors")


def test_errors_have_no_traceback_even_with_python_warnings(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "birkhoff", "inspect", f"{model}.missing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
