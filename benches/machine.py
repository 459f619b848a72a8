"""The machine that the benchmarks run on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The CPU's name, as the system or else Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
