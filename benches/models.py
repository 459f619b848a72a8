"""Size, time and memory of the Segment Anything family, compressed.

    python benches/models.py [--bits 4] [--only MODEL ...] [--sizes] [--json]

For each model: makes a checkpoint with random weights, compresses it as `birkhoff compress` does,
and loads the file, each step in a process of its own. Memory is the resident set: before loading
(with the packages imported), after loading with all weights in use, and of the original, loaded by
torch. Beside the ratio stands the one that the Birkhoff paper (arXiv 2507.08765) gives for its own
codec.

Models come from their packages (the extra `packages`, and transformers). One without a package is a
table of names and shapes in `tests/architectures`, and can only be compressed; `--sizes` does that
with all that have a table, with zeros for weights, on which sizes do not depend.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_name
from packages import Sam, Sam2, quiet, randomize
from safetensors.numpy import save_file
from torch import nn

import birkhoff
from birkhoff._core import File
from birkhoff.checkpoint import Tensor
from birkhoff.compression import decide, write_plan
from birkhoff.nn.coded import CodedLayer, CodedParameter
from birkhoff.nn.placement import coded_parameters
from birkhoff.summary import Summary, summarize

ARCHITECTURES = Path(__file__).parents[1] / "tests" / "architectures"

ITEM_SIZE = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1}


@dataclass(frozen=True)
class Transformers:
    """A model of transformers, as its default configuration has it."""

    name: str
    model: str
    config: str

    def build(self) -> nn.Module:
        transformers = import_module("transformers")
        model: nn.Module = getattr(transformers, self.model)(getattr(transformers, self.config)())
        return model.eval()


@dataclass(frozen=True)
class Row:
    """A model of the family.

    Attributes:
        name: What it is called.
        table: The name of its table, if it has one.
        source: What builds it, if a package does.
        paper: The ratio of the paper.
    """

    name: str
    table: str | None
    source: Sam | Sam2 | Transformers | None
    paper: float | None


def _sam(package: str, variant: str) -> Sam:
    return Sam(variant, package.replace("_", "-"), package, variant)


def _sam2(variant: str) -> Sam2:
    return Sam2(variant, "rf-sam-2", "sam2", variant)


ROWS = [
    Row("SAM-B", "sam_vit_b", _sam("segment_anything", "vit_b"), 4.31),
    Row("SAM-L", "sam_vit_l", _sam("segment_anything", "vit_l"), 4.68),
    Row("SAM-H", "sam_vit_h", _sam("segment_anything", "vit_h"), 4.75),
    Row("SAM-HQ-Tiny", "sam_hq_vit_tiny", _sam("segment_anything_hq", "vit_tiny"), 3.34),
    Row("SAM-HQ-B", "sam_hq_vit_b", _sam("segment_anything_hq", "vit_b"), 4.32),
    Row("SAM-HQ-L", "sam_hq_vit_l", _sam("segment_anything_hq", "vit_l"), 4.68),
    Row("SAM-HQ-H", "sam_hq_vit_h", _sam("segment_anything_hq", "vit_h"), 4.75),
    Row("SAM2-Tiny", None, _sam2("sam2/sam2_hiera_t"), 5.08),
    Row("SAM2-S", None, _sam2("sam2/sam2_hiera_s"), 5.03),
    Row("SAM2-B+", None, _sam2("sam2/sam2_hiera_b+"), 5.17),
    Row("SAM2-L", None, _sam2("sam2/sam2_hiera_l"), 5.00),
    Row("SAM2.1-Tiny", "sam2_hiera_tiny", _sam2("sam2.1/sam2.1_hiera_t"), None),
    Row("SAM2.1-S", "sam2_hiera_small", _sam2("sam2.1/sam2.1_hiera_s"), None),
    Row("SAM2.1-B+", "sam2_hiera_base_plus", _sam2("sam2.1/sam2.1_hiera_b+"), None),
    Row("SAM2.1-L", "sam2_hiera_large", _sam2("sam2.1/sam2.1_hiera_l"), None),
    Row("MobileSAM", "mobile_sam", _sam("mobile_sam", "vit_t"), 3.33),
    Row("MobileSAMv2 (the network of SAM-H)", "sam_vit_h", _sam("segment_anything", "vit_h"), 4.72),
    Row("EdgeSAM", "edge_sam", _sam("x_segment_anything", "edge_sam"), 3.63),
    Row("EdgeSAM-RPN", "edge_sam_rpn", None, 3.76),
    Row("EfficientSAM-Ti", "efficient_sam_ti", None, 5.13),
    Row("EfficientSAM-S", "efficient_sam_s", None, 5.08),
    Row("TinySAM (the network of MobileSAM)", "mobile_sam", _sam("mobile_sam", "vit_t"), 3.47),
    Row("SAM 3", "sam3", Transformers("SAM 3", "Sam3Model", "Sam3Config"), None),
    Row("EdgeTAM", "edge_tam", Transformers("EdgeTAM", "EdgeTamModel", "EdgeTamConfig"), None),
]


@dataclass(frozen=True)
class Size:
    """What compression does to a checkpoint; bytes."""

    elements: int
    original_nbytes: int
    nbytes: int
    ratio: float
    coded: int
    tensors: int
    compress_seconds: float | None = None


@dataclass(frozen=True)
class Loaded:
    """What loading a compressed file takes; bytes."""

    fused_layers: int
    decoded_tensors: int
    load_seconds: float
    resident_before: int
    resident_after: int
    resident_original: int


def tensors_of(table: str) -> list[Tensor]:
    """The tensors of a table, all zeros."""
    tensors = []
    for line in (ARCHITECTURES / f"{table}.txt").read_text().splitlines()[1:]:
        name, dtype, sizes = line.split()
        shape = () if sizes == "scalar" else tuple(map(int, sizes.split("x")))
        read = partial(np.zeros, ITEM_SIZE[dtype] * math.prod(shape), np.uint8)
        tensors.append(Tensor(name, dtype, shape, read))
    return tensors


def size_of_table(table: str, bits: int) -> Size:
    plan, settings = decide(tensors_of(table), bits=bits, codec="shift", user_rules=[], skip=[])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.safetensors"
        write_plan(output, plan, "shift", settings, overwrite=False, progress=None)
        return size_of(summarize(File(output)))


def size_of(summary: Summary) -> Size:
    return Size(
        sum(tensor.elements for tensor in summary.tensors),
        summary.original_nbytes,
        summary.nbytes,
        summary.ratio,
        sum(tensor.coding == "coded" for tensor in summary.tensors),
        len(summary.tensors),
        summary.seconds,
    )


# Each of these has a process of its own.


def write_checkpoint(row: Row, path: Path) -> None:
    """A checkpoint with random weights."""
    with quiet():
        if row.source is not None:
            torch.manual_seed(0)
            model = row.source.build()
            randomize(model)
            torch.save(model.state_dict(), path)
            return
    assert row.table is not None
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for tensor in tensors_of(row.table):
        if tensor.is_float:
            weights = rng.standard_normal(tensor.shape, np.float32)
            arrays[tensor.name] = np.asarray(np.float32(0.02) * weights)
        else:
            arrays[tensor.name] = np.zeros(tensor.shape, np.int64)
    save_file(arrays, path)


def compress(checkpoint: Path, output: Path, bits: int) -> Size:
    return size_of(birkhoff.compress_file(checkpoint, output, bits=bits))


def load_original(row: Row, checkpoint: Path) -> int:
    """The resident bytes of a process with the original model."""
    assert row.source is not None
    with quiet():
        model = row.source.build()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return resident()


def load(row: Row, path: Path, original: int) -> Loaded:
    assert row.source is not None
    with quiet():
        # Imports what loading would import.
        birkhoff.load(path, row.source.build)
        before = resident()
        start = time.perf_counter()
        model = birkhoff.load(path, row.source.build)
        seconds = time.perf_counter() - start
    for module in model.modules():
        if isinstance(module, CodedParameter):
            module.codes.sum()  # As running it would, reads the map.
    fused = sum(isinstance(module, CodedLayer) for module in model.modules())
    decoded = len(coded_parameters(model)) - fused
    return Loaded(fused, decoded, seconds, before, resident(), original)


def resident() -> int:
    """Bytes of this process's memory that are resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(row: Row, bits: int) -> tuple[Size, Loaded | None]:
    with tempfile.TemporaryDirectory() as name:
        checkpoint, output = Path(name) / "model.checkpoint", Path(name) / "model.safetensors"
        in_own_process(write_checkpoint, row, checkpoint)
        size = in_own_process(compress, checkpoint, output, bits)
        if row.source is None:
            return size, None
        original = in_own_process(load_original, row, checkpoint)
        return size, in_own_process(load, row, output, original)


def installed(row: Row) -> bool:
    if isinstance(row.source, Sam | Sam2):
        try:
            with quiet():
                import_module(row.source.package)
        except ImportError as error:
            install = f"pip install {row.source.distribution}"
            print(f"{row.name}: {error}; {install}", file=sys.stderr)
            return False
    return True


def print_sizes(results: list[tuple[Row, Size]], bits: int) -> None:
    print(
        f"| model | parameters, M | before, MB | at {bits} bits, MB | ratio "
        "| tensors coded | the paper's ratio | ours to the paper's |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    gains = []
    for row, size in results:
        paper = " | "
        if row.paper is not None:
            gains.append(size.ratio / row.paper)
            paper = f"{row.paper:.2f} | {gains[-1]:.2f}"
        print(
            f"| {row.name} | {size.elements / 1e6:.2f} | {size.original_nbytes / 1e6:.1f} "
            f"| {size.nbytes / 1e6:.2f} | {size.ratio:.2f} | {size.coded} of {size.tensors} "
            f"| {paper} |"
        )
    if gains:
        print(
            f"\nOurs to the paper's: {min(gains):.2f} at least, {statistics.mean(gains):.2f} "
            f"on average of {len(gains)}."
        )


def print_loaded(results: list[tuple[Row, Size, Loaded | None]]) -> None:
    print(f"\n{cpu_name()}, {torch.get_num_threads()} threads.\n")
    print(
        "| model | compress, s | load, s | layers fused | tensors decoded | resident before, MB "
        "| after | the original's |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row, size, loaded in results:
        print(f"| {row.name} | {size.compress_seconds:.1f} ", end="")
        if loaded is None:
            print("| | | | | | |")
            continue
        resident = (loaded.resident_before, loaded.resident_after, loaded.resident_original)
        print(
            f"| {loaded.load_seconds:.2f} | {loaded.fused_layers} | {loaded.decoded_tensors} | "
            + " | ".join(f"{nbytes / 1e6:.0f}" for nbytes in resident)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Size, time and memory of compressed models.")
    parser.add_argument("--bits", type=int, default=4)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="*", metavar="MODEL", choices=names, help=", ".join(names))
    parser.add_argument("--sizes", action="store_true", help="sizes alone, from the tables")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    results: list[tuple[Row, Size, Loaded | None]] = []
    known: dict[Any, tuple[Size, Loaded | None]] = {}
    for row in rows:
        if arguments.sizes:
            if row.table is not None:
                results.append((row, size_of_table(row.table, arguments.bits), None))
        elif installed(row):
            # Some models share a network.
            key = row.source or row.table
            if key not in known:
                print(f"{row.name} ...", file=sys.stderr, flush=True)
                known[key] = measure(row, arguments.bits)
            results.append((row, *known[key]))
    if arguments.json:
        listed = [
            {"model": row.name, "paper": row.paper, **asdict(size)}
            | (asdict(loaded) if loaded else {})
            for row, size, loaded in results
        ]
        print(json.dumps(listed, indent=1))
        return
    print_sizes([(row, size) for row, size, _ in results], arguments.bits)
    if not arguments.sizes:
        print_loaded(results)


if __name__ == "__main__":
    main()
