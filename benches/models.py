"""File sizes of the Segment Anything family.

    python benches/models.py [--bits 4] [--only TABLE ...]

Compresses the architectures of `tests/architectures`, tables of the names and shapes of all
tensors, as `birkhoff compress` does. Sizes do not depend on values, so the weights are zeros.
Beside ours stands the ratio that the Birkhoff paper (arXiv 2507.08765) gives for its own codec.
"""

import argparse
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from birkhoff._core import File
from birkhoff.checkpoint import Tensor
from birkhoff.compression import decide, write_plan
from birkhoff.summary import Summary, summarize

ARCHITECTURES = Path(__file__).parents[1] / "tests" / "architectures"

#: The model, its table, and the ratio of the paper.
MODELS = [
    ("SAM-B", "sam_vit_b", 4.31),
    ("SAM-L", "sam_vit_l", 4.68),
    ("SAM-H", "sam_vit_h", 4.75),
    ("SAM-HQ-Tiny", "sam_hq_vit_tiny", 3.34),
    ("SAM-HQ-B", "sam_hq_vit_b", 4.32),
    ("SAM-HQ-L", "sam_hq_vit_l", 4.68),
    ("SAM-HQ-H", "sam_hq_vit_h", 4.75),
    ("SAM2.1-Tiny", "sam2_hiera_tiny", 5.08),
    ("SAM2.1-S", "sam2_hiera_small", 5.03),
    ("SAM2.1-B+", "sam2_hiera_base_plus", 5.17),
    ("SAM2.1-L", "sam2_hiera_large", 5.00),
    ("MobileSAM", "mobile_sam", 3.33),
    ("MobileSAMv2 (the network of SAM-H)", "sam_vit_h", 4.72),
    ("EdgeSAM", "edge_sam", 3.63),
    ("EfficientSAM-Ti", "efficient_sam_ti", 5.13),
    ("EfficientSAM-S", "efficient_sam_s", 5.08),
    ("TinySAM (the network of MobileSAM)", "mobile_sam", 3.47),
    ("SAM 3", "sam3", None),
]

ITEM_SIZE = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1}


def tensors_of(table: str) -> list[Tensor]:
    """The tensors of an architecture, all zeros."""
    tensors = []
    for line in (ARCHITECTURES / f"{table}.txt").read_text().splitlines()[1:]:
        name, dtype, sizes = line.split()
        shape = () if sizes == "scalar" else tuple(map(int, sizes.split("x")))
        read = partial(np.zeros, ITEM_SIZE[dtype] * math.prod(shape), np.uint8)
        tensors.append(Tensor(name, dtype, shape, read))
    return tensors


def compress(table: str, bits: int) -> Summary:
    plan, settings = decide(tensors_of(table), bits=bits, codec="shift", user_rules=[], skip=[])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.safetensors"
        write_plan(output, plan, "shift", settings, overwrite=False, progress=None)
        return summarize(File(output))


def main() -> None:
    parser = argparse.ArgumentParser(description="File sizes of the Segment Anything family.")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--only", nargs="*", metavar="TABLE", help="names of tables")
    arguments = parser.parse_args()
    print(
        f"| model | parameters, M | before, MB | at {arguments.bits} bits, MB | ratio "
        "| tensors coded | the paper's ratio | ours to the paper's |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    gains = []
    for model, table, paper in MODELS:
        if arguments.only and table not in arguments.only:
            continue
        summary = compress(table, arguments.bits)
        elements = sum(tensor.elements for tensor in summary.tensors)
        coded = sum(tensor.coding == "coded" for tensor in summary.tensors)
        print(
            f"| {model} | {elements / 1e6:.2f} | {summary.original_nbytes / 1e6:.1f} "
            f"| {summary.nbytes / 1e6:.2f} | {summary.ratio:.2f} "
            f"| {coded} of {len(summary.tensors)} ",
            end="",
        )
        if paper is None:
            print("| | |", flush=True)
            continue
        gains.append(summary.ratio / paper)
        print(f"| {paper:.2f} | {gains[-1]:.2f} |", flush=True)
    if gains:
        print(
            f"\nOurs to the paper's: {min(gains):.2f} at least, {statistics.mean(gains):.2f} "
            f"on average of {len(gains)}."
        )


if __name__ == "__main__":
    main()
