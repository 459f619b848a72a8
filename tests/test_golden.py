"""Files written once must be read the same, and written the same, by every later version."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

import birkhoff

FOLDER = Path(__file__).parent / "golden"
DECODED: dict[str, dict[str, str]] = json.loads((FOLDER / "decoded.json").read_text())


def content(path: Path) -> tuple[dict[str, bytes], object]:
    """The bytes of all tensors, and what the manifest says of each."""
    with safe_open(path, "np") as file:
        manifest = json.loads(file.metadata()["birkhoff"])
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    tensors = {
        name: data[slice(*entry["data_offsets"])]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return tensors, manifest["tensors"]


@pytest.mark.parametrize("name", DECODED)
def test_reads_what_was_written(name: str) -> None:
    file = birkhoff.open(FOLDER / name)
    digests = {tensor: hashlib.sha256(file[tensor].tobytes()).hexdigest() for tensor in file}
    assert digests == DECODED[name]


@pytest.mark.parametrize("name", DECODED)
def test_writes_what_was_written(name: str, tmp_path: Path) -> None:
    codec, bits = name.removesuffix(".safetensors").split("-")
    output = tmp_path / name
    birkhoff.compress_file(
        FOLDER / "weights.safetensors",
        output,
        bits=int(bits),
        codec=codec,
        rules={"*.weight": int(bits)},
    )
    assert content(output) == content(FOLDER / name)
