"""Reads the files of ``torch.save`` without running any code that they hold.

torch is imported only here, and only once such a file has been given.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from birkhoff._core import BirkhoffError, FormatError
from birkhoff.arrays import tensor_bytes
from birkhoff.checkpoint import Checkpoint, Tensor
from birkhoff.dtypes import TORCH_DTYPES

if TYPE_CHECKING:
    import torch

#: Keys under which training scripts keep the state dict.
STATE_DICT_KEYS = ("model", "state_dict")
#: What torch.nn.DataParallel puts before every name.
DATA_PARALLEL = "module."


def open_torch_checkpoint(path: Path) -> Checkpoint:
    """Opens a file of ``torch.save``, memory-mapped where its format allows.

    It may hold a flat state dict, one under the key ``model`` or ``state_dict``, or several state
    dicts under keys of their own, whose names are then joined with a dot.

    Raises:
        FormatError: The file is damaged, holds something else, or needs code to be run.
        BirkhoffError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise BirkhoffError(
            f"{path}: this is a PyTorch checkpoint, which takes torch to read; "
            'install it with `pip install "birkhoff[torch]"`'
        ) from error
    notes: list[str] = []
    state_dict = _find_state_dict(path, _load(path), notes)
    if all(name.startswith(DATA_PARALLEL) for name in state_dict):
        state_dict = {
            name.removeprefix(DATA_PARALLEL): tensor for name, tensor in state_dict.items()
        }
        notes.append(f"the prefix {DATA_PARALLEL!r} of every name was removed")
    return Checkpoint(path, tensors_of(state_dict, str(path)), [path], notes)


def _load(path: Path) -> Any:
    import torch

    def load(mmap: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        # Files of torch before 1.6 are bare pickles and cannot be mapped.
        return load(mmap=is_zip)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?(\S+)", str(error))
        what = f" of class {culprit[1]}" if culprit else ""
        raise FormatError(
            f"{path}: the file holds Python objects{what}, not only tensors, and unpickling those "
            "could run code; where its code is at hand, export the weights with "
            "`torch.save(model.state_dict(), 'weights.pth')` and give that file"
        ) from error
    except OSError:
        raise
    except Exception as error:  # A damaged pickle can make its reader raise anything.
        if "TorchScript" in str(error):
            raise FormatError(
                f"{path}: this is a TorchScript archive; export its weights with "
                "`torch.save(torch.jit.load(path).state_dict(), 'weights.pth')` and give that file"
            ) from error
        raise FormatError(
            f"{path}: the PyTorch checkpoint is damaged or incomplete; download it again"
        ) from error


def _find_state_dict(path: Path, loaded: Any, notes: list[str]) -> dict[str, torch.Tensor]:
    """The state dict in what a file held; what is left out is added to the notes."""
    if not isinstance(loaded, Mapping):
        raise FormatError(
            f"{path}: the file holds a {type(loaded).__name__}, not a state dict; export one with "
            "`torch.save(model.state_dict(), 'weights.pth')`"
        )
    for key in STATE_DICT_KEYS:
        if isinstance(loaded.get(key), Mapping):
            inner = _only_tensors(loaded[key], notes)
            if inner:
                _note_ignored([name for name in loaded if name != key], notes)
                return inner
    state_dict = _only_tensors(loaded, [])
    if state_dict:
        return _only_tensors(loaded, notes)
    # Parts of a model, each with a state dict of its own.
    parts = {
        f"{key}.{name}": tensor
        for key, part in loaded.items()
        if isinstance(part, Mapping)
        for name, tensor in _only_tensors(part, []).items()
    }
    if parts:
        return parts
    raise FormatError(
        f"{path}: no tensors were found under the keys {_list(loaded)}; export a state dict with "
        "`torch.save(model.state_dict(), 'weights.pth')`"
    )


def _only_tensors(mapping: Mapping[Any, Any], notes: list[str]) -> dict[str, torch.Tensor]:
    import torch

    tensors = {str(k): v for k, v in mapping.items() if isinstance(v, torch.Tensor)}
    if tensors:
        _note_ignored([k for k, v in mapping.items() if not isinstance(v, torch.Tensor)], notes)
    return tensors


def _note_ignored(names: list[Any], notes: list[str]) -> None:
    if names:
        notes.append(f"left out, since they are no tensors of the model: {_list(names)}")


def _list(names: Any) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def tensors_of(state_dict: Mapping[str, torch.Tensor], source: str) -> list[Tensor]:
    """The tensors of a state dict, those that share memory tied to the first of them.

    Raises:
        FormatError: One of them cannot lie in a safetensors file; ``source`` says whose it is.
    """
    import torch

    def reader(tensor: torch.Tensor) -> Callable[[], NDArray[np.uint8]]:
        return lambda: tensor_bytes(tensor)

    first: dict[tuple[Any, ...], str] = {}
    tensors = []
    for name, tensor in state_dict.items():
        dtype = TORCH_DTYPES.get(str(tensor.dtype))
        if dtype is None or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise FormatError(
                f"{source}: tensor {name!r} is {kind} {str(tensor.dtype).removeprefix('torch.')}, "
                "which a safetensors file cannot hold; convert it or leave it out of the state dict"
            )
        tied_to = None
        if tensor.numel() > 0:
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            tied_to = first.setdefault(memory, name)
            if tied_to == name:
                tied_to = None
        tensors.append(Tensor(name, dtype, tuple(tensor.shape), reader(tensor), tied_to))
    return tensors
