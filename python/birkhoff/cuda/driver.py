"""The part of the CUDA driver API that loads and launches kernels."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

#: What a kernel may use of shared memory without asking for more, in bytes.
_SHARED_BYTES_UNASKED = 48 << 10

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute


class DriverError(RuntimeError):
    """The CUDA driver is not there or refuses a call."""


class Kernel:
    """A kernel that is loaded on a device.

    Attributes:
        name: Its name in the source.
        threads: Threads of a thread block.
        shared_bytes: Dynamic shared memory of a thread block.
    """

    def __init__(
        self, function: ctypes.c_void_p, name: str, threads: int, shared_bytes: int
    ) -> None:
        self.function = function
        self.name = name
        self.threads = threads
        self.shared_bytes = shared_bytes


class Driver:
    """The loaded driver; it works in the primary contexts of devices, as torch does.

    Args:
        path: The library.

    Raises:
        OSError: It cannot be loaded.
        DriverError: It does not work.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)

    def load(self, device: int, image: bytes) -> ctypes.c_void_p:
        """Loads a cubin, or PTX that ends in a zero byte, on a device.

        Raises:
            DriverError: It was made for another device, or needs a newer driver.
        """
        module = ctypes.c_void_p()
        with self._in_context(device):
            self._call("cuModuleLoadData", ctypes.byref(module), image)
        return module

    def kernel(
        self, device: int, module: ctypes.c_void_p, name: str, threads: int, shared_bytes: int
    ) -> Kernel:
        """A kernel of a module.

        Raises:
            DriverError: It is not there, or the device lacks the shared memory.
        """
        function = ctypes.c_void_p()
        with self._in_context(device):
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            if shared_bytes > _SHARED_BYTES_UNASKED:
                attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", function, attribute, shared_bytes)
        return Kernel(function, name, threads, shared_bytes)

    def launch(
        self,
        device: int,
        kernel: Kernel,
        grid: tuple[int, int],
        arguments: ctypes.Structure,
        stream: int,
    ) -> None:
        """Launches a kernel, which takes one structure, on a stream.

        Raises:
            DriverError: The launch is refused, or an earlier kernel has failed.
        """
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        unsigned = [
            ctypes.c_uint(value) for value in (*grid, 1, kernel.threads, 1, 1, kernel.shared_bytes)
        ]
        with self._in_context(device):
            self._call(
                "cuLaunchKernel",
                kernel.function,
                *unsigned,
                ctypes.c_void_p(stream),
                parameters,
                None,
            )

    @contextmanager
    def _in_context(self, device: int) -> Iterator[None]:
        """Makes the primary context of a device current on this thread, for a while."""
        context = self._contexts.get(device) or self._primary_context(device)
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _primary_context(self, device: int) -> ctypes.c_void_p:
        with self._lock:
            if device not in self._contexts:
                handle, context = ctypes.c_int(), ctypes.c_void_p()
                self._call("cuDeviceGet", ctypes.byref(handle), device)
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
                self._contexts[device] = context
            return self._contexts[device]

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            message = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(message))
            words = message.value.decode() if message.value else "unknown error"
            raise DriverError(f"{function} failed: {words} ({status})")


@functools.cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        DriverError: There is none.
    """
    try:
        return Driver(LIBRARY)
    except OSError as error:
        raise DriverError(f"the CUDA driver was not found: {error}") from error
