"""Checkpoints in the forms in which people have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from birkhoff import FormatError
from birkhoff.checkpoint import Checkpoint, open_checkpoint
from conftest import Arrays

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(8, 6, generator=generator),
        "encoder.bias": torch.randn(8, generator=generator),
        "step": torch.tensor(7),
    }


def save(folder: Path, value: Any, **options: Any) -> Path:
    path = folder / "model.pth"
    torch.save(value, path, **options)
    return path


def check(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert [tensor.name for tensor in checkpoint.tensors] == list(expected)
    for tensor in checkpoint.tensors:
        original = expected[tensor.name]
        assert tensor.shape == tuple(original.shape)
        data = tensor.read()
        assert data.dtype == np.uint8
        assert data.tobytes() == bytes(original.contiguous().untyped_storage())


def test_a_flat_state_dict(tmp_path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    check(open_checkpoint(save(tmp_path, state_dict)), state_dict)


def test_a_file_of_old_torch(tmp_path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    path = save(tmp_path, state_dict, _use_new_zipfile_serialization=False)
    check(open_checkpoint(path), state_dict)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_training_checkpoint(
    tmp_path: Path, state_dict: dict[str, torch.Tensor], key: str
) -> None:
    training = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    checkpoint = open_checkpoint(save(tmp_path, {key: state_dict, **training}))
    check(checkpoint, state_dict)
    assert checkpoint.notes == [
        "left out, since they are no tensors of the model: epoch, optimizer"
    ]


def test_extras_beside_tensors_are_left_out(
    tmp_path: Path, state_dict: dict[str, torch.Tensor]
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, {**state_dict, "_metadata": {"version": 1}}))
    check(checkpoint, state_dict)
    assert "_metadata" in checkpoint.notes[0]


def test_the_prefix_of_data_parallel_is_removed(
    tmp_path: Path, state_dict: dict[str, torch.Tensor]
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in state_dict.items()}
    checkpoint = open_checkpoint(save(tmp_path, {"state_dict": wrapped}))
    check(checkpoint, state_dict)
    assert "module." in checkpoint.notes[0]


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    names = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    assert {t.name for t in open_checkpoint(save(tmp_path, names)).tensors} == set(names)


def test_several_state_dicts_are_joined(tmp_path: Path) -> None:
    parts = {"prompt": {"weight": torch.ones(2)}, "mask": {"weight": torch.zeros(3)}}
    names = [tensor.name for tensor in open_checkpoint(save(tmp_path, parts)).tensors]
    assert names == ["prompt.weight", "mask.weight"]


def test_every_dtype_survives(tmp_path: Path) -> None:
    dtypes = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
        torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    tensors = {name: torch.tensor([[0, 1]]).to(dtype) for dtype, name in dtypes.items()}
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    check(checkpoint, tensors)
    assert [tensor.dtype for tensor in checkpoint.tensors] == list(dtypes.values())


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "none": torch.empty(3, 0)}
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    assert [tensor.shape for tensor in checkpoint.tensors] == [(), (0, 4), (3, 0)]
    assert [tensor.read().size for tensor in checkpoint.tensors] == [4, 0, 0]
    assert all(tensor.tied_to is None for tensor in checkpoint.tensors)


def test_strided_tensors_are_read_in_row_major_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    checkpoint = open_checkpoint(save(tmp_path, {"a": tensor.T, "b": tensor[:, ::2]}))
    first, second = (tensor.read().view("<f4") for tensor in checkpoint.tensors)
    np.testing.assert_array_equal(first.reshape(4, 3), tensor.numpy().T)
    np.testing.assert_array_equal(second.reshape(3, 2), tensor.numpy()[:, ::2])


def test_tied_tensors_are_found(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    tensors = {"a": weight, "b": weight, "same shape": weight.T, "equal": weight.clone()}
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    assert [tensor.tied_to for tensor in checkpoint.tensors] == [None, "a", None, None]


class Module(torch.nn.Linear):
    """A module whose class a checkpoint would name."""


def test_a_pickled_module_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    path = save(tmp_path, Module(2, 2))
    with pytest.raises(FormatError, match=r"Module.*torch\.save\(model\.state_dict\(\)"):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(
    tmp_path: Path, state_dict: dict[str, torch.Tensor], legacy: bool
) -> None:
    path = save(tmp_path, state_dict, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FormatError, match="damaged or incomplete"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [{}, {"epoch": 1}, [torch.ones(2)], torch.ones(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(FormatError, match=r"torch\.save\(model\.state_dict\(\)"):
        open_checkpoint(save(tmp_path, value))


def test_tensors_that_safetensors_cannot_hold_are_named(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(FormatError, match="'adjacency' is sparse_coo"):
        open_checkpoint(save(tmp_path, {"adjacency": sparse}))
    with pytest.raises(FormatError, match=r"'wide' is .*complex128"):
        open_checkpoint(save(tmp_path, {"wide": torch.ones(2, dtype=torch.complex128)}))


def path_with(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_torch_is_asked_for_when_it_is_missing(
    tmp_path: Path, state_dict: dict[str, torch.Tensor]
) -> None:
    path = save(tmp_path, state_dict)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    done = subprocess.run(
        [sys.executable, "-m", "birkhoff", "compress", path, "-o", tmp_path / "out.safetensors"],
        env={**os.environ, "PYTHONPATH": path_with(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "birkhoff[torch]"' in done.stderr
    assert "Traceback" not in done.stderr


def write_shards(folder: Path, arrays: Arrays) -> None:
    (folder / "config.json").write_text("{}")
    names = list(arrays)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, members in shards.items():
        save_file({name: arrays[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": {name: weight_map[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_hugging_face_folder(tmp_path: Path, model: Path, arrays: Arrays) -> None:
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert {tensor.name for tensor in checkpoint.tensors} == set(arrays)
    assert checkpoint.files == [model]


def test_a_sharded_hugging_face_folder(tmp_path: Path, arrays: Arrays) -> None:
    write_shards(tmp_path, arrays)
    checkpoint = open_checkpoint(tmp_path)
    assert [tensor.name for tensor in checkpoint.tensors] == list(arrays)
    for tensor in checkpoint.tensors:
        assert tensor.read().tobytes() == arrays[tensor.name].tobytes()


def test_a_missing_shard_is_named(tmp_path: Path, arrays: Arrays) -> None:
    write_shards(tmp_path, arrays)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"'model-00002-of-00002\.safetensors' is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "no index"),
        ("[]", "no index"),
        ('{"weight_map": []}', "no index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "/etc/hostname"}}', "outside"),
        ('{"weight_map": {"nowhere": "model.safetensors"}}', "'nowhere' is not in its shard"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, model: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)


def test_a_folder_with_several_models_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(model.read_bytes())
    with pytest.raises(FormatError, match=r"2 \.safetensors files"):
        open_checkpoint(tmp_path)
