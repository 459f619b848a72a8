"""Writes the golden files anew. Only for a new version of the format.

    python tests/golden/make.py

`weights.safetensors` is the input; `CODEC-BITS.safetensors` are what it must compress to.
`decoded.json` holds the SHA-256 of every decoded tensor.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import birkhoff

FOLDER = Path(__file__).parent
RATES = {"shift": [2, 3, 4, 5, 6, 8], "winding": [4, 5, 6]}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2026)
    heavy = rng.standard_normal((20, 300)) * 0.02
    heavy[3] *= 40
    heavy[7] = 0
    heavy[:, 130:200] *= 0.01
    return {
        "dense.weight": heavy.astype(np.float32),
        "narrow.weight": (rng.standard_normal((33, 20)) * 1e-10).astype(np.float32),
        "conv.weight": (rng.standard_normal((16, 8, 3, 3)) * 0.1).astype(np.float16),
        "double.weight": rng.uniform(-1, 1, (16, 64)),
        "norm.bias": rng.standard_normal(20).astype(np.float32),
        "steps": np.array([7], np.int64),
    }


def digests(path: Path) -> dict[str, str]:
    file = birkhoff.open(path)
    return {name: hashlib.sha256(file[name].tobytes()).hexdigest() for name in file}


def main() -> None:
    source = FOLDER / "weights.safetensors"
    save_file(weights(), source)
    decoded = {}
    for codec, rates in RATES.items():
        for bits in rates:
            output = FOLDER / f"{codec}-{bits}.safetensors"
            rules = {"*.weight": bits}
            birkhoff.compress_file(
                source, output, bits=bits, codec=codec, rules=rules, overwrite=True
            )
            decoded[output.name] = digests(output)
    (FOLDER / "decoded.json").write_text(json.dumps(decoded, indent=1) + "\n")


if __name__ == "__main__":
    main()
