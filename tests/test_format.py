"""Another reader of the file format, written from docs/format.md, against birkhoff's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from birkhoff import _core

DOCUMENT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()


def curve() -> list[int]:
    """The table at the end of the document, and its mirror image."""
    (table,) = re.findall(r"```text\n(.*?)```", DOCUMENT, re.DOTALL)
    half = [int(value) for value in table.split()]
    assert len(half) == 128
    return half + [-value for value in reversed(half)]


CURVE = curve()
GROUP_SCALE = [
    np.float32(2 ** (-e / 8)) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)
]
GENERATORS = {
    "shift": {2: 263, 3: 247, 4: 249, 5: 1789, 6: 4863},
    "winding": {4: 157, 5: 741, 6: 1701},
}


def tap(codec: str, bits: int, j: int) -> tuple[int, int]:
    """One past the last bit of the window of weight j, and the multiplier."""
    if codec == "shift":
        return (j + 1) * bits, GENERATORS[codec][bits] << (8 - bits)
    coordinate = GENERATORS[codec][bits] if j % 2 else 1
    return (j // 2 + 1) * 2 * bits, coordinate << (16 - 2 * bits)


def value(codes: NDArray[np.uint8], codec: str, bits: int, row: int, col: int) -> int:
    """The value of one weight, from the codes `[blocks, bits * 64]` of its strip."""
    block, stream, index = col // 32, col % 32 // 16, col % 16
    if bits == 8:
        byte = index % 2 + 2 * stream
        return int(codes[block].view(np.int8).reshape(8, 16, 4)[index // 2, row, byte])
    words = codes.view("<u2").reshape(len(codes), bits, 16, 2)[:, :, row, stream]
    bitstring = "".join(f"{word:016b}" for word in words.reshape(-1))
    end, multiplier = tap(codec, bits, 16 * block + index)
    window = int((bitstring[-16:] + bitstring)[end : end + 16], 2)
    return CURVE[window * multiplier % 2**16 // 2**8]


def decode(parts: dict[str, Any], coded: dict[str, Any]) -> NDArray[np.float32]:
    out = np.empty((coded["rows"], coded["cols"]), np.float32)
    for r, c in np.ndindex(*out.shape):
        strip, row = divmod(r, 16)
        byte = parts["group_exponents"][strip, c // 128, row % 8]
        exponent = byte >> 4 if row >= 8 else byte & 15
        scale = np.float32(parts["row_scales"][r] * GROUP_SCALE[exponent])
        codes = parts["codes"][strip]
        out[r, c] = scale * np.float32(value(codes, coded["codec"], coded["bits"], row, c))
    return out


@pytest.mark.parametrize(
    ("codec", "bits"), [(codec, bits) for codec in GENERATORS for bits in _core.rates(codec)]
)
def test_a_reader_written_from_the_document_agrees(tmp_path: Path, codec: str, bits: int) -> None:
    # More than one strip, block and group, none of them full; groups of very different size.
    rows, cols = 18, 150
    rng = np.random.default_rng(bits)
    weights = rng.standard_normal((rows, cols)) * rng.choice([0.01, 1, 3], (rows, 1))
    weights[:, 128:] *= 0.3
    weights = weights.astype(np.float32)
    path = tmp_path / "model.safetensors"
    with _core.Writer(
        path, [("coded", "w", "F32", (cols, rows), rows, cols, bits, codec)]
    ) as writer:
        writer.write("w", weights.reshape(-1).view(np.uint8))
        writer.finish()

    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["birkhoff"])
        parts = {
            part: file.get_tensor(f"w.{part}")
            for part in ("codes", "row_scales", "group_exponents")
        }
    arrays = {
        name: part.float().numpy() if name == "row_scales" else part.numpy()
        for name, part in parts.items()
    }
    (tensor,) = manifest["tensors"]
    assert (tensor["name"], tensor["dtype"], tensor["shape"]) == ("w", "F32", [cols, rows])
    decoded = decode(arrays, tensor["coding"]["coded"])
    assert np.array_equal(decoded.reshape(cols, rows), _core.File(path).float32("w"))


def test_the_example_of_the_document_has_the_fields_of_a_manifest(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    documented = json.loads(example)
    plan: list[Any] = []
    for tensor in documented["tensors"]:
        ((kind, fields),) = tensor["coding"].items()
        names = {"coded": ["rows", "cols", "bits", "codec"], "stored": ["dtype"], "tied": ["to"]}
        first = (kind, tensor["name"], tensor["dtype"], tensor["shape"])
        plan.append(first + tuple(fields[name] for name in names[kind]))
    path = tmp_path / "model.safetensors"
    with _core.Writer(path, plan) as writer:
        for kind, name, _, shape, *_ in plan:
            if kind != "tied":
                writer.write(name, np.zeros(4 * int(np.prod(shape)), np.uint8))
        writer.finish()
    written = json.loads(_core.File(path).metadata["birkhoff"])

    def anonymous(value: Any) -> Any:
        """The value with all checksums alike."""
        if isinstance(value, dict):
            return {key: anonymous(item) for key, item in value.items()}
        if isinstance(value, list):
            return [anonymous(item) for item in value]
        return "checksum" if re.fullmatch("[0-9a-f]{16}", str(value)) else value

    assert anonymous(written) == anonymous(documented)
