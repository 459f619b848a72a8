"""Bits chosen for each tensor against bits spent evenly and against the hand-made policy, at equal
bytes: how much of the original's outputs is kept.

    python benches/accuracy/allocation.py --sam FOLDER [--json]

FOLDER holds a transformers `SamModel` that `train.py` has trained. For it, fidelity is the mean IoU
with the original's masks on held-out scenes; for the sentence encoder MiniLM, the mean cosine of
its sentence embeddings with the original's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import birkhoff
from birkhoff.architectures import load_folder

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import cpu_name
from weights import minilm_path

BITS = (3, 4, 5)
#: The modules whose documentation is read.
MODULES = (argparse, inspect, json, logging, tempfile, types)

Fidelity = Callable[[torch.nn.Module], dict[str, float]]


def sentence_fidelity(original: torch.nn.Module) -> Fidelity:
    """The mean cosine of sentence embeddings with the original's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path().parent)
    tokens = tokenizer(
        sentences(), return_tensors="pt", padding=True, truncation=True, max_length=64
    )

    @torch.inference_mode()
    def embeddings(model: torch.nn.Module) -> torch.Tensor:
        mask = tokens["attention_mask"][..., None]
        states = model(**tokens).last_hidden_state * mask
        return torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1)

    reference = embeddings(original)
    return lambda model: {"cosine": float((embeddings(model) * reference).sum(-1).mean())}


def sentences() -> list[str]:
    """The first sentences of what the standard library says of its own functions."""
    found = []
    for module in MODULES:
        for _, member in inspect.getmembers(module):
            text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
            if len(text) > 30:
                found.append(text)
    return sorted(set(found))[:100]


def mask_fidelity(original: torch.nn.Module, scenes: int) -> Fidelity:
    """The mean IoU with the original's masks for points and boxes in held-out scenes."""
    from scenes import HELD_OUT, draw_scene
    from segmentation import predict_masks, prompt_scenes

    from birkhoff.evaluation import iou

    drawn = [draw_scene(HELD_OUT + number) for number in range(scenes)]
    prompted = prompt_scenes(
        np.stack([scene.image for scene in drawn]), np.stack([scene.labels for scene in drawn]), 48
    )
    reference = predict_masks(original, prompted)

    def fidelity(model: torch.nn.Module) -> dict[str, float]:
        found = predict_masks(model, prompted)
        return {mode: float(iou(found[mode], reference[mode]).mean()) for mode in found}

    return fidelity


def allocations() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, bits, and options of `compress_file`; `"as"` names the row whose bytes are met."""
    for bits in BITS:
        yield "even", bits, {"bits": bits, "rules": {"*": bits}}
        yield "alike, even's bytes", bits, {"as": "even"}
        yield "auto, even's bytes", bits, {"as": "even", "auto": True}
        yield "policy", bits, {"bits": bits}
        yield "alike, policy's bytes", bits, {"as": "policy"}
        yield "auto, policy's bytes", bits, {"bits": bits, "auto": True}


def measure(name: str, folder: Path, fidelity: Callable[[torch.nn.Module], Fidelity]) -> list[Any]:
    original = load_folder(folder)
    of = fidelity(original)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "compressed.safetensors"
        for method, bits, options in allocations():
            met = options.pop("as", None)
            if met is not None:
                same = next(r for r in rows if (r["method"], r["bits"]) == (met, bits))
                options["target_ratio"] = same["ratio"] * (1 - 1e-9)
            summary = birkhoff.compress_file(folder, path, overwrite=True, **options)
            row = {"model": name, "method": method, "bits": bits, "nbytes": summary.nbytes}
            row |= {"ratio": summary.ratio, "bits_per_weight": summary.bits_per_weight}
            # The file may hold more than the model, such as the numbers of positions.
            row |= of(birkhoff.load(path, load_folder(folder), strict=False))
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sam", type=Path, metavar="FOLDER", help="a trained SamModel")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes (default 300)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    birkhoff.set_precision("highest")

    rows = measure("minilm", minilm_path().parent, sentence_fidelity)
    if arguments.sam is not None:
        rows += measure(
            "sam", arguments.sam, lambda original: mask_fidelity(original, arguments.scenes)
        )
    if arguments.json:
        print(json.dumps({"cpu": cpu_name(), "rows": rows}, indent=2))
        return
    for row in rows:
        figures = {key: row[key] for key in ("cosine", "point", "box") if key in row}
        text = ", ".join(f"{key} {value:.5f}" for key, value in figures.items())
        print(
            f"{row['model']:7} {row['bits']} bits  {row['method']:22} {row['nbytes']:>11,} bytes  "
            f"{row['bits_per_weight']:.3f} bits/weight  {text}"
        )


if __name__ == "__main__":
    main()
