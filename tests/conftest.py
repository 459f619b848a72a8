"""What the tests share: running the command line, and small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

Run = Callable[..., subprocess.CompletedProcess[str]]
Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def birkhoff() -> Run:
    """Runs the command line in a process of its own, as a user does."""

    def run(
        *arguments: str | Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "birkhoff", *map(str, arguments)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run


@pytest.fixture
def run_json(birkhoff: Run) -> Callable[..., Any]:
    """Runs a command that must succeed, and reads the JSON it prints."""

    def run(*arguments: str | Path, **options: Any) -> Any:
        done = birkhoff(*arguments, "--json", **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    return run


@pytest.fixture
def refused(birkhoff: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail with one sentence and leave the folder as it was."""

    def run(*arguments: str | Path, code: int = 1, **options: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = birkhoff(*arguments, **options)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("birkhoff: error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr

    return run


@pytest.fixture
def arrays() -> Arrays:
    """A small model that holds one tensor of every kind."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    return {
        "blocks.0.attn.qkv.weight": normal(576, 192),
        "blocks.0.attn.qkv.bias": normal(576),
        "blocks.0.mlp.fc1.weight": normal(768, 192),
        "pos_embed": normal(1, 14, 14, 192),
        "patch_embed.proj.weight": normal(192, 3, 16, 16),
        "volume.weight": normal(8, 8, 4, 8, 8),
        "norm.weight": np.ones(192, np.float32),
        "norm.running_var": np.array([1e30, 1e-30, 1.0], np.float32),
        "logit_scale": np.array(4.6, np.float32),
        "num_batches_tracked": np.array(12345678901, np.int64),
        "mask": np.array([True, False, True]),
        "index": np.arange(49, dtype=np.int64).reshape(7, 7),
        "empty.weight": np.empty((0, 16), np.float32),
        "one.weight": np.array([[3.25]], np.float32),
        "half.weight": normal(64, 64).astype(np.float16),
        "double.weight": normal(64, 64).astype(np.float64),
    }


@pytest.fixture
def model(tmp_path: Path, arrays: Arrays) -> Path:
    """The small model as a safetensors file."""
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    return path


def sqnr(original: NDArray[Any], decoded: NDArray[Any]) -> float:
    """Ratio of signal to quantization noise in dB."""
    signal = np.sum(original.astype(np.float64) ** 2)
    noise = np.sum((original.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(signal / noise))
