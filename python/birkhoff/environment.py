"""What birkhoff runs on."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import birkhoff
from birkhoff import _core


def environment() -> dict[str, Any]:
    """Versions, CPU features, threads, and CUDA as JSON values."""
    info: dict[str, Any] = {
        "birkhoff": birkhoff.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": metadata.version("numpy"),
        "instruction_set": _core.isa(),
        "instruction_sets_available": _core.available_isas(),
        "cpu_features": _core.cpu_features(),
        "threads": _core.get_num_threads(),
        "torch": None,
        "torch_cuda": None,
        "cuda_device": None,
    }
    if find_spec("torch") is not None:
        import torch

        info["torch"] = torch.__version__
        info["torch_cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            info["cuda_device"] = torch.cuda.get_device_name()
    return info
