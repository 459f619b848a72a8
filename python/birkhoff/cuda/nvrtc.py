"""NVRTC, the CUDA compiler as a library, which comes with torch's CUDA wheels."""

from __future__ import annotations

import ctypes
import functools
import sys
from importlib.util import find_spec
from pathlib import Path


class NvrtcError(RuntimeError):
    """NVRTC is not there or cannot compile."""


class Nvrtc:
    """A loaded NVRTC.

    Attributes:
        path: The library.
        version: Major and minor version.

    Args:
        path: The library.

    Raises:
        OSError: It cannot be loaded.
        NvrtcError: It does not work.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def capabilities(self) -> list[int]:
        """The compute capabilities that it compiles for, ascending: 80 for 8.0."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def options(self, capability: int) -> list[str]:
        """The options to compile for a device.

        A device newer than the compiler gets PTX, which its driver compiles.

        Raises:
            NvrtcError: The device is older than what it compiles for.
        """
        usable = [known for known in self.capabilities() if known <= capability]
        if not usable:
            raise NvrtcError(
                f"NVRTC {self.version[0]}.{self.version[1]} does not compile for compute "
                f"capability {capability / 10}"
            )
        kind = "sm" if usable[-1] == capability else "compute"
        # No --use_fast_math: decoding is to be exact.
        return [
            f"--gpu-architecture={kind}_{usable[-1]}",
            "--std=c++17",
            "--device-as-default-execution-space",
        ]

    def compile(self, source: str, options: list[str]) -> tuple[bytes, str]:
        """Compiles a program.

        Returns:
            The cubin, or PTX if the options ask for a virtual architecture, and the log.

        Raises:
            NvrtcError: With the compiler's messages.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            b"birkhoff.cu",
            0,
            None,
            None,
        )
        try:
            encoded = [option.encode() for option in options]
            status = self._library.nvrtcCompileProgram(
                program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
            )
            log = self._read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status != 0:
                raise NvrtcError(f"NVRTC cannot compile ({self._error(status)}): {log}")
            virtual = any("=compute_" in option for option in options)
            return self._read("PTX" if virtual else "CUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise NvrtcError(f"{function} failed: {self._error(status)}")

    def _error(self, status: int) -> str:
        function = self._library.nvrtcGetErrorString
        function.restype = ctypes.c_char_p
        message: bytes = function(status)
        return message.decode()


@functools.cache
def nvrtc() -> Nvrtc:
    """The NVRTC of torch, or that of the system.

    Raises:
        NvrtcError: There is none.
    """
    problems = []
    for path in _candidates():
        try:
            return Nvrtc(path)
        except (OSError, NvrtcError) as error:
            problems.append(str(error))
    raise NvrtcError(
        "NVRTC was not found; it comes with the CUDA wheels of torch, or by "
        f"pip install nvidia-cuda-nvrtc ({problems[-1]})"
    )


def _candidates() -> list[str]:
    """Paths and names of the library: those of installed wheels first, newest first."""
    windows = sys.platform == "win32"
    pattern = "nvrtc64_*_0.dll" if windows else "libnvrtc.so.*"
    spec = find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found: list[str] = []
    for root in roots:
        # nvidia/cu13/lib since CUDA 13, nvidia/cuda_nvrtc/lib before.
        for folder in ("cu[0-9]*", "cuda_nvrtc"):
            for library in ("bin/x86_64", "bin") if windows else ("lib",):
                paths = Path(root).glob(f"{folder}/{library}/{pattern}")
                found += sorted(map(str, paths), reverse=True)
    names = [f"nvrtc64_{major}0_0.dll" if windows else f"libnvrtc.so.{major}" for major in (13, 12)]
    return found + names
