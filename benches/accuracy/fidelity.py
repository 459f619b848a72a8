"""What compression does to models that were trained.

    python benches/accuracy/fidelity.py build/toy-sam [--quick] [--json] > fidelity.json

The SAM (see train.py; without a folder, the one that ships with birkhoff) segments 300 held-out
scenes, 4 shapes each, by a point and by a box. For each format: bits a coded weight with scales
counted; how many times smaller than float32 the model is, where what is not coded takes 16 bits a
value; the mean IoU of its masks with the shapes (mIoU) and with the masks of the float32 model
(fidelity). MiniLM embeds 64 sentences; its fidelity is the mean cosine between the embeddings
before and after.

Two sets of tensors are coded: weights of Linear layers, and everything that birkhoff can code
(those of convolutions and positional tables too). Birkhoff also codes everything by its default
policy, where sensitive tensors get more bits; with `--auto`, where each tensor's bits are chosen
and the file is as large as by the policy; and either with `--feedback`. Birkhoff's rows are
measured on files as `birkhoff compress` writes them, loaded and run by its own operators.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_codec import Array, paper_codec
from scenes import HELD_OUT, MIN_AREA, draw_scene
from segmentation import Mode, Prompted, predict_masks, prompt_scenes
from torch import Tensor, nn

import birkhoff
from birkhoff.compression import decide
from birkhoff.evaluation.metrics import iou
from birkhoff.plan import Coded
from birkhoff.torch_checkpoint import tensors_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from rate_distortion import GROUP, nf4, round_to_nearest
from weights import minilm_path

SCENES = 300
SETS = ("Linear", "everything", "default policy", "--auto", "--feedback", "--auto --feedback")
BITS = (2, 3, 4, 5, 6)

Row = dict[str, Any]
Build = Callable[[], nn.Module]
#: Weights as a matrix to the bits that they take and their decoded values.
Format = Callable[[Array], tuple[float, Array]]


def baselines() -> Iterator[tuple[str, Format]]:
    """Formats of others, by name."""

    def grouped(bits: int, decode: Callable[[Array], Array]) -> Format:
        return lambda weights: (weights.size * (bits + 16 / GROUP), decode(weights))

    for bits in (4, 5, 6, 8):
        yield f"int{bits} g64", grouped(bits, lambda w, bits=bits: round_to_nearest(w, bits))
    yield "NF4 g64", grouped(4, nf4)
    yield "paper's codec", paper_codec


def codable(model: nn.Module) -> dict[str, Coded]:
    """What birkhoff would code of a model."""
    plan, _ = decide(
        tensors_of(model.state_dict(), "model"),
        bits=4,
        codec="shift",
        user_rules=[("*", 4)],
        skip=[],
    )
    return {item.tensor.name: item for item in plan if isinstance(item, Coded)}


def linear_names(model: nn.Module) -> set[str]:
    """The weights of Linear layers."""
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


def by_birkhoff(model: Any, build: Build, bits: int, which: str) -> tuple[Row, nn.Module]:
    """The model compressed into a file and loaded from it."""
    rules = [("*", bits)] if which in SETS[:2] else []
    if which == "Linear":
        rules += [(name, 16) for name in codable(model) if name not in linear_names(model)]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "original", Path(folder) / "model.safetensors"
        model.save_pretrained(source)
        summary = birkhoff.compress_file(
            source,
            output,
            bits=bits,
            rules=rules,
            auto="--auto" in which,
            feedback="--feedback" in which,
        )
        compressed = birkhoff.load(output, build)
    row = {"format": f"birkhoff {bits}", "set": which}
    return row | {"bits_per_weight": summary.bits_per_weight, "ratio": summary.ratio}, compressed


def by_format(
    model: nn.Module, build: Build, name: str, run: Format, which: str
) -> tuple[Row, nn.Module]:
    """A model whose weights went through a format; everything else is rounded to float16."""
    chosen = codable(model)
    if which == "Linear":
        chosen = {key: item for key, item in chosen.items() if key in linear_names(model)}
    state: dict[str, Tensor] = {}
    coded_bits, coded, other = 0.0, 0, 0
    tied: dict[int, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() in tied:
            state[key] = tied[tensor.data_ptr()]
            continue
        if key in chosen:
            weights = tensor.reshape(chosen[key].rows, chosen[key].cols).numpy()
            tensor_bits, decoded = run(weights)
            state[key] = torch.from_numpy(decoded).reshape(tensor.shape)
            coded_bits, coded = coded_bits + tensor_bits, coded + tensor.numel()
        else:
            state[key] = tensor.half().float() if tensor.is_floating_point() else tensor
            other += tensor.numel()
        tied[tensor.data_ptr()] = state[key]
    changed = build()
    changed.load_state_dict(state)
    row = {"format": name, "set": which, "bits_per_weight": coded_bits / coded}
    return row | {"ratio": 32 * (coded + other) / (coded_bits + 16 * other)}, changed.eval()


def compressed_models(model: Any, build: Build, quick: bool) -> Iterator[tuple[Row, nn.Module]]:
    """The model in every format and set."""
    for which in SETS[2:] if quick else SETS:
        for bits in (3, 4) if quick else BITS:
            yield by_birkhoff(model, build, bits, which)
    for name, run in baselines():
        if not quick or name in ("int4 g64", "paper's codec"):
            for which in SETS[1:2] if quick else SETS[:2]:
                yield by_format(model, build, name, run, which)


def held_out(count: int) -> Prompted:
    """The held-out scenes with their prompts."""
    scenes = [draw_scene(HELD_OUT + i) for i in range(count)]
    return prompt_scenes(
        np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes]), MIN_AREA
    )


def masks_row(masks: dict[Mode, Any], scenes: Prompted, original: dict[Mode, Any] | None) -> Row:
    """mIoU with the shapes, and fidelity to the masks of the original, by mode."""
    row: Row = {}
    for mode, found in masks.items():
        row[f"{mode}_miou"] = float(iou(found, scenes.masks).mean())
        if original is not None:
            row[f"{mode}_fidelity"] = float(iou(found, original[mode]).mean())
    return row


def segment_anything(folder: Path | None, quick: bool) -> list[Row]:
    """The rows of the small SAM; the first is the original."""
    from transformers import SamModel

    from birkhoff.demo import load_original

    model = load_original() if folder is None else SamModel.from_pretrained(folder).eval()
    scenes = held_out(40 if quick else SCENES)
    original = predict_masks(model, scenes)
    rows: list[Row] = [{"format": "float32", "set": "", "bits_per_weight": 32.0, "ratio": 1.0}]
    rows[0] |= masks_row(original, scenes, None)
    for row, compressed in compressed_models(model, lambda: SamModel(model.config).eval(), quick):
        row |= masks_row(predict_masks(compressed, scenes), scenes, original)
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


SUBJECTS = [
    "The old fisherman",
    "A young engineer",
    "My neighbour's cat",
    "The committee",
    "Nobody in the village",
]
SUBJECTS += ["The orchestra", "An honest lawyer", "The last train"]
PREDICATES = ["repaired the bridge before winter came", "never agreed to the terms of the contract"]
PREDICATES += [
    "was seen near the harbour at midnight",
    "published a paper on the growth of crystals",
]
PREDICATES += ["refused to leave without an explanation", "won the race by less than a second"]
PREDICATES += ["learned to play the violin in a year", "sold everything and moved to the mountains"]


def embeddings(model: nn.Module) -> Tensor:
    """Normalised sentence embeddings: the mean of the last hidden states."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path().parent)
    sentences = [f"{subject} {predicate}." for subject in SUBJECTS for predicate in PREDICATES]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


def minilm(quick: bool) -> list[Row]:
    """The rows of MiniLM."""
    from transformers import AutoConfig, AutoModel

    folder = minilm_path().parent
    config = AutoConfig.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    original = embeddings(model)
    rows = []
    for row, compressed in compressed_models(
        model, lambda: AutoModel.from_config(config).eval(), quick
    ):
        row["fidelity"] = float((embeddings(compressed) * original).sum(1).mean())
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    measures = [key for key in rows[-1] if key not in ("format", "set", "bits_per_weight", "ratio")]
    heads = [
        "format",
        "coded",
        "bits/weight",
        "ratio",
        *(key.replace("_", " ") for key in measures),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for row in rows:
        cells = [row["format"], row["set"], f"{row['bits_per_weight']:.2f}", f"{row['ratio']:.2f}"]
        cells += [f"{row[key]:.4f}" if key in row else "" for key in measures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", help="folder of the trained SAM (default: the shipped one)"
    )
    parser.add_argument("--quick", action="store_true", help="40 scenes and few formats")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sam, sentences = segment_anything(options.model, options.quick), minilm(options.quick)
    if options.json:
        print(json.dumps({"segment_anything": sam, "minilm": sentences}, indent=1))
    else:
        print(table(sam), table(sentences), sep="\n\n")


if __name__ == "__main__":
    main()
