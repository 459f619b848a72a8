"""The command line, driven in a process of its own as a user drives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import birkhoff as package
from conftest import Arrays, Run, sqnr

RunJson = Callable[..., Any]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "compressed.safetensors"


def kinds(summary: Any) -> dict[str, str]:
    return {tensor["name"]: tensor["kind"] for tensor in summary["tensors"]}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compress_verify_decompress(
    birkhoff: Run,
    run_json: RunJson,
    tmp_path: Path,
    model: Path,
    arrays: Arrays,
    output: Path,
    bits: int,
) -> None:
    summary = run_json("compress", model, "-o", output, "--bits", bits)
    assert summary["nbytes"] == output.stat().st_size
    assert summary["original_nbytes"] == sum(array.nbytes for array in arrays.values())
    assert summary["ratio"] == pytest.approx(summary["original_nbytes"] / summary["nbytes"])
    assert kinds(summary)["blocks.0.mlp.fc1.weight"] == f"{bits} bits"

    verification = run_json("verify", output, "--against", model)
    assert verification["ok"]
    assert verification["problems"] == []
    figures = ("sqnr_db", "max_error", "name", "nbytes")
    assert [{key: tensor[key] for key in figures} for tensor in verification["tensors"]] == [
        {key: tensor[key] for key in figures} for tensor in summary["tensors"]
    ]

    restored = tmp_path / "restored.safetensors"
    done = birkhoff("decompress", output, "-o", restored)
    assert done.returncode == 0, done.stderr
    decoded = load_file(restored)
    assert decoded.keys() == arrays.keys()
    measured = {tensor["name"]: tensor["sqnr_db"] for tensor in summary["tensors"]}
    for name, original in arrays.items():
        assert decoded[name].dtype == original.dtype
        assert decoded[name].shape == original.shape
        if measured[name] is None:
            np.testing.assert_array_equal(decoded[name], original)
        else:
            assert sqnr(original, decoded[name]) == pytest.approx(measured[name], abs=0.01)


def test_what_is_coded_and_what_is_stored(run_json: RunJson, model: Path, output: Path) -> None:
    assert kinds(run_json("compress", model, "-o", output)) == {
        "blocks.0.attn.qkv.weight": "4 bits",
        "blocks.0.attn.qkv.bias": "F32 as F16",
        "blocks.0.mlp.fc1.weight": "4 bits",
        "pos_embed": "4 bits",
        "patch_embed.proj.weight": "4 bits",
        "volume.weight": "4 bits",
        "norm.weight": "F32 as F16",
        "norm.running_var": "F32",  # beyond the range of float16
        "logit_scale": "F32 as F16",
        "num_batches_tracked": "I64",
        "mask": "BOOL",
        "index": "I64",
        "empty.weight": "F32 as F16",
        "one.weight": "F32 as F16",
        "half.weight": "8 bits",
        "double.weight": "8 bits",
    }


def test_rules_and_skips(run_json: RunJson, model: Path, arrays: Arrays, output: Path) -> None:
    options = ["--rule", "blocks.*=6", "--rule", "*fc1*=3", "--rule", "half.*=16"]
    summary = run_json("compress", model, "-o", output, *options, "--skip", "*embed*")
    found = kinds(summary)
    assert found["blocks.0.attn.qkv.weight"] == "6 bits"
    assert found["blocks.0.mlp.fc1.weight"] == "3 bits"
    assert found["half.weight"] == "F16"
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == "F32"
    settings = run_json("inspect", output)["settings"]
    assert settings == summary["settings"]
    assert settings["rules"][-3:] == [["blocks.*", 6], ["*fc1*", 3], ["half.*", 16]]
    assert settings["skip"] == ["*embed*"]
    np.testing.assert_array_equal(package.open(output)["pos_embed"], arrays["pos_embed"])


def test_the_winding_codec(run_json: RunJson, model: Path, output: Path) -> None:
    summary = run_json("compress", model, "-o", output, "--codec", "winding", "--bits", 5)
    assert summary["settings"]["codec"] == "winding"
    assert kinds(summary)["blocks.0.mlp.fc1.weight"] == "5 bits"
    assert run_json("verify", output, "--against", model)["ok"]


def test_the_tables_are_for_people(birkhoff: Run, model: Path, output: Path) -> None:
    done = birkhoff("compress", model, "-o", output)
    assert done.returncode == 0
    assert done.stderr == ""
    for text in ("coded, 4 bits", "stored, F32 as F16", "x smaller", "SQNR", "policy:"):
        assert text in done.stdout
    done = birkhoff("inspect", output)
    assert done.returncode == 0
    assert "blocks.0.attn.qkv.weight" in done.stdout
    assert "576x192" in done.stdout
    done = birkhoff("verify", output, "--against", model)
    assert done.returncode == 0
    assert done.stdout.endswith("verified: all tensors match\n")
    done = birkhoff("verify", output)
    assert done.stdout.endswith("verified: all checksums match\n")


def test_any_safetensors_tool_reads_the_output(
    run_json: RunJson, model: Path, arrays: Arrays, output: Path
) -> None:
    run_json("compress", model, "-o", output)
    with safe_open(output, framework="numpy") as file:
        assert "blocks.0.attn.qkv.weight.codes" in file.keys()  # noqa: SIM118
        np.testing.assert_array_equal(file.get_tensor("index"), arrays["index"])


def test_open_is_a_lazy_mapping(
    run_json: RunJson, model: Path, arrays: Arrays, output: Path
) -> None:
    run_json("compress", model, "-o", output)
    file = package.open(output)
    assert file.compressed
    assert len(file) == len(arrays)
    assert set(file) == set(arrays)
    assert file.shapes == {name: array.shape for name, array in arrays.items()}
    assert file.settings["bits"] == 4
    for name, original in arrays.items():
        tensor = file.tensor(name)
        assert tensor.shape == original.shape
        if file.entry(name).coding == "coded":
            assert tensor.dtype == np.float32
    matrix = file.matrix("blocks.0.attn.qkv.weight")
    np.testing.assert_array_equal(matrix.decode(), file["blocks.0.attn.qkv.weight"])
    with pytest.raises(KeyError, match="nowhere"):
        file.tensor("nowhere")
    with pytest.raises(ValueError, match="mask"):
        file.matrix("mask")


def test_open_reads_ordinary_safetensors_files(model: Path, arrays: Arrays) -> None:
    file = package.open(model)
    assert not file.compressed
    for name, original in arrays.items():
        np.testing.assert_array_equal(file[name], original)


def test_a_torch_checkpoint(birkhoff: Run, run_json: RunJson, tmp_path: Path, output: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = 0.02 * torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    state_dict = {
        "shared.weight": weight,
        "head.weight": weight,
        "half.weight": weight.bfloat16(),
        "norm.weight": torch.ones(128, dtype=torch.bfloat16),
        "table": torch.ones(4, 4, dtype=torch.float8_e4m3fn),
        "step": torch.tensor(3),
    }
    checkpoint = tmp_path / "model.pth"
    torch.save({"model": state_dict, "epoch": 1}, checkpoint)
    summary = run_json("compress", checkpoint, "-o", output)
    assert kinds(summary) == {
        "shared.weight": "4 bits",
        "head.weight": "tied",
        "half.weight": "4 bits",
        "norm.weight": "BF16",
        "table": "F8_E4M3",
        "step": "I64",
    }
    assert "epoch" in summary["notes"][0]
    assert run_json("verify", output, "--against", checkpoint)["ok"]
    restored = tmp_path / "restored.safetensors"
    assert birkhoff("decompress", output, "-o", restored).returncode == 0
    from safetensors.torch import load_file as load_torch_file

    decoded = load_torch_file(restored)
    assert {name: tensor.dtype for name, tensor in decoded.items()} == {
        name: tensor.dtype for name, tensor in state_dict.items()
    }
    assert torch.equal(decoded["shared.weight"], decoded["head.weight"])
    assert torch.equal(decoded["table"].view(torch.uint8), state_dict["table"].view(torch.uint8))


def test_force_replaces_the_output(birkhoff: Run, model: Path, output: Path) -> None:
    output.write_text("old")
    done = birkhoff("compress", model, "-o", output, "--force")
    assert done.returncode == 0, done.stderr
    assert package.open(output).compressed


def test_the_output_is_the_same_every_time(birkhoff: Run, tmp_path: Path, model: Path) -> None:
    outputs = []
    for number, threads in enumerate(("1", "2", "3")):
        path = tmp_path / f"{number}.safetensors"
        done = birkhoff("compress", model, "-o", path, env={"BIRKHOFF_NUM_THREADS": threads})
        assert done.returncode == 0, done.stderr
        outputs.append(path.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_env(run_json: RunJson, birkhoff: Run) -> None:
    info = run_json("env")
    assert info["birkhoff"] == package.__version__
    assert info["instruction_set"] in info["instruction_sets_available"]
    assert info["threads"] >= 1
    assert run_json("env", env={"BIRKHOFF_ISA": "portable"})["instruction_set"] == "portable"
    assert package.__version__ in birkhoff("env").stdout


def test_version_and_help(birkhoff: Run) -> None:
    assert birkhoff("--version").stdout == f"birkhoff {package.__version__}\n"
    done = birkhoff("--help")
    assert done.returncode == 0
    for command in ("compress", "inspect", "decompress", "verify", "env", "demo"):
        assert command in done.stdout


def imports_no_torch(*arguments: str) -> None:
    code = (
        "import sys\n"
        "from birkhoff.cli import main\n"
        f"sys.argv = {['birkhoff', *arguments]!r}\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_commands_without_a_torch_checkpoint_import_no_torch(model: Path, output: Path) -> None:
    imports_no_torch("--help")
    imports_no_torch("compress", str(model), "-o", str(output))
    imports_no_torch("inspect", str(output))
    imports_no_torch("verify", str(output), "--against", str(model))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2048, 2048)).astype(np.float32)
    save_file({f"{i}.weight": weight for i in range(24)}, tmp_path / "model.safetensors")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "birkhoff",
            "compress",
            "model.safetensors",
            "-o",
            "out.safetensors",
        ],
        cwd=tmp_path,
        env={**os.environ, "BIRKHOFF_ISA": "portable", "BIRKHOFF_NUM_THREADS": "1"},
        # A shell may start its background jobs with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(tmp_path.iterdir())) < 2 and process.poll() is None:
        time.sleep(0.01)  # until the temporary file is there
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert stderr == ("birkhoff: error: interrupted\n" if number == signal.SIGINT else "")
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_closed_pipe_ends_quietly(model: Path) -> None:
    command = f"{sys.executable} -m birkhoff inspect --json {model} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_json_is_strict(birkhoff: Run, model: Path, output: Path) -> None:
    birkhoff("compress", model, "-o", output)
    done = birkhoff("verify", output, "--against", model, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(done.stdout, parse_constant=refuse)
