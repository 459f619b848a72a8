"""Compiled kernels: on disk, and loaded on devices."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path

import torch

from birkhoff.cuda.driver import Driver, DriverError, Kernel, driver
from birkhoff.cuda.nvrtc import NvrtcError, nvrtc
from birkhoff.cuda.source import (
    GEMV_TOKENS,
    STRIP_THREADS,
    TABLE_BYTES,
    Tile,
    Variant,
    gemv_shared_bytes,
    source,
)

logger = logging.getLogger("birkhoff.cuda")


class Program:
    """The kernels of a variant on a device.

    Attributes:
        variant: What they were compiled for.
        device: Index of the device.
        decode: Writes the decoded weight.
        gemv: Multiply few tokens, by their largest number.
        gemm: Multiply many, by their tile.

    Raises:
        NvrtcError: They cannot be compiled.
        DriverError: They cannot be loaded.
    """

    def __init__(self, variant: Variant, device: int) -> None:
        self.variant = variant
        self.device = device
        self.driver = driver()
        module = _load_module(self.driver, device, variant)

        def kernel(name: str, threads: int, shared_bytes: int) -> Kernel:
            return self.driver.kernel(device, module, name, threads, shared_bytes)

        self.decode = kernel("decode", STRIP_THREADS, TABLE_BYTES)
        self.gemv = {
            tokens: kernel(f"gemv_{tokens}", STRIP_THREADS, gemv_shared_bytes(tokens))
            for tokens in GEMV_TOKENS
        }
        self.gemm: dict[Tile, Kernel] = {
            tile: kernel(tile.kernel, tile.threads, tile.shared_bytes(variant.planes))
            for tile in variant.tiles
        }


_lock = threading.Lock()
_programs: dict[tuple[int, Variant], Program | None] = {}


def load(variant: Variant, device: int) -> Program | None:
    """The kernels of a variant on a device, compiled at the first call.

    Returns:
        None where that is impossible; a line in the log of ``birkhoff.cuda`` says why, once.
    """
    key = (device, variant)
    if key in _programs:
        return _programs[key]
    with _lock:
        if key not in _programs:
            problem = _unsupported(variant)
            if problem is None:
                if _is_capturing():
                    log_once(
                        "kernels are not compiled while a CUDA graph is captured; decoding with "
                        "torch operations. Call the model once before"
                    )
                    return None
                try:
                    _programs[key] = Program(variant, device)
                except (NvrtcError, DriverError) as error:
                    problem = str(error)
            if problem is not None:
                log_once(f"{problem}; decoding with torch operations, which is slow")
                _programs[key] = None
        return _programs[key]


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Warns, but not of the same again."""
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


def _unsupported(variant: Variant) -> str | None:
    """Why a device cannot have kernels of a variant, if so."""
    if torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is for ROCm"
    capability = variant.capability
    if capability < 75:
        return f"the kernels need compute capability 7.5, and the device has {capability / 10}"
    if variant.dtype == "BF16" and capability < 80:
        return f"bfloat16 needs compute capability 8.0, and the device has {capability / 10}"
    return None


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _load_module(driver: Driver, device: int, variant: Variant) -> ctypes.c_void_p:
    """Loads the module of a variant, from the cache if it is there."""
    compiler = nvrtc()
    options = compiler.options(variant.capability)
    text = source(variant)
    path = _cached(text, options, compiler.version)
    if path is not None:
        try:
            return driver.load(device, path.read_bytes())
        except (OSError, DriverError):
            pass  # Not there, or damaged: it is made again.
    image, _ = compiler.compile(text, options)
    module = driver.load(device, image)
    if path is not None:
        _write(path, image)
    return module


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: ``BIRKHOFF_CACHE``, or the user's cache folder.

    Returns:
        None if ``BIRKHOFF_CACHE`` is empty, or there is no home.
    """
    folder = os.environ.get("BIRKHOFF_CACHE")
    if folder is not None:
        return Path(folder) if folder else None
    if folder := os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA"):
        return Path(folder) / "birkhoff"
    try:
        return Path.home() / ".cache" / "birkhoff"
    except RuntimeError:
        return None


def _cached(text: str, options: list[str], version: tuple[int, int]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(repr((text, options, version)).encode()).hexdigest()
    return folder / "cuda" / f"{key[:32]}.bin"


def _write(path: Path, image: bytes) -> None:
    """Writes a file as a whole, or not at all where that is not allowed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once: each writes its own file and puts it into place.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(image)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log_once(f"compiled kernels are not kept: {error}")
