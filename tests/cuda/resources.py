"""What the compiled kernels take of a device: registers, spills, and instructions.

``python tests/cuda/resources.py`` measures the variants of ``resources.tsv`` and writes it anew.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from birkhoff import _core
from birkhoff.cuda.nvrtc import Nvrtc, nvrtc
from birkhoff.cuda.source import LARGE, Dtype, Variant, source

TABLE = Path(__file__).with_name("resources.tsv")

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel.

    Attributes:
        registers: Registers of a thread.
        spilled: Bytes that a thread stores to memory for lack of registers.
    """

    registers: int
    spilled: int


def variants(*, every: bool = False) -> Iterator[Variant]:
    """The variants to compile.

    Args:
        every: All of them. Otherwise every dtype for every device at 4 bits, and every codec and
            rate for one dtype and device each, in turn: decoding is the same for all.
    """
    dtypes: list[tuple[Dtype, int]] = [("F32", 3), ("F16", 1), ("BF16", 1)]
    if every:
        dtypes += [("F32", 1), ("F32", 2)]
    trajectories = [("shift", bits) for bits in _core.rates("shift")]
    trajectories += [("winding", bits) for bits in _core.rates("winding") if bits != 8]
    for i, (codec, bits) in enumerate(trajectories):
        for j, capability in enumerate(CAPABILITIES):
            for k, (dtype, planes) in enumerate(dtypes):
                if dtype == "BF16" and capability < 80:
                    continue
                if every or (codec, bits) == ("shift", 4) or (j, k) == (i % 7, i % 3):
                    yield Variant(codec, bits, dtype, planes, capability)


def measure(compiler: Nvrtc, variant: Variant) -> dict[str, Usage]:
    """Compiles a variant: the usage of its kernels by their names."""
    options = [*compiler.options(variant.capability), "--ptxas-options=-v"]
    _, log = compiler.compile(source(variant), options)
    assert "warning" not in log, log
    found = {}
    for report in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", report)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        registers = re.search(r"Used (\d+) registers", report)
        assert name
        assert spilled
        assert registers
        found[name[1]] = Usage(int(registers[1]), int(spilled[1]))
    return found


def nvdisasm() -> Path | None:
    """The disassembler of the package nvidia-cuda-nvdisasm, if it is installed."""
    spec = find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        for path in Path(root).glob("cu*/bin/nvdisasm"):
            return path
    return None


def instructions_per_thousand(compiler: Nvrtc, disassembler: Path, variant: Variant) -> float:
    """Instructions of warps per thousand multiply-adds in the loop of the large tile.

    Counted is the way of whole tiles with aligned rows of x; ragged ones take other branches, which
    stand in the same loop.
    """
    text = source(variant)
    for branch, taken in (
        ("if (arguments.aligned) {", "{"),
        ("if (columns < STREAM) {", "if (0) {"),
    ):
        assert text.count(branch) == 1
        text = text.replace(branch, taken)
    cubin, _ = compiler.compile(text, compiler.options(variant.capability))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        command = [str(disassembler), "-c", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = next(
        section
        for section in listing.split(".section\t")
        if section.startswith(f".text.{LARGE.kernel}")
    )
    loop = max(_loops(body), key=lambda loop: sum("HMMA" in line for line in loop))
    return len(loop) * LARGE.warps_m * LARGE.warps_n * 1000 / (LARGE.m * LARGE.n * 32)


def _loops(body: str) -> Iterator[list[str]]:
    """The instructions between each label and the last branch back to it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        if target and labels.get(target[1], end) < end:
            yield lines[labels[target[1]] : end + 1]


def key(variant: Variant, kernel: str) -> tuple[str, ...]:
    """The columns of the table before the numbers."""
    rate = f"{variant.codec} {variant.bits}"
    dtype = variant.dtype + (f" ({variant.planes} planes)" if variant.dtype == "F32" else "")
    return f"sm_{variant.capability}", dtype, rate, kernel


def read_table() -> tuple[str, dict[tuple[str, ...], Usage]]:
    """The NVRTC that the table was made with, and its rows."""
    version, _, *rows = TABLE.read_text().splitlines()
    table = {}
    for row in rows:
        *columns, registers, spilled = row.split("\t")
        table[tuple(columns)] = Usage(int(registers), int(spilled))
    return version.removeprefix("# NVRTC "), table


def version_of(compiler: Nvrtc) -> str:
    """Its version as the table names it."""
    return ".".join(map(str, compiler.version))


def main() -> None:
    """Writes the table."""
    compiler = nvrtc()
    lines = [f"# NVRTC {version_of(compiler)}"]
    lines.append("device\tx\tcodec\tkernel\tregisters\tspilled bytes")
    for variant in variants():
        for kernel, usage in sorted(measure(compiler, variant).items()):
            row = (*key(variant, kernel), str(usage.registers), str(usage.spilled))
            lines.append("\t".join(row))
    TABLE.write_text("\n".join(lines) + "\n")
    disassembler = nvdisasm()
    if disassembler is not None:
        for capability in (80, 90):
            variant = Variant("shift", 4, "BF16", 1, capability)
            count = instructions_per_thousand(compiler, disassembler, variant)
            print(f"sm_{capability}: {count:.2f} instructions per thousand multiply-adds")


if __name__ == "__main__":
    main()
