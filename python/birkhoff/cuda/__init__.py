"""HyperLinear on CUDA devices.

| module | what it holds |
|---|---|
| ``kernels/`` | the kernels, in CUDA C++ |
| ``source`` | the source of the kernels for one codec, bits and dtype |
| ``nvrtc`` | the compiler |
| ``driver`` | loading and launching |
| ``program`` | compiled kernels, on disk and on devices |
| ``dispatch`` | which kernel multiplies how many tokens |
| ``launch`` | decode and multiply |

``docs/cuda.md`` says how it is tested, and what is not.
"""

from birkhoff.cuda.launch import DeviceWeight

__all__ = ["DeviceWeight"]
